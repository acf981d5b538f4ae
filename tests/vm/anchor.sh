#!/bin/bash
# anchor - a disk put back under a file system is refused, a daemon that was killed is followed, a second opener fences the first
. tests/vm/lib.sh
mkdir -p /mnt/t /mnt/stick
# The anchor is on another disk, as a stick would be; snapshots of the first 64 MiB, all of the volume, go to memory.
mkfs.ext4 -q -F /dev/vdb
mount /dev/vdb /mnt/stick
anchor=(--anchor file:/mnt/stick/t.anchor)
snapshot() { dd if=$data of="$1" bs=1M count=64 iflag=direct status=none; }
put_back() { dd if="$1" of=$data bs=1M oflag=direct conv=fsync status=none; }
# All that was answered is covered: no record is behind, and a tick has come after that.
fresh() { ui status -n "$id" --json | jq -e '.anchor.state == "ok" and .anchor.lag_records == 0' >/dev/null; }

format --size 32M --log-size 8M "${anchor[@]}"
refused 1 ui add --data $data --key-file $key
refused 1 ui add --data $data --key-file $key --anchor file:/mnt/stick/t.anchor --without-anchor --read-only
add "${anchor[@]}" --anchor-mode interval:0.2
mkfs.ext4 -q "$disk"
mount "$disk" /mnt/t
echo old >/mnt/t/file
umount /mnt/t
remove
check_closed "${anchor[@]}"

step 'the disk of before is put back under the file system'
snapshot /run/before
add "${anchor[@]}" --anchor-mode interval:0.2
mount "$disk" /mnt/t
echo new >/mnt/t/file
sync
wait_for fresh
ui status -n "$id" | tee /run/status
grep -q '^anchor  *fresh as of ' /run/status || die 'status does not say as of when it is fresh'
ui metrics >/run/metrics
grep -o 'ublk_integrity_anchor_[a-z_]*' docs/metrics.md | sort -u | while read -r name; do
  grep -q "^${name}[ {]" /run/metrics || die "no $name"
done
snapshot /run/running
step 'killed, and followed: that is no older state'
kill_daemon
ui recover -n "$id" --key-file $key
[ "$(cat /mnt/t/file)" = new ] || die "after recover: $(cat /mnt/t/file)"
wait_for fresh
umount /mnt/t
remove
snapshot /run/newest
for older in before running; do
  put_back /run/$older
  refused 6 ui add --data $data --key-file $key "${anchor[@]}"
  grep -q 'anchor was written' /run/err || die 'it does not say how old'
  refused 6 ui check --data $data --key-file $key "${anchor[@]}"
done
put_back /run/newest
check_closed "${anchor[@]}"

step 'handed over to another program'
add "${anchor[@]}" --anchor-mode interval:0.2
mount "$disk" /mnt/t
ui upgrade -n "$id" --key-file $key
[ "$(cat /mnt/t/file)" = new ] || die "after upgrade: $(cat /mnt/t/file)"
echo newer >/mnt/t/file
sync
wait_for fresh

step 'a second host opens a copy: the first one notices'
snapshot /run/copy
second=$(ui add --data /run/copy --key-file $key "${anchor[@]}" --anchor-mode interval:0.2)
[ "$(ui status -n "${second#/dev/ublkb}" --json | jq -r .anchor.state)" = ok ] || die 'the second does not have it'
echo lost >/mnt/t/file
sync || true
taken() { ui status -n "$id" --json | jq -e '.latched != null and .anchor.state == "lost"' >/dev/null; }
wait_for taken
ui status -n "$id" | grep '^anchor .*LOST'
ui del -n "${second#/dev/ublkb}"
umount /mnt/t
ui del -n "$id" || true
step 'its disk is another branch now'
refused 6 ui add --data $data --key-file $key "${anchor[@]}"
put_back /run/copy
check_closed "${anchor[@]}"

step 'no flush is answered that the anchor does not cover'
add "${anchor[@]}" --anchor-mode flush
[ "$(cat "/sys/block/ublkb$id/queue/fua")" = 0 ] || die 'writes may pass the flush'
mount "$disk" /mnt/t
snapshot /run/before
echo synced >/mnt/t/file
sync /mnt/t/file
kill_daemon
snapshot /run/newest
put_back /run/before
refused 6 ui recover -n "$id" --key-file $key
put_back /run/newest
ui recover -n "$id" --key-file $key
[ "$(cat /mnt/t/file)" = synced ] || die "after recover: $(cat /mnt/t/file)"
umount /mnt/t
remove
check_closed "${anchor[@]}"

step 'an anchor that is gone: refused, and the volume read-only after the grace'
add "${anchor[@]}" --anchor-mode interval:0.2 --anchor-grace 2
truncate -s 0 /mnt/stick/t.anchor
dd if=/run/copy of="$disk" bs=4096 count=1 oflag=direct status=none
wait_for taken
ui del -n "$id" || true
refused 1 ui add --data $data --key-file $key "${anchor[@]}"
rm /mnt/stick/t.anchor
refused 4 ui add --data $data --key-file $key "${anchor[@]}" --anchor-wait 1
uuid=$(ui dump --data $data --json | jq -r .volume.uuid)
ui anchor reset --accept-rollback --uuid "$uuid" --data $data --key-file $key "${anchor[@]}"
check_closed "${anchor[@]}"
ui anchor show --data $data --key-file $key "${anchor[@]}" | grep '^resets  *1, '
step 'an anchor that lies on the device itself'
add "${anchor[@]}"
mkfs.ext4 -q -F "$disk"
mount "$disk" /mnt/t
truncate -s 8192 /mnt/t/t.anchor
sync
kill_daemon
jq '.anchor_option.place = "file:/mnt/t/t.anchor"' /run/ublk-integrity/"$id".json >/run/state
cp /run/ublk-integrity/"$id".json /run/good
cp /run/state /run/ublk-integrity/"$id".json
refused 4 ui recover -n "$id" --key-file $key
cp /run/good /run/ublk-integrity/"$id".json
ui recover -n "$id" --key-file $key
umount /mnt/t
remove
umount /mnt/stick
