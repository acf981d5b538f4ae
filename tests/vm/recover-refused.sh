#!/bin/bash
# recover-refused - a recover that can't be done leaves the device, and the requests in it, for one that can
. tests/vm/lib.sh
format
add
mark_block "$disk" 5 before-the-daemon-died
# Superblocks, and the first log record, which `format` wipes too.
head -c 2M $data >/run/first-mib
kill_daemon
step 'a request waits'
mark_block "$disk" 6 written-while-nobody-served & waiting=$!
# (The kernel does not count it as under way.)
waits() { # PROGRAM: it has the device open, and waits in the kernel
  local pid
  pid=$(pgrep -nx "$1") && find "/proc/$pid/fd" -lname "$disk" | grep -q . && grep -q '^State:.D' "/proc/$pid/status"
}
wait_for waits dd
step 'another volume lies there by now'
ui format --data $data --key-file $key --force >/dev/null
refused 4 ui recover -n "$id"
head -c 2M /run/first-mib | dd of=$data bs=1M conv=notrunc,fsync iflag=fullblock status=none
step 'the wrong key'
refused 2 ui recover -n "$id" --key-file $another_key
step 'what fails after the volume was opened'
rm -f "/run/ublk-integrity/$id.sock"
mkdir "/run/ublk-integrity/$id.sock"
if ui recover -n "$id"; then die 'recovered without a control socket'; fi
rmdir "/run/ublk-integrity/$id.sock"
gone $waiting && die 'the waiting request has ended'
step 'and one that can'
ui recover -n "$id"
wait $waiting || die 'the waiting request failed'
[ "$(read_block "$disk" 5)" = ok ] && [ "$(read_block "$disk" 6)" = ok ] || die 'blocks 5 and 6'
grep -aq written-while-nobody-served /run/block || die 'the waiting write is not there'
remove

step 'a device that would lie on itself, or on one that lies on it'
add
state=/run/ublk-integrity/$id.json
ui format --data "$disk" --key-file $key >/dev/null
upper=$(ui add --data "$disk" --key-file $key)
kill_daemon
cp "$state" /run/own.json
for below in "$disk" "$upper"; do
  jq --arg data "$below" '.data = $data' /run/own.json >"$state"
  refused 4 ui recover -n "$id"
  grep -q 'itself' /run/err || die "refused for another reason than that it lies on $below"
done
cp /run/own.json "$state"
ui recover -n "$id"
ui del -n "${upper#/dev/ublkb}"
remove

step 'a device deleted behind our back, whose number is another program'\''s: nothing of it is touched'
add --no-recovery
kill_daemon
wait_for test ! -e "$disk"
"$ublk_integrity" del -n "$id" || true
ui format --data /dev/vdb --key-file $key --force >/dev/null
state=/run/ublk-integrity/$id.json
add
cp "$state" /run/own.json
jq '.mark = "1234567890abcdef"' /run/own.json >"$state"
refused 4 ui del -n "$id"
[ -b "$disk" ] || die 'the device is gone'
cp /run/own.json "$state"
remove
