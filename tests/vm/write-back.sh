#!/bin/bash
# write-back - small writes answered before they are in place outlive kill -9 of any number of daemons, and none is lost unsaid
. tests/vm/lib.sh
memory=/run/ublk-integrity/memory
modprobe dm-flakey
linear lower /dev/vda
data=/dev/mapper/lower
blocks=12
links() { { find /run/ublk-integrity -name 'kept-*' 2>/dev/null || true; } | wc -l; } # there may be no folder yet
# Those of tests before this one don't count: a volume whose anchor was away at its end keeps its own.
others=$(links)
kept() { echo $(($(links) - others)); }
# Answered while the disk under the volume gives no answer. (No fsync, which would wait for them.)
answered() { head -c 4096 <(yes "$2") | timeout $patience dd of="$disk" bs=4096 seek="$1" oflag=direct iflag=fullblock conv=notrunc status=none; }
# What the blocks from FIRST to LAST hold as WORD: each the word and its number, over and over.
contents() { # WORD [FIRST LAST]
  seq "${2:-1}" "${3:-$blocks}" | awk -v word="$1" '{
    line = word "-" $1 "\n"
    for (text = line; length(text) < 4096;) text = text line
    printf "%s", substr(text, 1, 4096)
  }'
}
# The same of all of them, each write when the one before is answered: a process for each takes a minute more where it is emulated.
answered_all() { # WORD [FIRST LAST]
  contents "$@" | timeout $patience dd of="$disk" bs=4096 seek="${2:-1}" oflag=direct iflag=fullblock conv=notrunc status=none
}
# Each block holds what was answered last.
whole() { # WORD
  local block
  if dd if="$disk" bs=4096 skip=1 count=$blocks iflag=direct status=none 2>/run/err | cmp -s - <(contents "$1"); then return; fi
  # Which one it is.
  for block in $(seq $blocks); do
    [ "$(read_block "$disk" "$block")" = ok ] || die "block $block: $(read_block "$disk" "$block")"
    cmp -s /run/block <(contents "$1" "$block" "$block") || die "block $block holds $(head -n 1 /run/block), not $1-$block"
  done
  die "the blocks are not all $1: $(cat /run/err)"
}
# Writes that were answered and are nowhere but in memory: the record of the first is on its way, no data at all.
leave() { # WORD [ADD OPTION...]
  local word=$1 pid
  shift
  answered_all old
  sync "$disk"
  suspend lower
  answered_all "$word" || die 'not all were answered'
  pid=$(daemon)
  kill -9 "$pid"
  resume lower
  wait_for gone "$pid"
}

format
began=$(date +%s%3N)
add
took=$(($(date +%s%3N) - began))
grep -q "^ublk-integrity $memory tmpfs .*noswap" /proc/mounts || die "$memory: $(grep $memory /proc/mounts)"
[ "$(stat -c %a $memory)" = 700 ] || die "$memory is $(stat -c %a $memory)"
[ "$(kept)" = 1 ] || die "$(kept) links"
step 'kill -9, recover'
leave first
ui recover -n "$id" --key-file $key
whole first
[ "$(counter write_back_writes)" = 0 ] || die 'the new daemon has answered writes early that were reissued to it'

step 'kill -9, del: what only reads says that they are missing, what writes refuses'
leave second
ui del -n "$id" 2>/run/err
grep -q "$blocks writes" /run/err || { cat /run/err; die 'del did not say so'; }
check_clean 2>/run/err || die 'bad blocks'
grep -q "$blocks writes of a daemon that was killed" /run/err || { cat /run/err; die 'check did not say so'; }
refused 5 ui add --data $data --key-file $key --read-only
rm -f /run/image # another test's
refused 5 ui export /run/image --data $data --key-file $key
[ ! -e /run/image ] || die 'half an export'
head -c 1M /dev/zero >/run/image
refused 5 ui import /run/image --data $data --key-file $key
step 'the memory is not mounted where we are'
mkdir -p /run/elsewhere
mount --move $memory /run/elsewhere
refused 4 ui add --data $data --key-file $key
[ -z "$(ui list --json | jq '.[]')" ] || die 'half a device'
mount --move /run/elsewhere $memory
step 'a sector that can not be written'
at=$(($(where_is /dev/vda old-7) / 512)) all=$(blockdev --getsz /dev/vda) code=0
table lower "0 $at linear /dev/vda 0
$at 8 error
$((at + 8)) $((all - at - 8)) linear /dev/vda $((at + 8))"
ui add --data $data --key-file $key 2>/run/err || code=$?
cat /run/err
[ $code = 4 ] || die "exit code $code"
grep -qF "$(find /run/ublk-integrity -name 'kept-*' | cut -c1-30 | sed 's/^/to give up what is kept there, remove /')" /run/err || die 'not what to do'
table lower "0 $all linear /dev/vda 0"
step 'a disk that has its id and neither its path nor its number may be a copy'
unlinear lower
refused 4 ui add --data /dev/vda --key-file $key
grep -q 'if it is a copy' /run/err || die 'which was not said'
linear lower /dev/vda
step 'daemons that are killed while they begin'
# Moments of its start, whichever they are: in hundredths of the time that one takes here. Nothing depends on a single one.
# The late ones meet the kernel at its look for partitions.
left=0
for part in 2 10 40 80 ${FULL:+1 5 20 60 100}; do
  "$ublk_integrity" add --data $data --key-file $key --foreground >/run/out 2>&1 & pid=$!
  sleep "$((took * part / 100))e-3"
  kill -9 $pid || { cat /run/out; die 'ended before it was killed'; }
  wait $pid || true
  grep -qa 'put in place' /run/out || left=$((left + 1))
  for n in $(ui list --json | jq '.[].id'); do ui del -n "$n"; done
