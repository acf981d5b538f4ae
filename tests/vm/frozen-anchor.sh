#!/bin/bash
# frozen-anchor - the disk of the anchor stands still while the guest swaps to the device: nothing hangs (a minute; ten with --full)
# vm: memory=512 disks=2G,64M hung=1200 long limit=1200:3600
. tests/vm/lib.sh
linear lower /dev/vdb
mkfs.ext4 -q -F /dev/mapper/lower
mkdir -p /mnt/stick
mount /dev/mapper/lower /mnt/stick
anchor=(--anchor file:/mnt/stick/t.anchor)
state() { timeout 60 "$ublk_integrity" status -n "$id" --json | jq -r .anchor.state; }
is_away() { [ "$(state)" != ok ]; }
is_told() { [ "$(state)" = ok ]; }

seconds=$((${FULL:+540} + 60))
format "${anchor[@]}"
add "${anchor[@]}" --anchor-mode interval:0.2 --anchor-grace 86400
mkswap "$disk" >/dev/null
swapon "$disk"
: >/run/frozen
start_load python3 tests/vm/thrash.py 100 /run/frozen
goes_on 2000
step "frozen for $seconds s"
suspend lower
until=$((SECONDS + seconds))
wait_for is_away
while [ $SECONDS -lt $until ]; do
  goes_on 500
  state
done
resume lower
wait_for is_told
goes_on
rm /run/frozen
wait "$load" || die 'what was swapped out'
[ "$(counter mismatches)" = 0 ] || die 'mismatches'
swapoff "$disk"
remove
check_closed "${anchor[@]}"
umount /mnt/stick
unlinear lower
