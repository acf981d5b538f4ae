#!/bin/bash
# md-raid - RAID1 and RAID5 of md heal what rots in volumes below them; what rots below a volume on md; what md has to be told, and its traps
# vm: limit=1200
. tests/vm/lib.sh
modprobe -a raid1 raid456 loop
modprobe nbd nbds_max=3 max_part=0
export MDADM_NO_UDEV=1
echo 1000000 >/proc/sys/dev/raid/speed_limit_min
md=/dev/md0 sys=/sys/block/md0/md

make() { # OPTION... MEMBER...
  mdadm --create $md --run --homehost=any --metadata=1.2 "$@" 2>/run/mdadm || { cat /run/mdadm; die 'no array'; }
  wait_for in_sync
}
in_sync() { [ "$(cat $sys/sync_action $sys/degraded | paste -sd' ')" = 'idle 0' ] && [ "$(cat $sys/resync_start)" = none ]; }
end() { # MEMBER...
  mdadm --quiet --stop $md
  mdadm --quiet --zero-superblock "$@"
}
idle() { [ "$(cat $sys/sync_action)" = idle ]; }
action() { echo "$1" >$sys/sync_action; wait_for idle; } # check or repair
of() { cat "$sys/dev-${1#/dev/}/$2"; }                   # MEMBER ATTRIBUTE
is_faulty() { [[ $(of "$1" state) = *faulty* ]]; }
# A mirror reads from the others from now on; with a - behind it from this one, too.
avoid() { echo "${2:-}writemostly" >"$sys/dev-${1#/dev/}/state"; }
# 4 MiB that are known, and begin with a mark of their own.
blocks=1024 mark=
fill() { # DEVICE
  mark=filled-at-$SECONDS
  { head -c 4096 <(yes "$mark"); head -c $(((blocks - 1) * 4096)) /dev/urandom; } >/run/content
  dd if=/run/content of="$1" bs=1M oflag=direct conv=fsync status=none
}
same() { # DEVICE [BYTES AT ONCE]
  dd if="$1" bs="${2:-1M}" count=$((blocks * 4096)) iflag=direct,count_bytes status=none | cmp - /run/content || die "$1 reads as something else"
}
# Makes one byte in each of so many blocks another one: rot FILE OFFSET BLOCKS.
rot() {
  python3 - "$@" <<'P'
import sys
name, at, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with open(name, "r+b", buffering=0) as disk:
    for block in range(count):
        place = at + block * 4096
        disk.seek(place)
        content = bytearray(disk.read(4096))
        content[1000] ^= 1
        disk.seek(place)
        disk.write(content)
P
  sync "$1"
}

# --- md over volumes -------------------------------------------------------------------------------
members=() ids=()
for leg in 0 1 2; do
  linear "leg$leg" /dev/vda 64 $((64 * leg))
  data=/dev/mapper/leg$leg
  format --size 24M
  add
  members+=("$disk") ids+=("$id")
done
disk_of() { echo "/dev/mapper/leg$1"; }
scrub() { ui scrub -n "${ids[$1]}" --wait "${@:2}"; }
# Who reads them waits until they are in place.
placed() { local member; for member in "${members[@]}"; do dd if="$member" of=/dev/null bs=1M iflag=direct status=none; done; }

step 'RAID1 of two volumes, as md is by default: a member with 40 bad blocks is put out'
# Volumes that were just made read as zeros: they are the same.
make --level=1 --raid-devices=2 --bitmap=internal --assume-clean "${members[@]:0:2}"
action check
[ "$(cat $sys/mismatch_cnt)" = 0 ] || die 'new volumes differ'
[ "$(cat $sys/max_read_errors)" = 20 ] || die 'md counts otherwise by now'
fill $md
placed
at=$(where_is "$(disk_of 0)" "$mark")
rot "$(disk_of 0)" "$at" 40
avoid "${members[1]}"
same $md 4096
is_faulty "${members[0]}" || die 'it is still there'
refused 6 ui scrub -n "${ids[0]}" --wait
end "${members[@]:0:2}"