done
[ $left -ge 2 ] || die 'all were put in place too early: the test shows nothing'
add
whole second
remove
check_closed
[ "$(kept)" = 0 ] || die "$(kept) links are left"
[ -z "$(ls $memory)" ] || die "left in memory: $(ls $memory)"

step 'a disk that fails: told to the flush, read by nobody, put in place when it is back'
add
answered_all old
sync "$disk"
sectors=$(blockdev --getsz /dev/vda)
table lower "0 $sectors error"
answered 7 third-7 || die 'was not answered'
code=0
sync "$disk" 2>/run/err || code=$?
[ $code != 0 ] || die 'a flush that lost a write succeeded'
table lower "0 $sectors linear /dev/vda 0"
[ "$(read_block "$disk" 7)" = "$EIO" ] || die "block 7: $(read_block "$disk" 7)"
[ "$(read_block "$disk" 8)" = ok ] || die "block 8: $(read_block "$disk" 8)"
ui status -n "$id"
refused 4 ui del -n "$id"
grep -q 'to put in place: 1 write' /run/err || die 'del did not say so'
add
answered_all third 1 6
answered_all third 8 $blocks
whole third
remove

step 'a sector that takes no writes, and can be read: what is kept is what was to be written, not what is there'
add
answered_all old
sync "$disk"
remove
at=$(($(where_is /dev/vda old-7) / 512))
add
table lower "0 $at linear /dev/vda 0
$at 8 flakey /dev/vda $at 0 3600 1 error_writes
$((at + 8)) $((sectors - at - 8)) linear /dev/vda $((at + 8))"
answered 7 fourth-7 || die 'was not answered'
code=0
sync "$disk" 2>/run/err || code=$?
[ $code != 0 ] || die 'a flush that lost a write succeeded'
[ "$(read_block "$disk" 7)" = "$EIO" ] || die "block 7: $(read_block "$disk" 7)"
refused 4 ui del -n "$id"
grep -q 'to put in place: 1 write' /run/err || die 'del did not say so'
table lower "0 $sectors linear /dev/vda 0"
add
answered_all fourth 1 6
answered_all fourth 8 $blocks
whole fourth
remove

step 'without write-back each write waits, and is told itself'
add --write-back 0
[ "$(kept)" = 0 ] || die "$(kept) links"
table lower "0 $sectors error"
answered 9 never 2>/run/err && die 'was answered'
table lower "0 $sectors linear /dev/vda 0"
[ "$(counter write_back_writes)" = 0 ]
ui del -n "$id" || true
add
[ "$(read_block "$disk" 8)" = ok ]
remove
step 'a device whose first daemon answered none early, nor asked the kernel for what that takes'
add --write-back 0
pid=$(daemon)
kill -9 "$pid"
wait_for gone "$pid"
state=/run/ublk-integrity/$id.json
jq -c '.write_back = 32' "$state" >/run/state
cat /run/state >"$state"
ui recover -n "$id" --key-file $key 2>/run/err
grep -q 'only when they are in place' /run/err || { cat /run/err; die 'not said'; }
answered_all late
whole late
[ "$(counter write_back_writes)" = 0 ] || die 'answered early all the same'
remove
check_closed
unlinear lower

step 'a volume in a file on a file system of its own'
mkdir -p /mnt/t
linear lower /dev/vdb
mkfs.ext4 -q /dev/mapper/lower
mount /dev/mapper/lower /mnt/t
data=/mnt/t/volume
format --create --size 64M
add
leave filed
ui recover -n "$id" --key-file $key
whole filed
step 'which is set back to an earlier moment of the same open'
cp --sparse=always $data /mnt/t/earlier
leave newest
ui del -n "$id"
mv $data /mnt/t/now
mv /mnt/t/earlier $data
code=0
ui add --data $data --key-file $key 2>/run/err || code=$?
cat /run/err
[ $code = 4 ] || die "exit code $code"
grep -q 'an older state' /run/err || die 'which was not said'
mv /mnt/t/now $data
add
whole newest
remove
check_closed
step 'which is formatted over: what was kept of it goes, too'
add
leave given-up
ui del -n "$id" 2>/run/err
grep -q "$blocks writes" /run/err || { cat /run/err; die 'del did not say so'; }
format 2>/run/err
grep -q "$blocks writes of the volume that was here, in memory yet, were given up" /run/err || { cat /run/err; die 'format did not say so'; }
[ "$(kept)" = 0 ] || die "$(kept) links are left"
add
[ "$(find $memory -type f | wc -l)" = 1 ] || die "left in memory: $(find $memory -type f)"
ui del -n "$id" 2>/run/err
[ ! -s /run/err ] || { cat /run/err; die 'del warns of the old volume'; }
check_closed
umount /mnt/t
unlinear lower
