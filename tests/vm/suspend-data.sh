#!/bin/bash
# suspend-data - the data device stands still under fio --verify: everything waits, then goes on
# vm: limit=180
. tests/vm/lib.sh
linear lower /dev/vda
data=/dev/mapper/lower
format
add -q 2
fio --name=v --filename="$disk" --ioengine=libaio --direct=1 --rw=randwrite --bsrange=4k-64k --iodepth=16 --numjobs=2 --size=24M \
  --offset_increment=200M --loops=1000 --time_based --runtime=38 --verify=crc32c --verify_fatal=1 --verify_state_save=0 \
  --verify_backlog=64 --output=/run/fio & fio=$!
within 30 busy
for seconds in 2 20; do
  sleep 5
  step "standing still for $seconds s"
  suspend lower
  sleep $seconds
  timeout 10 "$ublk_integrity" status -n "$id" >/dev/null || die 'status waits for the data device'
  resume lower
done
wait $fio || { tail /run/fio; die 'fio saw an error'; }
remove
check_clean
unlinear lower
