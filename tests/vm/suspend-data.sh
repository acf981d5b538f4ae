#!/bin/bash
# suspend-data - the data device stands still under load: everything waits, then goes on
# vm: limit=180
. tests/vm/lib.sh
linear lower /dev/vda
data=/dev/mapper/lower
stand_still() { # SECONDS
  step "standing still for $1 s"
  suspend lower
  sleep "$1"
  timeout 10 "$ublk_integrity" status -n "$id" >/dev/null || die 'status waits for the data device'
  resume lower
}

format
add -q 2
step 'under fio --verify'
fio --name=v --filename="$disk" --ioengine=libaio --direct=1 --rw=randwrite --bsrange=4k-64k --iodepth=16 --numjobs=2 --size=24M \
  --offset_increment=200M --loops=1000 --time_based --runtime=35 --verify=crc32c --verify_fatal=1 --verify_state_save=0 \
  --verify_backlog=64 --output=/run/fio & fio=$!
within 30 busy
for seconds in 2 20; do
  sleep 4
  stand_still $seconds
done
wait $fio || { tail /run/fio; die 'fio saw an error'; }
step 'under a writer that knows the version of each block'
versions write "$disk" 0 8 15 /run/table & writer=$!
within 30 busy
for seconds in 1 5; do
  sleep 2
  stand_still $seconds
done
wait $writer || die 'an old version, or an error'
grep -q ' 0 threads failed' /run/versions || die 'an error reached the writer'
remove
check_closed
add
versions check "$disk" /run/table || die 'an old version after opening again'
remove
unlinear lower
