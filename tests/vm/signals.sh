#!/bin/bash
# signals - SIGTERM and SIGINT stop cleanly, when nobody uses the device or at the second time; SIGHUP never; no caller's fd is kept
# vm: limit=240
. tests/vm/lib.sh
syslog
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
  step "SIG$signal under I/O: the second one counts"
  start_fio --rw=randwrite --bs=4k --iodepth=16 --size=64M
  pid=$(daemon)
  kill -$signal "$pid"
  wait_for logged "\[$pid\]: $data: the device is in use: it is stopped when its last user is gone"
  gone "$load" && die 'the first one ended it'
  wait_for busy
  kill -$signal "$pid"
  wait_for gone "$pid"
  ! wait "$load" || die 'fio saw no error'
  wait_for test ! -e "$disk"
  check_closed
done

step 'a mounted file system outlives SIGHUP, SIGUSR1 and the first SIGTERM, and the device ends with its mount'
add
pid=$(daemon)
mkfs.ext4 -q "$disk"
mkdir -p /mnt/t
mount "$disk" /mnt/t
for signal in HUP USR1 USR2; do
  kill -$signal "$pid"
  within 30 logged "\[$pid\]: $data: SIG$signal changes nothing"
done
kill -TERM "$pid"
within 30 logged "\[$pid\]: $data: the device is in use: it is stopped when its last user is gone"
echo written-after-SIGTERM >/mnt/t/file
sync -f /mnt/t/file
umount /mnt/t
within 30 gone "$pid"
within 10 test ! -e "$disk"
check_closed
add
mount "$disk" /mnt/t
grep -q written-after-SIGTERM /mnt/t/file || die 'the file was lost'
step 'the second SIGTERM pulls it from under the mount'
pid=$(daemon)
term_twice "$pid"
within 30 gone "$pid"
umount /mnt/t
within 10 test ! -e "$disk"
check_clean

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
no_syslog
