#!/bin/bash
# swap - the guest swaps to the device, and a process thrashes it: nothing hangs, every page comes back
# vm: memory=512 disks=2G
. tests/vm/lib.sh
format
add
mkswap "$disk" >/dev/null
swapon "$disk"
step 'a process with more memory than there is'
python3 tests/vm/thrash.py $((${FULL:+2000} + 1000))
cat /proc/swaps
free -m
[ "$(counter writes)" -gt 100 ] || die 'nothing was swapped out'
[ "$(counter mismatches)" = 0 ] || die 'mismatches'
step 'a device that is swapped to is busy'
refused 5 ui del -n "$id"
swapoff "$disk"
remove
check_closed
