#!/bin/bash
# sick - sectors that can't be read when a volume is opened: refused, or undecided, never something older; and the way out
# vm: limit=900
. tests/vm/lib.sh
linear lower /dev/vda
data=/dev/mapper/lower
sectors=$(blockdev --getsz /dev/vda)
good="0 $sectors linear /dev/vda 0"
# The disk, but for eight sectors from this one on.
bad_at() { # SECTOR
  table lower "0 $1 linear /dev/vda 0
$1 8 error
$(($1 + 8)) $((sectors - $1 - 8)) linear /dev/vda $(($1 + 8))"
}
# The superblock's numbers: u64_at OFFSET
u64_at() { dd if=/dev/vda bs=4096 count=1 iflag=direct status=none | od -An -tu8 -j"$1" -N8 | tr -d ' '; }
# All that the volumes of this test have written to.
state() { dd if=/dev/vda bs=1M count=96 iflag=direct status=none | sha256sum; }
# The daemon dies and leaves a log; its device goes.
crash() {
  local pid
  pid=$(daemon)
  kill -9 "$pid"
  wait_for gone "$pid"
  ui del -n "$id" --force
}

step 'the live log cannot be read'
format
add
mark_block "$disk" 4 before-the-last-checkpoint
mark_block "$disk" 5 before-the-last-checkpoint
remove
add --write-back 0
mark_block "$disk" 5 flushed-before-the-crash
mark_block "$disk" 6 never-written-before
crash
begin=$(u64_at 136)
log_size=$(u64_at 48)
bad_at $((2048 + begin % log_size / 512))
before=$(state)
refused 4 ui check --data $data --key-file $key
refused 4 ui add --data $data --key-file $key
refused 4 ui export --data $data --key-file $key /run/export
[ ! -e /run/export ] || die 'a stale image'
grep -q -- --rescue /run/err || die 'no word of the way out'
step 'rescue'
code=0
ui export --data $data --key-file $key --rescue /run/export || code=$?
[ $code = 6 ] || die "exit code $code"
grep -q '^[0-9]* [0-9]*$' /run/export.map || die "the map: $(cat /run/export.map)"
[ "$(read_block /run/export.may-be-older 4)" = ok ] || die 'no block 4'
grep -aq before-the-last-checkpoint /run/block || die 'block 4 is not what it was'
# The medium holds the newer version, which nothing that can be read vouches for.
[ "$(read_block /run/export.may-be-older 5)" = ok ] && ! grep -aq checkpoint /run/block || die 'block 5'
[ "$(state)" = "$before" ] || die 'something was written'
table lower "$good"
step 'the log can be read again: everything is there'
check_clean
ui export --data $data --key-file $key /run/whole
[ "$(read_block /run/whole 5)" = ok ] && grep -aq flushed-before-the-crash /run/block || die 'block 5'
[ "$(read_block /run/whole 6)" = ok ] && grep -aq never-written-before /run/block || die 'block 6'
rm -f /run/export.* /run/whole

step 'a block that cannot be read while its newest version is in question'
format
add
mark_block "$disk" 7 checkpointed
echo 3 >/proc/sys/vm/drop_caches
remove
at=$(($(where_is /dev/vda checkpointed) / 512))
add --write-back 0
# Not flushed.
head -c 4096 <(yes newest) | dd of="$disk" bs=4096 seek=7 oflag=direct iflag=fullblock conv=notrunc status=none
crash
bad_at "$at"
before=$(state)
ui check --data $data --key-file $key && die 'a verdict without the block'
add 2>/run/warnings
cat /run/warnings
grep -q 'read-only' /run/warnings || die 'no warning'
[ "$(blockdev --getro "$disk")" = 1 ] || die 'the device takes writes'
[ "$(read_block "$disk" 7)" = "$EIO" ] || die "block 7: $(read_block "$disk" 7)"
[ "$(state)" = "$before" ] || die 'something was decided'
table lower "$good"
[ "$(read_block "$disk" 7)" = ok ] && grep -aq newest /run/block || die "block 7: $(head -c 20 /run/block)"
ui del -n "$id" || true
[ ! -e "$disk" ] || die "$disk outlived del"
add
[ "$(blockdev --getro "$disk")" = 0 ] || die 'the device takes no writes'
[ "$(read_block "$disk" 7)" = ok ] && grep -aq newest /run/block || die "block 7: $(head -c 20 /run/block)"
mark_block "$disk" 8 writes-go-on
remove
check_closed

step 'all blocks fail, and the superblock can be read: the disk is there'
add --write-back 0
seq -f %04095g 100 300 | dd of="$disk" bs=4096 seek=100 oflag=direct iflag=fullblock status=none
crash
from=$((at - 7 * 8)) # where block 0 lies
table lower "0 $from linear /dev/vda 0
$from $((sectors - from)) error"
SECONDS=0
code=0
check_clean 2>/run/err || code=$?
[ $code = 6 ] || { cat /run/err; die "exit code $code"; }
[ $SECONDS -lt 60 ] || die "took $SECONDS s"
step 'all of it fails: the disk is away'
table lower "0 $sectors error"
SECONDS=0
refused 4 ui check --data $data --key-file $key
[ $SECONDS -lt 30 ] || die "took $SECONDS s"
grep -q "$data" /run/err || die 'which disk?'
table lower "$good"
check_clean

step 'a disk that is made read-only makes a read-only device'
blockdev --setro $data
add 2>/run/warnings
grep -q 'read-only' /run/warnings || die 'no warning'
[ "$(blockdev --getro "$disk")" = 1 ] || die 'the device takes writes'
[ "$(read_block "$disk" 7)" = ok ] || die 'block 7'
remove
blockdev --setrw $data
unlinear lower
