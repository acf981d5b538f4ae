#!/bin/bash
# discard - discarded and zeroed ranges read as zeros, now and after opening again; neighbours stay
. tests/vm/lib.sh
format
add
mib=1048576
fill() { random "$1" | dd of="$disk" bs=1M seek="$2" oflag=direct iflag=fullblock conv=notrunc status=none; }
random() { head -c $(($1 * mib)) /dev/urandom; }
sums() { for at in "$@"; do dd if="$disk" bs=1M skip="$at" count=1 iflag=direct status=none | md5sum; done; }
zeros() { # FIRST BYTE, BYTES
  cmp -n "$2" -i "$1":0 "$disk" /dev/zero || die "no zeros at $1"
}

step 'random bytes on 64 MiB'
fill 64 0
before=$(sums 0 7 17 27 40)
step 'discard 8-16, write zeroes to 18-26, punch 28-32, and ragged ends'
blkdiscard -o $((8 * mib)) -l $((8 * mib)) "$disk"
blkdiscard -z -o $((18 * mib)) -l $((8 * mib)) "$disk"
fallocate -p -o $((28 * mib)) -l $((4 * mib)) "$disk"
blkdiscard -o $((50 * mib + 4096)) -l $((4096 * 3)) "$disk"
all_zero() {
  zeros $((8 * mib)) $((8 * mib))
  zeros $((18 * mib)) $((8 * mib))
  zeros $((28 * mib)) $((4 * mib))
  zeros $((50 * mib + 4096)) $((4096 * 3))
  [ "$(sums 0 7 17 27 40)" = "$before" ] || die 'a neighbour has changed'
}
all_zero
step 'the same after the volume was closed and opened'
remove
check_closed
add
all_zero
step 'and what is written there afterwards stays'
fill 1 10
after=$(sums 10)
remove
add
[ "$(sums 10)" = "$after" ] || die 'a write after a discard was lost'
zeros $((8 * mib)) $((2 * mib))
step 'the whole device'
blkdiscard "$disk"
zeros 0 $((64 * mib))
remove
step 'a device that does not take discards'
add --no-discard
[ "$(cat /sys/block/"${disk#/dev/}"/queue/discard_max_bytes)" = 0 ] || die 'it offers discard'
remove
