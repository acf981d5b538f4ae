#!/bin/bash
# swap - the guest swaps to the device, and a process thrashes it: nothing hangs, every page comes back
# vm: memory=512 disks=2G
. tests/vm/lib.sh
format
add
mkswap "$disk" >/dev/null
swapon "$disk"
step 'a process with more memory than there is'
python3 - <<'P'
import random, sys
pages = 125_000                         # 488 MiB
memory = bytearray(pages * 4096)
def mark(page, turn): memory[page * 4096:page * 4096 + 16] = f"{page:8}{turn:8}".encode()
for page in range(pages): mark(page, 0)
turns, looked = [0] * pages, 0
for _ in range(3000):
    start = random.randrange(pages - 64)
    for page in range(start, start + 64):
        if memory[page * 4096:page * 4096 + 16] != f"{page:8}{turns[page]:8}".encode():
            sys.exit(f"page {page} came back wrong")
        turns[page] += 1
        mark(page, turns[page])
        looked += 1
print(f"{looked} pages looked at and changed")
P
cat /proc/swaps
free -m
[ "$(counter writes)" -gt 100 ] || die 'nothing was swapped out'
[ "$(counter mismatches)" = 0 ] || die 'mismatches'
step 'a device that is swapped to is busy'
refused 5 ui del -n "$id"
swapoff "$disk"
remove
check_closed
