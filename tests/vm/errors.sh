#!/bin/bash
# errors - the disk returns EIO for a while: told to the writer, and nothing acknowledged is lost
. tests/vm/lib.sh
linear lower /dev/vda
data=/dev/mapper/lower
sectors=$(blockdev --getsz /dev/vda)
good="0 $sectors linear /dev/vda 0"
# A volume that was latched can't be closed in good order, and del says so.
end() {
  if [ "$(ui status -n "$id" --json | jq .latched)" = null ]; then ui del -n "$id"
  else refused 4 ui del -n "$id"; fi
  [ ! -e "$disk" ] || die "$disk outlived del"
}
format
add
mark_block "$disk" 10 synced-before-the-errors
step 'every request to the disk fails'
table lower "0 $sectors error"
[ "$(read_block "$disk" 10)" = "$EIO" ] || die "a read of a disk that is away: $(read_block "$disk" 10)"
code=0
mark_block "$disk" 11 never-arrives || code=$?
[ $code != 0 ] || die 'a write that could not be done was acknowledged'
table lower "$good"
step 'the disk is back: reads go on; writes are latched off, or work'
[ "$(read_block "$disk" 10)" = ok ] || die "block 10: $(read_block "$disk" 10)"
grep -aq synced-before-the-errors /run/block || die 'block 10 has changed'
mark_block "$disk" 12 after-the-errors || echo 'writes are latched off'
ui status -n "$id"
end
step 'opened again'
add
[ "$(read_block "$disk" 10)" = ok ] || die "block 10: $(read_block "$disk" 10)"
[ "$(read_block "$disk" 11)" = ok ] || die "block 11: $(read_block "$disk" 11)"
mark_block "$disk" 12 written-after-opening-again
remove
check_closed

step 'a part of the disk fails under fio'
add
half=$((sectors / 2))
start_fio --rw=randrw --bs=4k --iodepth=16 --size=800M --continue_on_error=all
table lower "0 $half linear /dev/vda 0
$half $((sectors - half)) error"
wait_for has_failed
goes_on
table lower "$good"
goes_on
end_load || true
end
add
step 'every block reads, or was never written'
fio --name=r --filename="$disk" --ioengine=libaio --direct=1 --rw=read --bs=1M --iodepth=4 --output=/run/fio || { tail -n 20 /run/fio; die 'a read failed'; }
remove
check_closed
unlinear lower
