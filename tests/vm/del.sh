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
