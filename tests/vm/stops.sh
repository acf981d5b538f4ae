#!/bin/bash
# stops - del, SIGTERM and SIGKILL while the disk stands still, fails, or memory is short (in turns; all 15 with --full)
# vm: memory=512 disks=2G,256M limit=900:3600
. tests/vm/lib.sh
linear lower /dev/vda
linear meta /dev/vdb
data=/dev/mapper/lower
meta=(--meta /dev/mapper/meta)
sectors=$(blockdev --getsz /dev/vda)

normal() { :; }
# Each is a fact when it returns. (fio has 32 requests under way.)
data_stands_still() { suspend lower; wait_for stuck 32; }
meta_stands_still() { suspend meta; wait_for stuck 32; }
data_fails() { table lower "0 $sectors error"; wait_for has_failed; }
memory_is_short() {
  rm -f /run/has-it
  python3 -c 'import time; m = bytearray(330 << 20); open("/run/has-it", "w"); time.sleep(86400)' & hog=$!
  wait_for test -e /run/has-it
}
recover_from() {
  case $1 in
    data_stands_still) resume lower;;
    meta_stands_still) resume meta;;
    data_fails) table lower "0 $sectors linear /dev/vda 0";;
    memory_is_short) kill "$hog"; wait "$hog" || true;;
  esac
}

stop_while() { # STOP STATE
  local stop=$1 state=$2 pid del=''
  step "$stop while: $state"
  format "${meta[@]}"
  add "${meta[@]}"
  mark_block "$disk" 3 synced-before
  pid=$(daemon)
  start_fio --rw=randrw --bs=4k --iodepth=32 --offset=1M --size=400M --continue_on_error=all >/dev/null 2>&1
  $state
  case $stop in
    del) timeout $patience "$ublk_integrity" del -n "$id" --force & del=$!;;
    TERM) term_twice "$pid";;
    *) kill -"$stop" "$pid";;
  esac
  # A time for it to do what it must not while that lasts: on a slow machine the test shows less, and fails no more for that.
  sleep 4
  recover_from "$state"
  wait_for gone "$pid"
  [ -z "$del" ] || wait "$del" || echo "del says $?"
  # A killed daemon's device waits for another: take it away.
  [ "$stop" != KILL ] || ui del -n "$id" --force
  wait_for test ! -e "$disk"
  end_load || true
  # One that was killed, or that could not write, has left something for the next open to settle.
  if [ "$stop" = KILL ] || [ "$state" = data_fails ]; then check_clean "${meta[@]}"; else check_closed "${meta[@]}"; fi
  add "${meta[@]}"
  [ "$(read_block "$disk" 3)" = ok ] || die 'block 3'
  grep -aq synced-before /run/block || die 'a synced block was lost'
  remove
}

syslog
turn=0
for state in normal data_stands_still meta_stands_still data_fails memory_is_short; do
  stops=(del TERM KILL)
  [ -n "${FULL:-}" ] || stops=("${stops[turn++ % 3]}")
  for stop in "${stops[@]}"; do stop_while "$stop" $state; done
done
no_syslog
unlinear lower
unlinear meta
