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

freeze_under_swap() { # MODE SECONDS
  local seconds=$2 flush='' until
  rm -f /mnt/stick/t.anchor
  format "${anchor[@]}"
  add "${anchor[@]}" --anchor-mode "$1" --anchor-grace 86400
  mkswap "$disk" >/dev/null
  swapon "$disk"
  : >/run/frozen
  start_load python3 tests/vm/thrash.py 100 /run/frozen
  goes_on 2000
  step "$1: frozen for $seconds s"
  suspend lower
  until=$((SECONDS + seconds))
  if [ "$1" = flush ]; then sync "$disk" & flush=$!; fi
  wait_for is_away
  while [ $SECONDS -lt $until ]; do
    goes_on 500
    state
  done
  [ -z "$flush" ] || ! gone "$flush" || die 'a flush was answered that the anchor does not cover'
  resume lower
  wait_for is_told
  [ -z "$flush" ] || wait "$flush" || die 'the flush has failed'
  goes_on
  rm /run/frozen
  wait "$load" || die 'what was swapped out'
  [ "$(counter mismatches)" = 0 ] || die 'mismatches'
  swapoff "$disk"
  remove
  check_closed "${anchor[@]}"
}
freeze_under_swap interval:0.2 $((${FULL:+540} + 60))
freeze_under_swap flush 60
umount /mnt/stick
unlinear lower
