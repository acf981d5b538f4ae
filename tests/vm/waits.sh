#!/bin/bash
# waits - a disk that stands still and a lock that is never let go of hold nobody else up, and a signal ends whoever waits
# vm: limit=900 long
. tests/vm/lib.sh
linear hung /dev/vdb
hung=(--data /dev/mapper/hung --key-file "$key")
ui format "${hung[@]}" --force
says() { grep -q "$1" /run/said; }

step 'a recovery on a disk that stands still: another volume is added meanwhile'
other=$(ui add "${hung[@]}")
n=${other#/dev/ublkb}
pid=$(ui list --json | jq -e ".[] | select(.id == $n) | .pid")
kill -9 "$pid"
wait_for gone "$pid"
suspend hung
ui recover -n "$n" 2>/run/said & waiting=$!
wait_for says '^ublk-integrity: waiting for /dev/mapper/hung to answer a read, at most 30 s'
format
add
remove
code=0
wait $waiting || code=$?
cat /run/said
[ $code = 4 ] || die "exit code $code"
says '/dev/mapper/hung has not answered a read within 30 s' || die 'not why'
resume hung
ui recover -n "$n"
ui del -n "$n"

step 'in the foreground: a signal ends an open that stands still'
# As long as somebody holds it open its first block is in memory: what hangs is the open itself.
exec 9</dev/mapper/hung
dd if=/dev/mapper/hung of=/dev/null bs=4096 count=1 status=none
suspend hung
env --default-signal=INT,TERM "$ublk_integrity" add "${hung[@]}" --foreground -n 7 >/dev/null 2>/run/said & pid=$!
wait_for says 'still opening'
kill -INT $pid
within 60 says 'a second signal gives it up at once'
kill -INT $pid
within 30 says 'SIGINT came before the device was live'
# A sync under way keeps the process in the kernel until the disk answers.
resume hung
code=0
wait $pid || code=$?
[ $code = 130 ] || die "exit code $code"
[ ! -e /dev/ublkb7 ] || die 'a device was made'
exec 9<&-
wait_for ui check "${hung[@]}"

step 'a signal at any moment of the start: all is as if there had been no device'
data=/dev/mapper/hung
for moment in 0.02 0.05 0.1 0.15 0.2 0.25 0.3 0.35 0.4 0.5 0.7 1; do
  env --default-signal=INT,TERM "$ublk_integrity" add "${hung[@]}" --foreground -n 7 >/run/out 2>/run/said & pid=$!
  # Whatever it is at then: a slow machine meets other moments.
  sleep $moment
  kill -TERM $pid
  code=0
  within 60 gone $pid
  wait $pid || code=$?
  echo "after $moment s: exit code $code; $(tail -n 1 /run/said)"
  case $code in
    0) check_closed;;
    143) ;;
    *) die "$(cat /run/said)";;
  esac
  wait_for test ! -e /dev/ublkb7
  [ "$(ui list --json)" = '[]' ] || die "list: $(ui list --json)"
done
check_clean

step 'the lock of a daemon that had the number before, and does not end'
hold() { flock "/run/ublk-integrity/$1" sleep 1d & holder=$!; wait_for held "$1"; }
held() { ! flock -n "/run/ublk-integrity/$1" true; }
let_go() { pkill -P "$holder"; wait "$holder" || true; }
hold 7.lock
code=0
ui add "${hung[@]}" -n 7 2>/run/said || code=$?
cat /run/said
[ $code = 5 ] || die "exit code $code"
says 'waiting for the lock on /run/ublk-integrity/7.lock, at most 30 s' || die 'not what for'
tail -n 1 /run/said | grep -q '7.lock.*for 30 s.*choose another number' || die 'not why it failed'
wait_for test ! -e /dev/ublkb7
let_go
step 'that of the promises, and that of kept writes'
hold memory.lock
code=0
ui add "${hung[@]}" -n 7 2>/run/said || code=$?
cat /run/said
[ $code = 5 ] || die "exit code $code"
says 'waiting for /run/ublk-integrity/memory.lock.*at most 30 s' || die 'not what for'
let_go
step 'a signal ends such a wait: what was waited for is told, nothing is done'
hold memory.lock
given_up() { # EXIT CODE
  local code=0
  wait $waiting || code=$?
  cat /run/said
  [ $code = "$1" ] || die "exit code $code"
  says '^ublk-integrity: SIGTERM came before the device was live, while waiting for /run/ublk-integrity/memory.lock.*nothing was done$' ||
    die 'not what for'
  [ ! -e /dev/ublkb7 ] || die 'a device was made'
  [ "$(ui list --json)" = '[]' ] || die "list: $(ui list --json)"
  wait_for ui check "${hung[@]}"
}
"$ublk_integrity" add "${hung[@]}" --name given-up -n 7 2>/run/said & waiting=$!
wait_for says 'waiting for /run/ublk-integrity/memory.lock'
pkill -TERM -P $waiting
given_up 7
"$ublk_integrity" add "${hung[@]}" --name given-up -n 7 --foreground 2>/run/said & waiting=$!
wait_for says 'waiting for /run/ublk-integrity/memory.lock'
kill -TERM $waiting
given_up 143
let_go
hold kept.lock
ui add "${hung[@]}" -n 7 2>/run/said
cat /run/said
says 'warning: .*kept.lock for 30 s.*answered only when they are in place' || die 'a lost optimization was not told'
let_go
ui del -n 7
check_closed
unlinear hung
