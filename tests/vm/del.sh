#!/bin/bash
# del - stops under I/O when forced, removes what a dead daemon left, and frees disk and locks
. tests/vm/lib.sh
io() { fio --name=io --filename="$disk" --rw=randrw --bs=4k --iodepth=16 --ioengine=libaio --direct=1 --size=64M --time_based --runtime=60 --output=/run/fio; }

format
add
step 'del while fio writes: refused, and fio never notices'
io & fio=$!
within 30 busy
sleep 1
refused 5 ui del -n "$id"
sleep 1
gone $fio && die 'fio ended'
step 'del --force while fio writes: done at once, fio gets errors'
since=$SECONDS
ui del -n "$id" --force
[ $((SECONDS - since)) -lt 20 ] || die "it took $((SECONDS - since)) s"
! wait $fio || die 'fio saw no error'
within 10 test ! -e "$disk"
step 'the volume is whole, and closed'
check_closed
add
remove

step 'a daemon that was killed leaves a device; del takes it away'
add
pid=$(daemon)
kill -9 "$pid"
within 10 gone "$pid"
ui list
ui del -n "$id"
within 10 test ! -e "$disk"
check_clean
step 'del -a takes all'
format
ui format --data /dev/vdc --key-file $key --force
add
ui add --data /dev/vdc --key-file $key
[ "$(ui list --json | jq length)" = 2 ] || die 'not two in the list'
ui del -a
[ "$(ui list --json)" = '[]' ] || die 'some are left'
