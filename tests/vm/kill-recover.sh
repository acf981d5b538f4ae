#!/bin/bash
# kill-recover - kill -9 of the daemon under load, recover: no error is seen, and no stale data
# vm: cpus=4 limit=300
. tests/vm/lib.sh
kill_and_recover() {
  local pid
  within 5 busy # or the test shows nothing
  pid=$(daemon)
  kill -9 "$pid"
  within 20 gone "$pid"
  ui recover -n "$id" --key-file $key
  [ "$(daemon)" != "$pid" ] || die 'no new daemon'
}

format
add
step 'under fio --verify'
fio --name=v --filename="$disk" --ioengine=libaio --direct=1 --rw=randwrite --bsrange=4k-64k --iodepth=16 --numjobs=4 \
  --size=24M --offset_increment=200M --loops=1000 --time_based --runtime=22 --verify=crc32c --verify_fatal=1 \
  --verify_state_save=0 --verify_backlog=64 --output=/run/fio & fio=$!
within 30 busy
for round in 1 2; do
  sleep 3
  step "kill -9, round $round"
  kill_and_recover
done
wait $fio || { tail -n 30 /run/fio; die 'fio saw an error'; }

step 'under a writer that knows the version of each block'
versions write "$disk" 0 8 18 /run/table & writer=$!
within 30 busy
for round in 1 2; do
  sleep 3
  step "kill -9, round $round"
  kill_and_recover
done
wait $writer || die 'an old version, or an error'
grep -q ' 0 threads failed' /run/versions || die 'an error reached the writer'
[ "$(counter mismatches)" = 0 ] || die 'mismatches'
remove
check_closed

step 'without recovery the device goes away with its daemon, and what was in flight with it'
add --no-recovery -q 4
versions write "$disk" 8192 8 20 /run/table & writer=$!
within 30 busy
sleep 3
pid=$(daemon)
kill -9 "$pid"
within 20 gone "$pid"
wait $writer || die 'an old version'
code=0
ui recover -n "$id" --key-file $key 2>/run/err || code=$?
cat /run/err
[ $code != 0 ] || die 'recover of a device without recovery'
ui del -n "$id"
check_clean
add
step 'opened again: each block is the version acknowledged last, or the one in flight'
versions check "$disk" /run/table || die 'a block reads as what it may not be'
grep -q ' [1-9][0-9]* with a write in flight' /run/versions || die 'no write was in flight: the test shows nothing'
[ "$(counter mismatches)" = 0 ] || die 'mismatches'
remove
check_closed
