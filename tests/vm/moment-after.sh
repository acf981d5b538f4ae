#!/bin/bash
# moment-after - when a command has returned its device is free, each time (--full: a hundred times)
. tests/vm/lib.sh
# How often: a hundred times of a hundred in the long run.
times=${FULL:+25}
times=${times:-4}
echo content >/run/content
step 'format and import in turns'
for _ in $(seq $((times * 4))); do
  ui format --data /dev/vdb --size 16M --key-file $key --force >/dev/null
  ui import --zero-rest --data /dev/vdb --key-file $key /run/content
done
step 'check and umount'
mkfs.ext4 -qF /dev/vdc
mkdir -p /mnt/t
mount /dev/vdc /mnt/t
ui format --data /mnt/t/volume --create --size 16M --key-file $key
ui import --zero-rest --data /mnt/t/volume --key-file $key /run/content
umount /mnt/t
for _ in $(seq $((times * 2))); do
  mount /dev/vdc /mnt/t
  ui check --data /mnt/t/volume --key-file $key >/dev/null
  umount /mnt/t
done
step 'interrupted while it reads and writes'
for n in $(seq $((times * 4 / 5))); do
  mount /dev/vdc /mnt/t
  timeout -s INT "0.$((n % 10))5" "$ublk_integrity" import --force --zero-rest --data /mnt/t/volume --key-file $key <(head -c 12M /dev/urandom) || true
  umount /mnt/t
done
step 'del and umount'
data=/mnt/t/volume
for _ in $(seq 10); do
  mount /dev/vdc /mnt/t
  add 2>/dev/null
  dd if=/dev/zero of="$disk" bs=64k count=16 oflag=direct status=none
  remove
  umount /mnt/t
done
