#!/bin/bash
# del - stops under I/O when forced, removes what a dead daemon left, and frees disk and locks
. tests/vm/lib.sh
format
add
step 'del while fio writes: refused, and fio never notices'
start_fio --rw=randrw --bs=4k --iodepth=16 --size=64M
refused 5 ui del -n "$id"
goes_on
step 'del --force while fio writes: it does not wait for fio, which would never end, and gets errors'
ui del -n "$id" --force
! wait "$load" || die 'fio saw no error'
wait_for test ! -e "$disk"
step 'the volume is whole, and closed'
check_closed
add
remove

step 'a daemon that was killed leaves a device; del takes it away'
add
pid=$(daemon)
kill -9 "$pid"
wait_for gone "$pid"
ui list
ui del -n "$id"
wait_for test ! -e "$disk"
check_clean
step 'del -a takes all'
format
ui format --data /dev/vdc --key-file $key --force
add
ui add --data /dev/vdc --key-file $key
[ "$(ui list --json | jq length)" = 2 ] || die 'not two in the list'
ui del -a
[ "$(ui list --json)" = '[]' ] || die 'some are left'
step 'a daemon that is killed between adding its device and writing its state down leaves one that the next command takes away'
(flock 9; : >/run/locked; exec sleep 1d) 9>/run/ublk-integrity/0.lock & holder=$!
wait_for test -e /run/locked
for next in add 'del -a'; do
  ui add --data $data --key-file $key --number 0 --foreground 2>/run/err & pid=$!
  wait_for test -e /dev/ublkc0
  kill -9 $pid
  wait $pid || true
  [ -e /dev/ublkc0 ] || die 'the test shows nothing'
  [ "$(ui list --json)" = '[]' ] || die 'its state is written'
  # The kernel lets go of a killed process' disk a little later.
  wait_for check_clean
  if [ "$next" = add ]; then add --number 1; remove; else ui del -a; fi
  wait_for test ! -e /dev/ublkc0
done
kill $holder
wait $holder || true
left=$(find /run/ublk-integrity -name 'added-*')
[ -z "$left" ] || die "left: $left"
