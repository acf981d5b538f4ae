#!/bin/bash
# tamper - a bit flipped on the backing disk is EILSEQ at exactly that block, through a file system too
. tests/vm/lib.sh
format
add
step 'mark blocks 7, 1000 and 20000'
for block in 6 7 8 999 1000 1001 20000; do mark_block "$disk" $block "block-$block-of-the-device"; done
remove
home=$(where_is $data block-1000-of-the-device)

step 'one bit of block 1000 flipped'
flip_bit $data $((home + 77))
add
[ "$(read_block "$disk" 1000)" = "$EILSEQ" ] || die "block 1000: $(read_block "$disk" 1000)"
for block in 6 7 8 999 1001 20000 5; do
  [ "$(read_block "$disk" $block)" = ok ] || die "block $block: $(read_block "$disk" $block)"
done
[ "$(counter mismatches)" -ge 1 ] || die 'status counted no mismatch'
step 'it is told: as an event, by a word of health, in the metrics'
told() { ui events --class mismatch | grep -q "$data: .*block 1000 does not match its tag"; }
wait_for told
refused 6 ui status -x
grep -q "^$disk: degraded: .* mismatches$" /run/out || die "$(cat /run/out)"
ui metrics | grep -q '^ublk_integrity_mismatches_total{.*} [1-9]' || die 'no metric has it'
step 'a read of many blocks, one of them bad, fails'
[ "$(read_block "$disk" 3 1M)" = "$EILSEQ" ] || die 'a large read over it'
step 'writing it anew heals it'
mark_block "$disk" 1000 block-1000-anew
[ "$(read_block "$disk" 1000)" = ok ] || die 'still bad after it was written'
remove
check_closed

step 'block 7 where block 8 belongs'
home7=$(where_is $data block-7-of-the-device)
dd if=$data of=$data bs=4096 skip=$((home7 / 4096)) seek=$((home7 / 4096 + 1)) count=1 conv=notrunc,fsync status=none
add
[ "$(read_block "$disk" 8)" = "$EILSEQ" ] || die 'block 7 was taken for block 8'
[ "$(read_block "$disk" 7)" = ok ] || die 'block 7 itself is bad'
remove
step 'check finds it, says where, and exits 6'
code=0
check_clean --json >/run/report || code=$?
cat /run/report
[ $code = 6 ] || die "check exited $code"

step 'a block changed under a file: EILSEQ from the file'
format
add
mkfs.ext4 -q "$disk"
mkdir -p /mnt/t
mount "$disk" /mnt/t
mark_block /mnt/t/file 0 first-of-the-file
mark_block /mnt/t/file 1 second-of-the-file
umount /mnt/t
remove
at=$(where_is $data second-of-the-file)
flip_bit $data $((at + 3))
add
mount "$disk" /mnt/t
[ "$(read_block /mnt/t/file 1)" = "$EILSEQ" ] || die "the file's second block: $(read_block /mnt/t/file 1)"
[ "$(read_block /mnt/t/file 0)" = ok ] || die "the file's first block"
umount /mnt/t
remove