step 'with what the udev rule sets it stays, and is healed'
unset MDADM_NO_UDEV
if [ -x /lib/systemd/systemd-udevd ]; then
  mkdir -p /run/udev/rules.d
  sed "s|/usr/bin/ublk-integrity|$ublk_integrity|" dist/udev/61-ublk-integrity.rules >/run/udev/rules.d/61-ublk-integrity.rules
  /lib/systemd/systemd-udevd >/run/udevd 2>&1 & udevd=$!
  wait_for test -S /run/udev/control
else udevd=''; fi
# The damaged one comes second: it is written anew.
make --level=1 --raid-devices=2 --bitmap=internal "${members[1]}" "${members[0]}"
raised() { [ "$(cat $sys/max_read_errors)" = 100000 ]; }
if [ -n "$udevd" ]; then
  wait_for raised
  udevadm settle --timeout=120
  kill "$udevd"
  wait "$udevd" || true
  rm -rf /run/udev
else
  echo 'no udev here: its rule is not tried'
  echo 100000 >$sys/max_read_errors
fi
export MDADM_NO_UDEV=1
scrub 0
fill $md
placed
rot "$(disk_of 0)" "$at" 40
avoid "${members[1]}"
same $md 4096
! is_faulty "${members[0]}" || die 'it is put out'
[ "$(of "${members[0]}" errors)" -gt 0 ] || die 'md has corrected nothing'
id=${ids[0]}
[ "$(counter mismatches)" -ge 40 ] || die 'nothing was noticed'
scrub 0
scrub 1
step 'check heals what nobody reads, on both, and counts none of it'
echo 20 >$sys/max_read_errors
rot "$(disk_of 0)" "$at" 30
rot "$(disk_of 1)" $((at + (2 << 20))) 30
action check
! is_faulty "${members[0]}" && ! is_faulty "${members[1]}" || die 'one is put out'
scrub 0
scrub 1
step 'a scrub heals one from the other, and md hears nothing'
corrected=$(of "${members[0]}" errors)
# Somebody has the other one's older content in the page cache, which md goes past.
cat "${members[1]}" >/dev/null
fill $md
placed
rot "$(disk_of 0)" "$at" 30
scrub 0 --repair-from "${members[1]}" >/run/out
grep -q "^healed: blocks .* from ${members[1]}$" /run/out || { cat /run/out; die 'it is not healed'; }
ui events --class healed | grep -q ': healed from a replica: blocks [0-9]*-[0-9]*$' || die 'they are not told as a run'
[ "$(of "${members[0]}" errors)" = "$corrected" ] || die 'md has heard of it'
same $md
step 'blocks of both within 512 KiB: not every kernel goes on with a check there'
rot "$(disk_of 0)" "$at" 10
rot "$(disk_of 1)" $((at + 50 * 4096)) 10
action check
scrub 0 --repair-from "${members[1]}"
scrub 1 --repair-from "${members[0]}"
action check
same $md
end "${members[@]:0:2}"

step 'RAID5 of three volumes, without the write hole'
make --level=5 --raid-devices=3 --chunk=64 --consistency-policy=ppl "${members[@]}"
[ "$(cat $sys/consistency_policy)" = ppl ]
fill $md
placed
at=$(where_is "$(disk_of 0)" "$mark")
rot "$(disk_of 0)" "$at" 40
same $md 4096
! is_faulty "${members[0]}" || die 'it is put out'
# What is parity there nobody has read.
action check
for leg in 0 1 2; do scrub $leg; done
same $md
end "${members[@]}"
for leg in 0 1 2; do
  id=${ids[$leg]} disk=${members[$leg]} data=$(disk_of $leg)
  remove
  check_closed
  unlinear "leg$leg"
done

# --- a volume over md ------------------------------------------------------------------------------
disks=(/dev/nbd0 /dev/nbd1 /dev/nbd2)
servers=()
for n in 0 1 2; do
  truncate -s 64M "/run/disk$n"
  python3 tests/vm/latent_disk.py "/dev/nbd$n" "/run/disk$n" & servers+=($!)
