#!/bin/bash
# memory-pressure - 512 MiB of memory, writers that dirty far more: nothing hangs, nothing is lost
# vm: memory=512 disks=2G
. tests/vm/lib.sh
format
add
mkfs.ext4 -q "$disk"
mkdir -p /mnt/t
mount "$disk" /mnt/t
step 'two writers of 350 MiB each, and a reader'
writer() { head -c 350M <(yes "this is writer $1 speaking") >"/mnt/t/$1"; }
writers=()
for n in 1 2; do writer $n & writers+=($!); done
n=0
until gone "${writers[0]}" && gone "${writers[1]}"; do
  dd if="$disk" of=/dev/null bs=64k skip=$((n++ % 40 * 500)) count=4 iflag=direct status=none
done
echo "$n reads meanwhile"
for pid in "${writers[@]}"; do wait "$pid" || die 'a writer failed'; done
step 'on the disk'
sync
free -m
umount /mnt/t
mount "$disk" /mnt/t
step 'and the same when read again'
for n in 1 2; do cmp -n $((100 * 1048576)) "/mnt/t/$n" <(yes "this is writer $n speaking"); done
umount /mnt/t
[ "$(counter mismatches)" = 0 ] || die 'mismatches'
remove
