#!/bin/bash
# signatures - what a disk holds, at its end and in its partitions too, is not formatted over, and is gone when forced
. tests/vm/lib.sh
# Refused with these words, and the disk is as it was; forced, nobody finds anything but a volume.
refused_then_wiped() { # DISK WORD...
  local disk=$1 word before
  shift
  before=$(wipefs --no-act --parsable "$disk")
  [ -n "$before" ] || die "nothing on $disk to begin with"
  refused 5 ui format --data "$disk" --key-file $key
  for word; do grep -q -- "$word" /run/err || die "no word of $word"; done
  [ "$(wipefs --no-act --parsable "$disk")" = "$before" ] || die 'it is not as it was'
  ui format --data "$disk" --key-file $key --force | tee /run/out
  for word; do grep -q "^wiped .*$word" /run/out || die "$word is not said to be wiped"; done
  [ -z "$(wipefs --no-act --parsable "$disk")" ] || die "left: $(wipefs --no-act "$disk")"
  # Not what partition it is.
  [ -z "$(blkid -p -o value -s TYPE -s PTTYPE "$disk")" ] || die "left: $(blkid -p "$disk")"
  ui check --data "$disk" --key-file $key
  refused 5 ui format --data "$disk" --key-file $key
  ui format --data "$disk" --key-file $key --force >/dev/null
}
step 'partitions, one of them in use, then not'
wipefs -qa /dev/vdb
printf 'label: gpt\n,64M\n,64M\n' | sfdisk -q /dev/vdb
[ -b /dev/vdb2 ] || die 'no partitions'
mkfs.ext4 -qF /dev/vdb1
mkdir -p /mnt/t
mount /dev/vdb1 /mnt/t
refused 5 ui format --data /dev/vdb --key-file $key
umount /mnt/t
refused_then_wiped /dev/vdb 'gpt at 0x' 'PMBR at 0x'
[ ! -e /sys/block/vdb/vdb1 ] || die 'the kernel still knows the partitions'
step 'the second table of a disk whose first is gone'
printf 'label: gpt\n,64M\n' | sfdisk -q /dev/vdb
dd if=/dev/zero of=/dev/vdb bs=64K count=1 conv=notrunc,fsync status=none
refused_then_wiped /dev/vdb 'gpt at 0xf'
step 'a file system in a partition'
printf 'label: dos\n,64M\n' | sfdisk -q /dev/vdb
mkfs.xfs -qf /dev/vdb1 2>/dev/null || mkfs.ext4 -qF /dev/vdb1
refused_then_wiped /dev/vdb1 ' at 0x'
wipefs -qa /dev/vdb
step 'nothing is made in a partition while udev looks, which locks the whole disk; two of one disk are in nobody'\''s way'
printf 'label: dos\n,64M\n,64M\n' | sfdisk -q /dev/vdb
exec 7</dev/vdb
flock --shared 7
refused 5 ui format --data /dev/vdb1 --key-file $key --force
grep -q '/dev/vdb is in use' /run/err || die 'refused for another reason'
exec 7<&-
ui format --data /dev/vdb1 --meta /dev/vdb2 --key-file $key --force
ui check --data /dev/vdb1 --meta /dev/vdb2 --key-file $key
wipefs -qa /dev/vdb
step 'blocks of 512 bytes are told with what they cost'
wipefs -qa /dev/vdc
ui format --data /dev/vdc --key-file $key --force >/run/out
grep '^note .*512-byte blocks give 1[0-9.]* % to metadata' /run/out || die "$(cat /run/out)"
step 'a disk that takes no writes'
format
blockdev --setro $data
ui check --data $data --key-file $key
head -c 1M /dev/urandom >/run/content
refused 4 ui import --data $data --key-file $key --zero-rest /run/content
grep -q "$data is read-only" /run/err || die "$(cat /run/err)"
blockdev --setrw $data
step 'output that goes nowhere'
add
for command in list "status -n $disk" "dump --data $data"; do
  refused 8 bash -c "$ublk_integrity $command >/dev/full"
done
step 'a device by its path'
ui status -n "${disk#/dev/}" >/dev/null
ui del -n "$disk"
