#!/bin/bash
# users - a device below a loop device, device-mapper, swap, a mount or another volume is not deleted unasked; del -a ends the upper ones first
# vm: limit=200
. tests/vm/lib.sh
modprobe loop
in_use() { # WHAT
  refused 5 ui del -n "$id"
  grep -q "$1" /run/err || die "which does not name $1"
  [ "$(read_block "$disk" 5)" = ok ] || die 'and is gone all the same'
}
format
add
step 'a loop device'
loop=$(losetup --find --show "$disk")
in_use "below ${loop#/dev/}"
losetup -d "$loop"
step 'device-mapper, also on a part of it'
linear upper "$disk" 8
in_use 'below dm-'
unlinear upper
step 'swap'
mkswap -q "$disk" 2>/dev/null || mkswap "$disk" >/dev/null
swapon "$disk"
in_use 'used as swap'
swapoff "$disk"
step 'a mount, and one that only another mount namespace sees'
mkfs.ext4 -qF "$disk"
mkdir -p /mnt/t
mount "$disk" /mnt/t
in_use 'mounted on /mnt/t'
umount /mnt/t
# shellcheck disable=SC2016 # the inner shell's
unshare -m sh -c 'mount --make-rprivate / && mount "$0" /mnt/t && : >/run/mounted && exec sleep 600' "$disk" & hidden=$!
within 30 test -e /run/mounted
in_use 'out of our sight'
kill $hidden
wait $hidden || true
step 'a process'
exec 9<"$disk"
in_use "open in process $$"
exec 9<&-
step 'nobody any more'
remove
check_closed

step 'del -a: three volumes, each on the one below'
# Numbers against the order in which they must end.
add -n 1
lower=$disk
ui format --data "$lower" --key-file $key --force >/dev/null
middle=$(ui add --data "$lower" --key-file $key -n 2)
ui format --data "$middle" --key-file $key --force >/dev/null
ui add --data "$middle" --key-file $key -n 0 >/dev/null
ui format --data /dev/vdb --key-file $key --force >/dev/null
ui add --data /dev/vdb --key-file $key -n 5 >/dev/null
[ "$(ui list --json | jq length)" = 4 ] || die "$(ui list)"
id=1
in_use 'open in process'
ui del -a
[ "$(ui list --json)" = '[]' ] || die "$(ui list)"
check_closed
