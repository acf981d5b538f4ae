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
  "$ublk_integrity" add --data $data --key-file $key --number 0 --foreground 2>/run/err & pid=$!
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

step 'no name leads to a number whose device has ended, however it did'
link() { readlink "/dev/ublk-integrity/$1"; }
no_link() { [ ! -L "/dev/ublk-integrity/$1" ] || die "$1 leads to $(link "$1")"; }
add --name ends
[ "$(link ends)" = "$disk" ] || die "no link: $(ls -l /dev/ublk-integrity)"
pid=$(daemon)
kill -TERM "$pid"
wait_for gone "$pid"
no_link ends
add --name dies --number 7
pid=$(daemon)
kill -9 "$pid"
wait_for gone "$pid"
ui recover -n 7
[ "$(link dies)" = /dev/ublkb7 ] || die 'a name does not survive its daemon'
remove
no_link dies
# What a daemon has left whose device and state are gone.
ln -s /dev/ublkb7 /dev/ublk-integrity/left
add --number 7 --name new
no_link left
[ "$(link new)" = /dev/ublkb7 ] || die 'no link'
remove

step 'a device whose daemon is dead can not be opened while sync waits for it: who is closing it is not to be seen, and loses nothing'
stands_in() { grep -q "$1" "/proc/$2/stack"; } # FUNCTION PID
sync_waits() { sync & syncing=$!; wait_for stands_in sync_bdevs $syncing; }
recovers() {
  ui recover -n "$id"
  wait $syncing
  [ "$(dd if="$disk" bs=4096 count=1 iflag=direct status=none | sha256sum)" = "$(sha256sum </run/cached)" ] || die 'a write is lost'
}
head -c 4096 <(yes unseen) >/run/cached
add
kill_daemon
dd if=/run/cached of="$disk" bs=4096 conv=notrunc status=none & writer=$!
wait_for stands_in bdev_release $writer
sync_waits
refused 5 ui del -n "$id"
grep -q "can't be opened, so nobody can tell who uses it" /run/err || die 'that is not said'
recovers
wait $writer
step 'the same below another device: the claim is seen at once'
linear upper "$disk" 8
head -c 4096 <(yes below) >/run/cached
kill_daemon
dd if=/run/cached of="$disk" bs=4096 conv=notrunc status=none
sync_waits
refused 5 timeout 60 "$ublk_integrity" del -n "$id"
grep -q 'below dm-' /run/err || die 'its user is not named'
recovers
unlinear upper
remove
check_closed

# Before Linux 7 that look is START_DEV's own: the process of a daemon that is killed then never ends.
case $(uname -r) in 6.*) exit 0;; esac
step 'a daemon that is killed while the kernel looks for partitions: nobody can open the device, and it ends all the same'
modprobe dm-delay
linear lower /dev/vda
data=/dev/mapper/lower
format
add
mark_block "$disk" 0 first-block
remove
at=$(($(where_is /dev/vda first-block) / 512)) sectors=$(blockdev --getsz /dev/vda)
id=7 disk=/dev/ublkb7
looks() { [ "$(awk '{print $1}' /sys/block/ublkb7/inflight 2>/dev/null || echo 0)" -gt 0 ]; }
# Its first block, where a table of partitions would be, is not to be had before the daemon is dead.
kill_in_look() {
  local pid
  table lower "0 $at linear /dev/vda 0
$at 8 delay /dev/vda $at 3600000 /dev/vda $at 0 /dev/vda $at 0
$((at + 8)) $((sectors - at - 8)) linear /dev/vda $((at + 8))"
  "$ublk_integrity" add --data $data --key-file $key --number 7 --name looked-at --foreground 2>/run/err & pid=$!
  wait_for looks
  kill -9 $pid
  table lower "0 $sectors linear /dev/vda 0"
  wait $pid || true
  [ "$(ui list --json | jq -c '.[].pid')" = null ] || die "list: $(ui list)"
}
within_a_minute() { timeout 60 "$ublk_integrity" "$@" || die "$1: exit code $?"; }
ends=('del -n 7')
[ -z "${FULL:-}" ] || ends+=('detach looked-at' 'del --force -n looked-at' 'del --all')
for end in "${ends[@]}"; do
  kill_in_look
  refused 4 ui status -n 7
  # shellcheck disable=SC2086 # words
  within_a_minute $end
  [ ! -e /dev/ublkc7 ] || die '/dev/ublkc7 is left'
  [ -z "$(find /run/ublk-integrity -name '7.*')" ] || die "left: $(ls /run/ublk-integrity)"
  [ "$(ui list --json)" = '[]' ] || die "list: $(ui list)"
done
kill_in_look
within_a_minute recover -n 7
[ "$(read_block "$disk" 0)" = ok ] || die 'its first block'
remove
check_closed
unlinear lower
