#!/bin/bash
# ownership - a device that is not ours is never touched, no local user can make a dead daemon look alive or lay traps for root,
# and a disk that is served is ours alone while udev may look at it
# vm: limit=200
. tests/vm/lib.sh
as_nobody() { setpriv --reuid=65534 --regid=65534 --clear-groups -- "$@"; }
libublk=/run/ublksrvd

step 'traps in the folder of libublk'
mkdir -p $libublk
chmod 777 $libublk
echo precious >/run/precious
as_nobody ln -s /run/precious $libublk/0000.json
format
add
[ "$disk" = /dev/ublkb0 ] || die "$disk: the trap lay elsewhere"
[ "$(cat /run/precious)" = precious ] || die 'written through the link'
[ "$(stat -c '%a %u' $libublk)" = '755 0' ] || die "$libublk is $(stat -c '%a %u' $libublk)"
[ "$(stat -c %F $libublk/0000.json)" = 'regular file' ] || die 'the link is still there'

step 'the lock that says alive is not for all'
state=/run/ublk-integrity/$id
[ "$(stat -c %a "$state.lock")" = 600 ] || die "mode $(stat -c %a "$state.lock")"
if as_nobody flock -n "$state.lock" true 2>/dev/null; then die 'anybody can lock it'; fi
[ "$(as_nobody "$ublk_integrity" list --json | jq ".[0].pid")" = "$(daemon)" ] || die 'list does not work for all'
pid=$(daemon)
as_nobody flock "$state.json" sh -c ': >/tmp/taken; exec sleep 600' & taker=$!
within 30 test -e /tmp/taken
kill -9 "$pid"
within 20 gone "$pid"
dead() { [ "$(ui list --json | jq '.[0].pid')" = null ]; }
within 20 dead
ui list | grep -q 'daemon dead' || die "$(ui list)"
refused 4 ui status -n "$id"
timeout 60 "$ublk_integrity" recover -n "$id"
[ "$(daemon)" != "$pid" ] || die 'no new daemon'
remove
pkill -P $taker 2>/dev/null || true
kill $taker 2>/dev/null || true
wait $taker || true
rm /tmp/taken

step 'the disk of a volume that is served: udev may look, and nobody of ours may have it'
add
flock --shared --nonblock $data true || die 'udev would put off all that it has to do with the disk'
if flock --exclusive --nonblock $data true; then die 'a program of before could have it'; fi
refused 5 check_clean
refused 5 format
# Another name in the file system, as a container has: there the kernel's claim holds.
mknod /dev/other-node b $((0x$(stat -c %t $data))) $((0x$(stat -c %T $data)))
refused 5 ui import --data /dev/other-node --key-file $key /dev/zero
kill_daemon
# What it had is free when it is gone, whoever looks.
wait_for flock --exclusive --nonblock $data true
flock --shared $data sh -c ': >/run/looks; exec sleep 600' & looks=$!
within 30 test -e /run/looks
code=0
timeout 60 "$ublk_integrity" recover -n "$id" 2>/run/err || code=$?
cat /run/err
[ $code = 5 ] || die "exit code $code: a reader of before was not seen"
pkill -P $looks
wait $looks || true
ui recover -n "$id"
if flock --exclusive --nonblock $data true; then die 'the next daemon has no lock'; fi
remove
rm /dev/other-node /run/looks

step 'a number that another program has by now'
add -n 7
cp /run/ublk-integrity/7.json /run/ours.json
remove
# The other one: made by the same driver, known to its maker alone.
ui format --data /dev/vdb --key-file $key --force >/dev/null
ui add --data /dev/vdb --key-file $key -n 7 >/dev/null
state=/run/ublk-integrity/7 id=7
pid=$(daemon)
mkdir /run/theirs
mv "$state".* $libublk/0007.json /run/theirs/
cp /run/ours.json "$state.json"
for command in 'del -n 7' 'del -n 7 --force' 'del -a' 'del -a --force'; do
  cp /run/ours.json "$state.json"
  # shellcheck disable=SC2086 # words
  refused 4 ui $command
  [ -b /dev/ublkb7 ] && ! gone "$pid" || die "$command took it away"
done
cp /run/ours.json "$state.json"
before=$(head -c 1M $data | sha256sum)
refused 4 ui recover -n 7
grep -q "another program" /run/err || die 'refused for another reason'
[ "$(head -c 1M $data | sha256sum)" = "$before" ] || die 'our volume was opened'
rm -f "$state".*
mv /run/theirs/7.* /run/ublk-integrity/
mv /run/theirs/0007.json $libublk/
[ "$(read_block /dev/ublkb7 1)" = ok ] || die 'it serves no more'
ui del -n 7
[ ! -e /dev/ublkb7 ] || die 'it is left'
