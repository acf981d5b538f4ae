#!/bin/bash
# monitor - a program is run for a mismatch, and for a daemon that dies, once
. tests/vm/lib.sh
format
add
mark_block "$disk" 1000 block-1000-of-the-device
remove
flip_bit $data $(($(where_is $data block-1000-of-the-device) + 3))
add
# shellcheck disable=SC2016 # its own variables
printf '#!/bin/sh\necho "$UBLK_EVENT_CLASS $UBLK_EVENT_MESSAGE" >>/run/told\n' >/run/hook
chmod 755 /run/hook
told() { grep -q "$1" /run/told; }
ui monitor --command /run/hook --test
told '^test ' || die 'no test'
"$ublk_integrity" monitor --command /run/hook & monitor=$!
step 'a mismatch'
# It begins with what comes after its start.
again() { read_block "$disk" 1000 >/dev/null; told "^mismatch $data: .*block 1000 does not match its tag"; }
wait_for again
step 'what was seen is cleared, and what comes later counts'
refused 6 ui status -x
ui clear -n "$id" | grep -q "^$disk: cleared [0-9]* mismatches$" || die 'not cleared'
[ "$(ui status -x)" = 'all devices are ok' ] || die 'not acknowledged'
wait_for told "^cleared $data: findings cleared: [0-9]* mismatches$"
[ "$(read_block "$disk" 1000)" = "$EILSEQ" ] || die 'clear has mended a block'
refused 6 ui status -x
step 'a daemon that dies'
pid=$(daemon)
kill -9 "$pid"
wait_for told "^daemon-died the daemon of $disk (pid $pid) is dead: .recover -n $id. or .del -n $id.$"
ui events --class daemon-died | grep -q "pid $pid" || die 'events has it not'
ui recover -n "$id" --key-file $key
[ "$(ui status -x)" = 'all devices are ok' ] || die 'the next daemon is not ok'
remove
[ "$(grep -c '^daemon-died' /run/told)" = 1 ] || die "told more than once: $(cat /run/told)"
kill "$monitor"
wait "$monitor" || true
rm -f /run/told /run/hook
