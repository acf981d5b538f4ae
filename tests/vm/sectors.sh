#!/bin/bash
# sectors - a disk of 4096-byte sectors: finer volumes are neither made nor opened there, others work
# vm: disks=256M:4096:4096,128M:512,64M:512
. tests/vm/lib.sh
fine=/dev/vdb fine_meta=/dev/vdc
[ "$(blockdev --getss $data) $(blockdev --getss $fine)" = '4096 512' ] || die 'not the disks that were asked for'
step 'not made'
refused 1 ui format --data $data --key-file $key --block-size 512
grep -q ' 512 .*/dev/vda.* 4096 ' /run/err || die 'without path and numbers'
step 'not opened, where the image of a finer disk was put there'
ui format --data $fine --key-file $key --block-size 512
head -c 1M /dev/urandom >/run/content
ui import --zero-rest --data $fine --key-file $key /run/content
dd if=$fine of=$data bs=1M conv=fsync status=none
before=$(sha256sum <$data)
refused 4 ui add --data $data --key-file $key
grep -q ' 512 .*/dev/vda.* 4096 ' /run/err || die 'without path and numbers'
refused 4 ui check --data $data --key-file $key
refused 4 ui import --data $data --key-file $key /run/content
[ "$(sha256sum <$data)" = "$before" ] || die 'something was written'
step 'nor metadata that was put there'
ui format --data $fine --meta $fine_meta --key-file $key --block-size 512 --force
ui import --zero-rest --data $fine --meta $fine_meta --key-file $key /run/content
dd if=$fine_meta of=$data bs=1M conv=fsync status=none
refused 4 ui add --data $fine --meta $data --key-file $key
grep -q ' 512 .*/dev/vda.* 4096 ' /run/err || die 'without path and numbers'
refused 4 ui check --data $fine --meta $data --key-file $key
step 'a file on a file system there'
mkfs.ext4 -qF $data
mkdir -p /mnt/t
mount $data /mnt/t
refused 1 ui format --data /mnt/t/volume --create --size 16M --key-file $key --block-size 512
ui format --data /mnt/t/volume --create --size 16M --key-file $key
ui check --data /mnt/t/volume --key-file $key
umount /mnt/t
step 'whole sectors work'
wipefs -qa $data
format
add
mkfs.ext4 -q "$disk"
remove
check_closed
