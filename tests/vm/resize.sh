#!/bin/bash
# resize - a volume grows: under a mounted file system and fio --verify, not in use, and after its daemon was killed; an older kernel is told of
# vm: cpus=2:4
. tests/vm/lib.sh
linear lower /dev/vda 320
data=/dev/mapper/lower meta=(--meta /dev/vdb)
larger() { table lower "0 $(($1 * 2048)) linear /dev/vda 0"; } # MIB
resize_offline() { ui resize --data $data "${meta[@]}" --key-file $key; }
bytes() { blockdev --getsize64 "$disk"; }
# The blocks of a data device of so many MiB, without its first.
is_of() { [ "$(bytes)" = $((($1 - 1) << 20)) ] || die "$disk has $(bytes) bytes"; } # MIB
dump_says() { ui dump --data $data "${meta[@]}" | grep -q "$1" || die "no '$1': $(ui dump --data $data "${meta[@]}")"; }
live=$(python3 -c 'import os, re; print(int(tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) >= (6, 16)))')
mkdir -p /mnt/t

format "${meta[@]}"
dump_says 'can grow to   4.98 GiB' # 16 times its size: the metadata device has room for it
add "${meta[@]}"
is_of 320
step 'what can not be'
refused 5 resize_offline
if [ "$live" = 0 ]; then
  pid=$(daemon)
  larger 480
  refused 4 ui resize -n "$id"
  grep -q "Linux 6.16.*nothing was done" /run/err || die 'it is not said why'
  [ "$(daemon)" = "$pid" ] || die 'another daemon'
  is_of 320
  larger 320
else
  refused 1 ui resize -n "$id" --size 64M
  refused 1 ui resize -n "$id" --size 1T
  refused 4 ui resize -n "$id" --size 1G
  ui resize -n "$id" | grep 'as before'
fi
remove

grow_mounted() { # MAKE GROW CHECK
  larger 320
  format "${meta[@]}"
  add "${meta[@]}"
  step "$1, under fio --verify"
  $1 "$disk"
  mount "$disk" /mnt/t
  start_load command fio --name=load --directory=/mnt/t --ioengine=libaio --time_based --runtime=1d --trigger-file=/run/end \
    --aux-path=/run --output=/run/fio --direct=1 --rw=randrw --bsrange=4k-64k --iodepth=8 --numjobs=2 --size=24M \
    --verify=crc32c --verify_fatal=1 --verify_state_save=0 --verify_backlog=64 --fsync=16
  goes_on
  before=$(df --output=size -B1 /mnt/t | tail -n 1)
  for size in 480 960; do
    larger $size
    pid=$(daemon)
    goes_on 100
    ui resize -n "$id" --json >/run/grown
    jq -e ".path == \"$disk\" and .size_before < .size and .size == $(((size - 1) << 20)) and .waited_seconds > 0" /run/grown
    [ "$(daemon)" != "$pid" ] || die 'no new daemon'
    is_of $size
    $2
    goes_on
  done
  [ "$(df --output=size -B1 /mnt/t | tail -n 1)" -gt $((2 * before)) ] || die 'the file system has not grown'
  end_fio
  step 'what is new holds data'
  head -c "$((${FULL:+400} + 100))M" /dev/zero | tr '\0' 'x' >/mnt/t/new
  cksum </mnt/t/new >/run/cksum
  umount /mnt/t
  $3 "$disk"
  [ "$(counter mismatches)" = 0 ] || die 'mismatches'
  remove
  check_closed "${meta[@]}"
  add "${meta[@]}"
  is_of 960
  mount "$disk" /mnt/t
  cksum </mnt/t/new | cmp - /run/cksum || die 'the file has changed'
  umount /mnt/t
  remove
}
if [ "$live" = 1 ]; then
  resize_ext4() { resize2fs "$disk"; }
  grow_mounted 'mkfs.ext4 -q' resize_ext4 'e2fsck -fn'
  resize_xfs() { xfs_growfs /mnt/t >/dev/null; }
  # The volume does the same again: with --full.
  [ -z "${FULL:-}" ] || grow_mounted 'mkfs.xfs -qf' resize_xfs 'xfs_repair -n'
fi

step 'not in use'
larger 320
format "${meta[@]}"
add "${meta[@]}"
mkfs.ext4 -q "$disk"
mount "$disk" /mnt/t
plant /mnt/t
umount /mnt/t
remove
larger 480
resize_offline | tee /run/line
grep -q '319.00 MiB → 479.00 MiB' /run/line || die 'it says something else'
check_closed "${meta[@]}"
add "${meta[@]}"
is_of 480
[ "$(dd if="$disk" bs=1M skip=319 status=none | tr -d '\0' | wc -c)" = 0 ] || die 'what is new is not zeros'
e2fsck -fp "$disk"
resize2fs "$disk"
mount "$disk" /mnt/t
same_tree /mnt/t

step 'the daemon is killed, the volume larger than the device that waits: as between superblock and kernel'
sync
kill -9 "$(daemon)"
larger 960
wait_for resize_offline
code=0
ui recover -n "$id" 2>/run/err || code=$?
sed 's/^/    | /' /run/err
[ $code = 0 ] || die "recover: $code"
if [ "$live" = 1 ]; then
  is_of 960
  resize2fs "$disk"
else
  grep -q 'keeps its .*Linux 6.16' /run/err || die 'it is not said'
  is_of 480
fi
same_tree /mnt/t
umount /mnt/t
remove
add "${meta[@]}"
is_of 960
mount "$disk" /mnt/t
same_tree /mnt/t
umount /mnt/t
e2fsck -fn "$disk"
remove
unlinear lower
