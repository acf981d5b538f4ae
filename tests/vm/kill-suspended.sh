#!/bin/bash
# kill-suspended - writes of a killed daemon still on their way: nobody opens the volume before they land
. tests/vm/lib.sh
linear lower /dev/vda
data=/dev/mapper/lower
format
add
mark_block "$disk" 50 the-first-version
# Its writes are on their way when the daemon dies, and go on when the next one serves.
start_writer 4096 8
goes_on
step 'the disk under the volume stops answering, and the daemon is killed'
# A sync under way would keep the killed daemon from ending until the disk answers, which is not the case that is meant.
syncs() { # PID
  local task
  for task in /proc/"$1"/task/*; do
    if [[ $(cat "$task/comm") = iou-wrk* ]] && grep -q '^State:.D' "$task/status"; then return 0; fi
  done
  return 1
}
pid=$(daemon)
until suspend lower && wait_for stuck 8 && ! syncs "$pid"; do
  resume lower
  goes_on
done
kill -9 "$pid"
wait_for gone "$pid"
step 'the daemon is gone; the lock is held by its writes alone'
locked() {
  local code=0
  flock -n -E 75 $data true || code=$?
  [ $code = 0 ] || [ $code = 75 ] || die "flock: exit code $code"
  [ $code = 75 ]
}
locked || die 'nothing holds the lock'
step 'recovery waits for them'
ui recover -n "$id" --key-file $key 2>/run/recovery & recovery=$!
waits() {
  gone $recovery && die "recovery did not wait: $(cat /run/recovery)"
  grep -q "waiting for $data" /run/recovery
}
wait_for waits
# A time in which nothing may happen: on a slow machine the test shows less, and fails no more for that. It is within the 30 s
# for which a recovery waits.
sleep 3
gone $recovery && die 'recovery did not wait'
locked || die 'nothing holds the lock any more'
resume lower
wait $recovery || die 'recovery failed'
goes_on
end_writer
[ "$(read_block "$disk" 50)" = ok ] || die 'block 50'
[ "$(counter mismatches)" = 0 ] || die 'mismatches'
remove
locked && die 'the lock outlived the device'
check_closed
add
check_versions # or a late write has landed after all
remove
unlinear lower
