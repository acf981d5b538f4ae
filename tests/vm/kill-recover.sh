#!/bin/bash
# kill-recover - kill -9 of the daemon under load, recover: no error is seen, and no stale data
# vm: cpus=2:4
. tests/vm/lib.sh
kill_and_recover() {
  local pid
  goes_on
  wait_for busy # or the test shows nothing
  pid=$(daemon)
  kill -9 "$pid"
  wait_for gone "$pid"
  ui recover -n "$id" --key-file $key
  [ "$(daemon)" != "$pid" ] || die 'no new daemon'
}

format
add
step 'under fio --verify'
start_fio --rw=randwrite --bsrange=4k-64k --iodepth=16 --numjobs=4 --size=24M --offset_increment=200M \
  --verify=crc32c --verify_fatal=1 --verify_state_save=0 --verify_backlog=64
for round in 1 ${FULL:+2}; do
  step "kill -9, round $round"
  kill_and_recover
done
goes_on
end_fio

step 'under a writer that knows the version of each block'
start_writer 0 8
for round in 1 ${FULL:+2}; do
  step "kill -9, round $round"
  kill_and_recover
done
goes_on
end_writer
[ "$(counter mismatches)" = 0 ] || die 'mismatches'
remove
check_closed

step 'without recovery the device goes away with its daemon, and what was in flight with it'
add --no-recovery -q "$(nproc)"
start_writer 8192 16
goes_on
pid=$(daemon)
wait_for writing
kill -9 "$pid"
wait_for gone "$pid"
wait_for gone "$load"
end_writer 11
code=0
ui recover -n "$id" --key-file $key 2>/run/err || code=$?
cat /run/err
[ $code != 0 ] || die 'recover of a device without recovery'
ui del -n "$id"
check_clean
add
step 'opened again: each block is the version acknowledged last, or the one in flight'
check_versions
grep -q ' [1-9][0-9]* with a write in flight' /run/versions || die 'no write was in flight: the test shows nothing'
[ "$(counter mismatches)" = 0 ] || die 'mismatches'
remove
check_closed
