#!/bin/bash
# separate-meta - metadata on a device of its own; the wrong or a swapped one is refused
. tests/vm/lib.sh
meta=(--meta /dev/vdb)
ui format --data $data "${meta[@]}" --key-file $key --force
add "${meta[@]}"
mkfs.ext4 -q "$disk"
mkdir -p /mnt/t
mount "$disk" /mnt/t
plant /mnt/t
umount /mnt/t
remove
check_closed "${meta[@]}"
add "${meta[@]}"
mount "$disk" /mnt/t
same_tree /mnt/t
umount /mnt/t
step 'the meta device is locked too'
refused 5 ui format --data /dev/vdb --key-file $key --force
remove
step 'the meta device forgotten, or one of another volume'
refused 4 ui add --data $data --key-file $key
refused 4 ui add --data $data --meta /dev/vdc --key-file $key
truncate -s 256M /run/data2 /run/meta2
ui format --data /run/data2 --meta /run/meta2 --key-file $key
refused 4 ui add --data $data --meta /run/meta2 --key-file $key
step '512-byte blocks on a disk that has them'
data=/dev/vdc
format --log-size 4M
add
[ "$(blockdev --getss "$disk")" = 512 ] || die "block size $(blockdev --getss "$disk")"
file_system_size=$(blockdev --getsize64 "$disk")
[ "$file_system_size" -gt $((440 * 1048576)) ] || die "only $file_system_size bytes"
mkfs.ext4 -q "$disk"
mount "$disk" /mnt/t
plant /mnt/t
umount /mnt/t
remove
check_closed
add
mount "$disk" /mnt/t
same_tree /mnt/t
umount /mnt/t
remove