done
sized() { [ "$(blockdev --getsize64 "$1")" = $((64 << 20)) ]; }
for n in 0 1 2; do wait_for sized "/dev/nbd$n"; done
# Sectors that can't be read until they are written: latent N OFFSET BLOCKS, and how many there are.
latent() { head -c $(($3 * 8)) /dev/zero | tr '\0' x | dd of="/run/disk$1.bad" bs=8 seek=$(($2 / 4096)) conv=notrunc status=none; }
unreadable() { tr -d '\0' <"/run/disk$1.bad" | wc -c; }
unharmed() {
  jq -e '.bad_blocks == 0 and .unreadable_blocks == 0' <(ui scrub -n "$id" --status --json) >/dev/null || die 'the volume has seen it'
  [ "$(counter mismatches)" = 0 ] || die 'mismatches'
  ui status -x -n "$id"
}
# And which disk has its first block where, as $holder and $at.
volume() {
  data=$md
  format --size 16M
  add
  fill "$disk"
  dd if="$disk" of=/dev/null bs=1M iflag=direct status=none
  for holder in 0 1 2; do
    if at=$(where_is "/run/disk$holder" "$mark" 2>/dev/null); then return; fi
  done
  die 'its first block is nowhere'
}

step 'a volume on RAID1: sectors that can not be read are none of its business'
make --level=1 --raid-devices=2 --bitmap=internal "${disks[@]:0:2}"
volume
latent 0 "$at" 10
avoid /dev/nbd1
same "$disk" 4096
[ "$(unreadable 0)" = 0 ] || die 'md has not written them'
latent 0 "$at" 5
ui scrub -n "$id" --wait
[ "$(unreadable 0)" = 0 ] || die 'a pass does not read them'
# Of the other one nobody reads.
latent 1 "$at" 10
ui scrub -n "$id" --wait
[ "$(unreadable 1)" = 80 ] || die 'who has read them?'
action check
[ "$(unreadable 1)" = 0 ] || die 'check has not written them'
unharmed
avoid /dev/nbd1 -

step 'a member that says something else: the tags know which, and it is healed from the other'
rot /run/disk1 "$at" 5
action check
[ "$(cat $sys/mismatch_cnt)" -gt 0 ] || die 'md sees no difference'
# Of each one alone.
avoid /dev/nbd1
ui scrub -n "$id" --wait
avoid /dev/nbd1 -
avoid /dev/nbd0
refused 6 ui scrub -n "$id" --wait
grep -q '^bad: blocks 0-4 ' /run/out || { cat /run/out; die 'they are not named'; }
leg=$(losetup --read-only --find --show --offset $(($(of /dev/nbd0 offset) * 512)) /dev/nbd0)
ui scrub -n "$id" --heal-only --repair-from "$leg" | tee /run/out
grep -q "^healed: blocks 0-4 from $leg$" /run/out || die 'they are not healed'
ui scrub -n "$id" --wait
losetup -d "$leg"
avoid /dev/nbd0 -
action check
[ "$(cat $sys/mismatch_cnt)" = 0 ] || die 'the members differ yet'
same "$disk"

step 'the trap: repair makes all members the same as the first, and that was the wrong one'
rot /run/disk0 "$at" 5
action repair
refused 6 ui scrub -n "$id" --wait
grep -q '^bad: blocks 0-4 ' /run/out || { cat /run/out; die 'the right one has won'; }
avoid /dev/nbd0
refused 6 ui scrub -n "$id" --wait
avoid /dev/nbd0 -
remove
end "${disks[@]:0:2}"

step 'a volume on RAID5'
make --level=5 --raid-devices=3 --chunk=64 --consistency-policy=ppl "${disks[@]}"
volume
latent "$holder" "$at" 10
latent $(((holder + 1) % 3)) $((at + (1 << 20))) 10
same "$disk" 4096
ui scrub -n "$id" --wait
# What is parity there is read by check alone.
action check
for n in 0 1 2; do [ "$(unreadable $n)" = 0 ] || die "disk $n has sectors that can't be read"; done
unharmed
same "$disk"
remove
end "${disks[@]}"
for n in 0 1 2; do
  python3 -c 'import fcntl, sys; fcntl.ioctl(open(sys.argv[1], "rb"), 0xab08)' "/dev/nbd$n" # NBD_DISCONNECT
  wait "${servers[$n]}"
  rm "/run/disk$n" "/run/disk$n.bad"
done
wait_for rmmod nbd
