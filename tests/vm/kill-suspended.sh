#!/bin/bash
# kill-suspended - writes of a killed daemon still on their way: nobody opens the volume before they land
# vm: limit=240
. tests/vm/lib.sh
linear lower /dev/vda
data=/dev/mapper/lower
format
add
mark_block "$disk" 50 the-first-version
# Its writes are on their way when the daemon dies, and go on when the next one serves.
versions write "$disk" 4096 8 30 /run/table & writer=$!
within 30 busy
sleep 2
step 'the disk under the volume stops answering, and the daemon is killed'
suspend lower
sleep 1
pid=$(daemon)
kill -9 "$pid"
# (It has much locked memory to give back.)
within 60 gone "$pid"
step 'the daemon is gone; the lock is held by its writes alone'
locked() { ! timeout 10 flock -n $data true; }
locked || die 'nothing holds the lock'
step 'recovery waits for them'
ui recover -n "$id" --key-file $key & recovery=$!
sleep 5
gone $recovery && die 'recovery did not wait'
locked || die 'nothing holds the lock any more'
resume lower
wait $recovery || die 'recovery failed'
wait $writer || die 'an old version, or an error'
grep -q ' 0 threads failed' /run/versions || die 'an error reached the writer'
[ "$(read_block "$disk" 50)" = ok ] || die 'block 50'
[ "$(counter mismatches)" = 0 ] || die 'mismatches'
remove
locked && die 'the lock outlived the device'
check_closed
add
versions check "$disk" /run/table || die 'a late write landed after all'
remove
unlinear lower
