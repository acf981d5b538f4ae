#!/bin/bash
# signals - SIGTERM and SIGINT stop cleanly, in the background and the foreground; no caller's fd is kept
. tests/vm/lib.sh
format
for signal in TERM INT; do
  step "SIG$signal to the daemon, idle"
  add
  mark_block "$disk" 5 "written-before-$signal"
  pid=$(daemon)
  kill -$signal "$pid"
  wait_for gone "$pid"
  wait_for test ! -e "$disk"
  check_closed
  add
  [ "$(read_block "$disk" 5)" = ok ] || die 'block 5'
  grep -aq "written-before-$signal" /run/block || die 'the write was lost'
  step "SIG$signal under I/O"
  start_fio --rw=randwrite --bs=4k --iodepth=16 --size=64M
  pid=$(daemon)
  kill -$signal "$pid"
  wait_for gone "$pid"
  ! wait "$load" || die 'fio saw no error'
  wait_for test ! -e "$disk"
  check_closed
done

step 'the device stopped from outside, as by another tool'\''s del'
add
mark_block "$disk" 5 written-before-the-stop
start_fio --rw=randwrite --bs=4k --iodepth=16 --offset=1M --size=64M
pid=$(daemon)
ui stop -n "$id"
wait_for gone "$pid"
! wait "$load" || die 'fio saw no error'
wait_for test ! -e "$disk"
[ "$(ui list --json)" = '[]' ] || die "list: $(ui list --json)"
check_closed
add
[ "$(read_block "$disk" 5)" = ok ] || die 'block 5'
grep -aq written-before-the-stop /run/block || die 'the write was lost'
remove

step 'SIGINT in the foreground'
# (A shell starts what is in the background with SIGINT ignored.)
env --default-signal=INT "$ublk_integrity" add --data $data --key-file $key --foreground -n 3 >/run/out 2>/run/err & pid=$!
wait_for test -b /dev/ublkb3
grep -q '^/dev/ublkb3$' /run/out || { cat /run/out; die 'the foreground did not print the device'; }
kill -INT $pid
wait $pid || die "it exited with $?"
[ ! -e /dev/ublkb3 ] || die 'the device is left'
check_closed

step 'the daemon keeps none of the fds 0-2 of its caller'
disk=$(timeout $patience "$ublk_integrity" add --data $data --key-file $key 2>&1 | tail -n 1) || die 'the pipe stayed open'
id=${disk#/dev/ublkb}
pid=$(daemon)
for fd in 0 1 2; do
  [ "$(readlink "/proc/$pid/fd/$fd")" = /dev/null ] || die "fd $fd is $(readlink "/proc/$pid/fd/$fd")"
done
[ "$(readlink "/proc/$pid/cwd")" = / ] || die "its cwd is $(readlink "/proc/$pid/cwd")"
remove
check_closed
