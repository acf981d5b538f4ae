#!/bin/bash
# two-hosts - two machines open one disk with one anchor: who comes later has the volume, and the other one is read-only and says so
# vm: guests=2 memory=1024
. tests/vm/lib.sh
# Each of them is told which it is. What lies in this folder both see; the anchor is there, too.
host=$1 shared=/out/shared
anchor=(--anchor "file:$shared/anchor" --anchor-wait 60)
name="host-$host"
echo "$name" >/proc/sys/kernel/hostname
# What they tell each other.
say() { touch "$shared/$1"; }
hear() { wait_for test -e "$shared/$1"; }
# Nothing is to be told to the anchor, and nothing to be written down: the other one may come. A host that is at it in this very moment would
# write over what the other has written, until it asks the anchor again.
settled() { ui status -n "$id" --json | jq -e '.anchor.state == "ok" and .anchor.lag_records == 0 and .pending_tags == 0' >/dev/null; }
lost() { ui status -n "$id" --json | jq -e '.latched != null and .anchor.state == "lost"' >/dev/null; }
# So many records that what the other one writes too late has a number of the past.
mark_all() { for block in 1 2 10 11 12 13; do mark_block "$disk" $block "$1"; done; } # NAME
says() { [ "$(dd if="$disk" bs=4096 skip="$1" count=1 iflag=direct status=none | head -n 1)" = "$2" ] || die "block $1 is not $2's"; }
# It is read-only, says why, and answers no write; what it reads is still verified.
is_fenced() {
  wait_for lost
  ui status -n "$id" >/run/status
  cat /run/status
  grep -q '^anchor .*LOST' /run/status || die 'status does not say that the anchor is lost'
  grep -q "somebody else has opened the volume" /run/status || die 'it does not say who has the volume'
  ! mark_block "$disk" 3000 late 2>/dev/null || die 'a write was answered'
}
if [ "$host" = 1 ]; then
  cp $key $shared/key
  format --size 64M --log-size 8M "${anchor[@]}"
  add "${anchor[@]}" --anchor-mode interval:0.2
  mark_all one
  mark_block "$disk" 20 one
  wait_for settled
  say one-serves
  step 'another host opens the same disk'
  hear two-serves
  # Where nobody has written: what it writes now is on a disk that is another's.
  mark_block "$disk" 2000 late || true
  is_fenced
  # What the other one has written since is an error here, and never something older.
  says 20 one
  [ "$(read_block "$disk" 1)" = "$EILSEQ" ] || die 'a block of the other one was read'
  say one-is-fenced
  hear two-has-gone-on
  ui del -n "$id" || true
  step 'and back again'
  add "${anchor[@]}" --anchor-mode interval:0.2
  says 1 two
  says 2 two
  mark_all again
  wait_for settled
  say one-serves-again
  hear two-is-fenced
  says 1 again
  mark_all again
  wait_for settled
  remove
  # The two that have fenced each other have left no block that does not verify.
  check_closed "${anchor[@]}"
  exit
fi
hear one-serves
key=$shared/key
add "${anchor[@]}" --anchor-mode flush
says 1 one
mark_all two
wait_for settled
say two-serves
hear one-is-fenced
step 'the first one is fenced, this one goes on'
mark_all two
wait_for settled
says 1 two
[ "$(ui status -n "$id" --json | jq -r .latched)" = null ] || die 'the one that has the volume does not write'
say two-has-gone-on
hear one-serves-again
step 'no flush is answered here any more'
if mark_block "$disk" 2000 late 2>/run/err; then die 'a flush was answered that the anchor does not cover'; fi
is_fenced
ui del -n "$id" || true
say two-is-fenced
