#!/bin/bash
# tamper-running - an old block put back under a running volume is found; zero and fix do what they say
. tests/vm/lib.sh
format
add --on-mismatch fail
mark_block "$disk" 100 an-old-version
sync "$disk"
at=$(where_is $data an-old-version)
home=$((at / 4096))
dd if=$data of=/run/old bs=4096 skip=$home count=1 iflag=direct status=none
mark_block "$disk" 100 a-new-version
# Who reads it waits until it is in place.
[ "$(read_block "$disk" 100)" = ok ]
step 'the old version, put back'
dd if=/run/old of=$data bs=4096 seek=$home count=1 oflag=direct conv=notrunc status=none
[ "$(read_block "$disk" 100)" = "$EILSEQ" ] || die 'an old version was served'
remove

step '--on-mismatch zero: zeros instead of an error, and counted'
add --on-mismatch zero
[ "$(counter on_mismatch)" = '"zero"' ] || die 'status does not tell'
[ "$(read_block "$disk" 100)" = ok ] || die 'an error all the same'
cmp -n 4096 /run/block /dev/zero
[ "$(counter mismatches)" -ge 1 ] || die 'not counted'
remove
add
[ "$(read_block "$disk" 100)" = "$EILSEQ" ] || die 'zero changed the disk'
remove

step '--on-mismatch fix: what is there is accepted, with a warning, and signed'
add --on-mismatch fix 2>/run/warning
cat /run/warning
[ -s /run/warning ] || die 'no warning'
[ "$(counter on_mismatch)" = '"fix"' ] || die 'status does not tell'
[ "$(read_block "$disk" 100)" = ok ] || die 'not accepted'
cmp /run/block /run/old
[ "$(counter mismatches)" -ge 1 ] || die 'not counted'
remove
add
[ "$(read_block "$disk" 100)" = ok ] || die 'not signed'
remove
check_closed
