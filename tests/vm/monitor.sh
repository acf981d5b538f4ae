#!/bin/bash
# monitor - a program is run for a mismatch, and for a daemon that dies, once
. tests/vm/lib.sh
# What tests before this one have had is no business of the monitor's.
rm -f /run/ublk-integrity/*.events* /run/ublk-integrity/monitor-*
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
step 'the monitor is started anew: what came meanwhile is passed on, and nothing twice'
end_monitor() { wait_for passed_on; kill "$monitor"; wait "$monitor" || true; }
end_monitor
cp /run/told /run/told-before
add
read_block "$disk" 1000 >/dev/null
mark_block "$disk" 3 to-be-recovered
kill_daemon
"$ublk_integrity" monitor --command /run/hook & monitor=$!
more() { tail -n "+$(($(wc -l </run/told-before) + 1))" /run/told; }
told_more() { more | grep -q "$1"; }
wait_for told_more "(pid $pid) is dead"
end_monitor
"$ublk_integrity" monitor --command /run/hook & monitor=$!
# It looks before it passes anything on, and believes the second look: so two things that are told one after the other.
for n in 1 2; do
  grep -h '"class":"cleared"' /run/ublk-integrity/*.events | head -n 1 >/run/line
  cat /run/line >>"$(echo /run/ublk-integrity/*.events)"
  told_again() { [ "$(more | grep -c '^cleared ')" = "$n" ]; }
  wait_for told_again
done
ui recover -n "$id" --key-file $key
wait_for told_more '^recovered '
more
[ "$(more | grep -c "^mismatch $data")" = 1 ] || die 'not the mismatch, once'
[ "$(more | grep -c "(pid $pid) is dead")" = 1 ] || die 'a death is told twice'
if told_more '^opening '; then die 'a recovery without findings warns'; fi
remove
end_monitor
rm -f /run/told* /run/hook /run/line
