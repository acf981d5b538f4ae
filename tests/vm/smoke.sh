#!/bin/bash
# smoke - a volume's short life: a file system, a bit flipped, a stop and a start
# vm: on=newest,6.12
. tests/vm/lib.sh
mkdir -p /mnt/t
format
add -q 2
step 'a file system'
mkfs.ext4 -q "$disk"
mount "$disk" /mnt/t
cp -a /usr/include/linux/b*.h /mnt/t/
(cd /mnt/t && sha256sum ./*.h) >/run/checksums
mark_block /mnt/t/marked 0 a-block-that-will-be-forged
umount /mnt/t
remove
step 'a bit flipped'
flip_bit $data "$(where_is $data a-block-that-will-be-forged)"
add
mount "$disk" /mnt/t
(cd /mnt/t && sha256sum --quiet -c /run/checksums)
[ "$(read_block /mnt/t/marked 0)" = "$EILSEQ" ] || die "the forged block: $(read_block /mnt/t/marked 0)"
umount /mnt/t
[ "$(counter mismatches)" -ge 1 ] || die 'not counted'
remove
