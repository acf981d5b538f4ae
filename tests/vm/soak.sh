#!/bin/bash
# soak - mixed load: the daemon's memory stays what it said at start (SOAK_SECONDS; an hour with --full)
# vm: long
. tests/vm/lib.sh
seconds=${SOAK_SECONDS:-25}
format
add -q 2
pid=$(daemon)
promised=$(($(counter daemon_memory_bytes) / 1024))
resident() { awk '/^VmRSS/ {print $2}' "/proc/$pid/status"; }
step "$seconds s of reads, writes and discards of all sizes"
common=(--filename="$disk" --direct=1 --ioengine=libaio --time_based --runtime=1d --norandommap --randrepeat=0)
start_fio --norandommap --randrepeat=0 --rw=randrw --bsrange=4k-512k --iodepth=32 \
  --name=small "${common[@]}" --rw=randrw --bs=4k --iodepth=32 --fsync=64 \
  --name=discards "${common[@]}" --rw=randtrim --bsrange=4k-4m
# The time is what was asked for. On a slow machine it takes longer until all has been used once.
sleep $((seconds / 3))
goes_on 5000
warm=$(resident) most=0 end=$((SECONDS + seconds * 2 / 3))
while [ $SECONDS -lt $end ]; do
  loads
  now=$(resident)
  [ "$now" -le "$most" ] || most=$now
  sleep 0.5
done
end_fio
echo "resident: $warm KiB once warm, $most KiB at most; promised: $promised KiB"
[ "$most" -le $((warm + 1024)) ] || die 'it grows'
[ "$most" -le $promised ] || die 'it is more than what was promised'
[ "$(counter mismatches)" = 0 ] || die 'mismatches'
remove
check_closed
