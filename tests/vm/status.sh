#!/bin/bash
# status - list, status and dump tell the truth, for people and as JSON
. tests/vm/lib.sh
format
[ "$(ui list --json)" = '[]' ] || die 'something in an empty list'
add -n 5
[ "$disk" = /dev/ublkb5 ] || die "asked for 5, got $disk"
ui list
ui list --json | jq -e '.[0].id == 5 and .[0].pid > 0'
# Of each superblock copy: its format version, and what a program must know.
versions() { ui dump --data $data --json | jq -c '[.copies[] | [.version, .features]]'; }
ui status -n "$id" --json | jq -e '.sync_log and .sync_log_option == "auto"'
[ "$(versions)" = '[[2,["sync_log"]],[2,["sync_log"]]]' ] || die "the sync log is not said: $(versions)"
writes=$(counter writes) reads=$(counter reads)
for block in 1 2 3; do mark_block "$disk" $block x; done
for block in 1 2 3 4; do [ "$(read_block "$disk" $block)" = ok ]; done
[ $(($(counter writes) - writes)) -ge 3 ] || die 'writes are not counted'
[ $(($(counter reads) - reads)) -ge 4 ] || die 'reads are not counted'
counter blocks_verified
[ "$(counter mismatches)" = 0 ]
for name in cache_hits cache_misses hints_sent hints_dropped hints_used checkpoints; do counter $name; done
ui status -n "$id"
step 'one word of health, and every metric of the page'
[ "$(ui status -x)" = 'all devices are ok' ] || die 'not ok'
[ "$(ui status | tail -n 1)" = 'health    ok' ] || die 'no health'
ui metrics >/run/metrics
# Those of anchors are of volumes that have one: the test `anchor` looks at them.
grep -o 'ublk_integrity_[a-z_]*' docs/metrics.md | grep -v '^ublk_integrity_anchor_' | sort -u | while read -r name; do
  grep -q "^${name}[ {]" /run/metrics || die "no $name"
done
step 'how long requests took, and what goes on now'
sync "$disk"
ui status -n "$id" --json | jq -ce '.latency | .read.count >= 4 and .write.count >= 3 and .flush.count >= 1 and .read.p50_seconds > 0'
ui status -n "$id" | grep -q '^latency   read p50 .* p99 .*; write p50 '
ui top --once --delay 1 | tee /run/top
grep -q "^ublkb$id *ok " /run/top || die 'not in the table'
rm -f /run/top
step 'dump needs no key and writes nothing'
# The daemon itself does, for as long as there is something to checkpoint.
settled() { [ "$(counter pending_tags)" = 0 ]; }
wait_for settled
before=$(head -c 1M $data | sha256sum)
ui dump --data $data
[ "$(head -c 1M $data | sha256sum)" = "$before" ] || die 'dump wrote'
remove
[ "$(versions)" = '[[1,[]],[1,[]]]' ] || die "no older program opens what was ended in good order: $(versions)"
add --sync-log off
ui status -n "$id" | grep -qx 'sync log  off'
[ "$(versions)" = '[[1,[]],[1,[]]]' ] || die "written for a sync log that is off: $(versions)"
remove
step 'read only'
add --read-only
[ "$(cat /sys/block/"${disk#/dev/}"/ro)" = 1 ] || die 'not read only'
[ "$(read_block "$disk" 1)" = ok ]
remove
step 'a label and a trusted disk are shown'
format --label box --assume-atomic 512
add
ui status -n "$id" | grep -qx 'label     box'
ui status -n "$id" | grep -qx 'atomic    512 bytes, as the user says'
ui list --json | jq -e '.[0].label == "box" and .[0].assumed_atomic_bytes == 512'
remove
ui add --data $data --key-file $key --write-back 0 --sync-log on && die 'a sync log without write-back'

step 'a volume that was not closed, read by all that write nothing'
linear small /dev/vdb 64
data=/dev/mapper/small
format
add
for block in 1 2 3; do mark_block "$disk" $block "block-$block-logged"; done
pid=$(daemon)
kill -9 "$pid"
wait_for gone "$pid"
refused 5 ui status -x
grep -q "^$disk: failed: its daemon (pid $pid) is dead: .recover -n $id. or .del -n $id.$" /run/out || die "$(cat /run/out)"
ui metrics | grep -q '^ublk_integrity_up{.*} 0$' || die 'a dead daemon is up'
ui del -n "$id"
dirty() { check_clean --json | jq -e '.recovery.records > 0' >/dev/null; }
dirty || die 'nothing was left in the log: the test shows nothing'
before=$(sha256sum <$data)
unchanged() { [ "$(sha256sum <$data)" = "$before" ] || die "$1 wrote"; }
add --read-only
for block in 1 2 3 4; do [ "$(read_block "$disk" $block)" = ok ] || die "block $block"; done
[ "$(read_block "$disk" 2)" = ok ]
grep -aq block-2-logged /run/block || die 'block 2'
remove
unchanged 'add --read-only'
check_clean
unchanged check
ui export --data $data --key-file $key /run/exported
unchanged export
ui dump --data $data
unchanged dump
dirty || die 'the log is gone'
unlinear small
