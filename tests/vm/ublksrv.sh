#!/bin/bash
# ublksrv - `ublk add -t integrity` reaches it: a parent that follows that tool's protocol
. tests/vm/lib.sh
format
ln -s "$ublk_integrity" /run/ublk.integrity

# As that tool does: fds 0-2 closed, its own argv handed on, an eventfd that tells the device's number.
cat >/run/parent <<'P'
import os, struct, sys
number = os.eventfd(0, 0)
child = os.fork()
if child == 0:
    os.set_inheritable(number, True)
    for fd in 0, 1, 2:
        os.close(fd)
    os.execv("/run/ublk.integrity", sys.argv[1:] + ["--eventfd", str(number)])
os.set_blocking(number, True)
print(struct.unpack("Q", os.read(number, 8))[0])
P
step 'a device'
answer=$(timeout $patience python3 /run/parent ublk.integrity add -t integrity -n 4 -q 2 -d 64 --data $data --key-file $key)
[ "$answer" = 5 ] || die "the eventfd said $answer, not 4 + 1"
disk=/dev/ublkb4 id=4
[ -b $disk ] || die 'no device'
mark_block $disk 9 by-way-of-ublk
[ "$(read_block $disk 9)" = ok ] || die 'block 9'
pid=$(daemon)
for fd in 0 1 2; do readlink "/proc/$pid/fd/$fd"; done | grep -v '^/dev/null$' && die 'fds 0-2'
remove
step 'a failure'
answer=$(timeout $patience python3 /run/parent ublk.integrity add -t integrity --data /dev/nothing-here --key-file $key)
[ "$answer" = 18446744073709551614 ] || die "the eventfd said $answer"
step 'the tool'\''s other standard options, no number asked for'
answer=$(timeout $patience python3 /run/parent ublk.integrity add -t integrity -q 1 -d 32 -u 0 -g 0 -r 0 -i 0 --data $data --key-file $key)
id=$((answer - 1)) disk=/dev/ublkb$((answer - 1))
[ -b "$disk" ] || die "no $disk"
remove
