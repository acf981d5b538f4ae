#!/bin/bash
# scrub - rot under a mounted ext4 is found and named, a pass beside fio finds nothing, kill -9 in a pass and recover
. tests/vm/lib.sh
mkdir -p /mnt/t
pass() { ui scrub -n "$id" --wait; }
field() { ui scrub -n "$id" --status --json | jq ".$1"; }
ended() { [ "$(field under_way)" = false ]; }
stop() { ui scrub -n "$id" --stop; wait_for ended; }

syslog
format
add
mkfs.ext4 -q "$disk"
mount "$disk" /mnt/t
mark_block /mnt/t/file 0 a-file-that-rots
# Who reads it waits until it is in place.
[ "$(read_block /mnt/t/file 0)" = ok ]
step 'a clean pass'
pass
[ "$(field verified_blocks)" -gt 0 ] || die 'nothing was verified'

step 'rot in a file'
at=$(where_is $data a-file-that-rots)
flip_bit $data $((at + 100))
block=$(((at - $(counter data_device_bytes) + $(counter size)) / 4096))
refused 6 ui scrub -n "$id" --wait
grep -q "^bad: blocks $block (bytes .*): mismatch$" /run/out || { cat /run/out; die "block $block is not named"; }
wait_for logged "$data: scrub: bad: blocks $block: mismatch"
ui status -n "$id" | grep -q '^scrub .* 1 bad' || die 'status does not tell'
[ "$(counter mismatches)" = 0 ] || die 'it counts as a read'
refused 6 ui status -x -n "$id"
grep -q 'degraded: 1 bad blocks found by a pass' /run/out || { cat /run/out; die 'its health is not told'; }
ui events | grep -q " err *scrub-found: $data: scrub: bad: blocks $block: mismatch$" || die 'there is no event'
ui metrics | grep -q '^ublk_integrity_scrub_bad_blocks{.*} 1$' || die 'there is no metric'
step 'it is healed from an image, and from nothing older'
refused 1 ui scrub -n "$id" --heal-only --repair-from $data
truncate -s 1M /run/older
refused 6 ui scrub -n "$id" --heal-only --repair-from /run/older
grep -q "^not healed: no copy of blocks $block holds" /run/out || { cat /run/out; die 'it is not said'; }
# The same block as it should be, where an image has it.
flip_bit $data $((at + 100))
truncate -s $(((block + 1) * 4096)) /run/image
dd if=$data of=/run/image bs=4096 skip=$((at / 4096)) seek="$block" count=1 conv=notrunc status=none
flip_bit $data $((at + 100))
ui scrub -n "$id" --heal-only --repair-from /run/older --repair-from /run/image >/run/out || { cat /run/out; die 'it is not healed'; }
grep -qx "healed: blocks $block from /run/image" /run/out || { cat /run/out; die 'what was healed is not told'; }
[ "$(field healed_blocks)" = 1 ] && [ "$(field bad_blocks)" = 0 ] || die "its counts: $(ui scrub -n "$id" --status)"
ui status -x -n "$id" || die 'it is bad yet'
wait_for logged "$data: healed from a replica: blocks $block$"
[ "$(read_block /mnt/t/file 0)" = ok ] || die 'the file is not what it was'
# And in one go, from a copy of the device.
flip_bit $data $((at + 100))
dd if=$data of=/run/raw bs=4096 count=$((at / 4096 + 1)) status=none
printf x | dd of=/run/raw bs=1 seek=$((at + 300)) conv=notrunc status=none
flip_bit /run/raw $((at + 100))
refused 6 ui scrub -n "$id" --repair-from /run/raw
dd if=/run/image of=/run/raw bs=4096 skip="$block" seek=$((at / 4096)) count=1 conv=notrunc status=none
ui scrub -n "$id" --repair-from /run/raw
step 'a superblock copy is mended'
flip_bit $data $((512 * 1024 + 80))
pass >/run/out
grep -q "^mended: superblock copy at 524288 on $data: mismatch$" /run/out || { cat /run/out; die 'the copy is not named'; }
# It was written before the pass ended.
pass
[ "$(field mended_metadata)" = 0 ] || die 'the copy is not mended'
ui status -x -n "$id"
umount /mnt/t

step 'beside fio --verify'
start_fio --rw=randwrite --bsrange=4k-64k --iodepth=8 --numjobs=2 --size=24M --offset_increment=200M \
  --verify=crc32c --verify_fatal=1 --verify_state_save=0 --verify_backlog=64
pass
[ "$(field unsettled_blocks)" -lt 100 ] || die 'hardly anything was at rest'

step 'paused, stopped, and one at a time'
refused 1 ui scrub -n "$id" --stop
ui scrub -n "$id" --rate 64K
refused 5 ui scrub -n "$id"
ui scrub -n "$id" --pause
[ "$(field state)" = '"paused"' ]
goes_on
ui scrub -n "$id" --resume
stop
[ "$(field state)" = '"stopped"' ]

step 'kill -9 in a pass: it goes on'
ui scrub -n "$id" --rate 1M
# The cursor is in the superblock with the next checkpoint. Until then it may speak of a pass before.
number=$(field pass)
said() { ui dump --data $data | grep "^scrub .* $number: Running at block [1-9]"; }
wait_for said
kill_daemon
ui recover -n "$id" --key-file $key
[ "$(field under_way)" = true ] && [ "$(field pass)" = "$number" ] && [ "$(field resumed_at)" -gt 0 ]
goes_on
stop
pass
end_fio
[ "$(counter mismatches)" = 0 ] || die 'mismatches'
remove
check_closed

if [ -n "${FULL:-}" ]; then
  step 'the daemon changes while somebody waits for a pass: both go on'
  format --label waited-for
  add
  dd if=/dev/urandom of="$disk" bs=1M count=64 oflag=direct status=none
  ui scrub -n "$id" --rate 1M --wait >/run/waited 2>&1 & waits=$!
  has_begun() { [ "$(field cursor)" -gt 0 ]; }
  wait_for has_begun
  # Nobody serves until who waits for the pass has said that it waits for the next daemon. Then the program of before does.
  cat >/run/fake <<'F'
#!/bin/bash
echo R 9.9.9; read -r end
until grep -q 'waiting for the next daemon' /run/waited; do sleep .1; done
exit 1
F
  chmod +x /run/fake
  pid=$(daemon)
  code=0
  ui upgrade -n "$id" --binary /run/fake || code=$?
  [ $code = 4 ] && [ "$(daemon)" != "$pid" ] || die 'the daemon has not changed: the test shows nothing'
  wait "$waits" || die "the wait has ended: $(cat /run/waited)"
  cat /run/waited
  grep -q '^pass 1 has ended' /run/waited || die 'not with the pass'
  [ "$(field resumed_at)" -gt 0 ] || die 'it was over before'
  remove
  check_closed
fi
no_syslog
