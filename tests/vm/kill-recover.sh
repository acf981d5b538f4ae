#!/bin/bash
# kill-recover - kill -9 of the daemon under fio --verify, recover: fio sees no error, no stale data
# vm: cpus=4 limit=240
. tests/vm/lib.sh
format
add -q 4
fio --name=v --filename="$disk" --ioengine=libaio --direct=1 --rw=randwrite --bsrange=4k-64k --iodepth=16 --numjobs=4 \
  --size=24M --offset_increment=200M --loops=1000 --time_based --runtime=32 --verify=crc32c --verify_fatal=1 \
  --verify_state_save=0 --verify_backlog=64 --output=/run/fio & fio=$!
within 30 busy
for round in 1 2 3; do
  sleep 8
  pid=$(daemon)
  step "kill -9, round $round"
  kill -9 "$pid"
  within 20 gone "$pid"
  ui recover -n "$id" --key-file $key
  [ "$(daemon)" != "$pid" ] || die 'no new daemon'
done
wait $fio || { tail -n 30 /run/fio; die 'fio saw an error'; }
[ "$(counter mismatches)" = 0 ] || die 'mismatches'
remove
check_clean
step 'without recovery the device goes away with its daemon'
add --no-recovery
pid=$(daemon)
kill -9 "$pid"
within 20 gone "$pid"
code=0
ui recover -n "$id" --key-file $key 2>/run/err || code=$?
cat /run/err
[ $code != 0 ] || die 'recover of a device without recovery'
ui del -n "$id"
check_clean
