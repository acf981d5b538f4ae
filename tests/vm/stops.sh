#!/bin/bash
# stops - del, SIGTERM and SIGKILL while the disk stands still, fails, or memory is short (in turns; all 15 with --full)
# vm: memory=512 disks=2G,256M hung=45 limit=240:1200
. tests/vm/lib.sh
linear lower /dev/vda
linear meta /dev/vdb
data=/dev/mapper/lower
meta=(--meta /dev/mapper/meta)
sectors=$(blockdev --getsz /dev/vda)

normal() { :; }
data_stands_still() { suspend lower; }
meta_stands_still() { suspend meta; }
data_fails() { table lower "0 $sectors error"; }
memory_is_short() { python3 -c 'import time; m = bytearray(330 << 20); time.sleep(60)' & hog=$!; }
recover_from() {
  case $1 in
    data_stands_still) resume lower;;
    meta_stands_still) resume meta;;
    data_fails) table lower "0 $sectors linear /dev/vda 0";;
    memory_is_short) kill "$hog"; wait "$hog" || true;;
  esac
}

stop_while() { # STOP STATE
  local stop=$1 state=$2 pid fio del=''
  step "$stop while: $state"
  format "${meta[@]}"
  add "${meta[@]}"
  mark_block "$disk" 3 synced-before
  pid=$(daemon)
  fio --name=io --filename="$disk" --ioengine=libaio --direct=1 --rw=randrw --bs=4k --iodepth=32 --offset=1M --size=400M \
    --continue_on_error=all --time_based --runtime=60 --output=/run/fio >/dev/null 2>&1 & fio=$!
  within 30 busy
  sleep 1
  $state
  sleep 2
  case $stop in
    del) timeout 90 "$ublk_integrity" del -n "$id" --force & del=$!;;
    TERM) term_twice "$pid";;
    *) kill -"$stop" "$pid";;
  esac
  sleep 4
  recover_from "$state"
  within 30 gone "$pid"
  [ -z "$del" ] || wait "$del" || echo "del says $?"
  # A killed daemon's device waits for another: take it away.
  [ "$stop" != KILL ] || ui del -n "$id" --force
  within 30 test ! -e "$disk"
  kill $fio 2>/dev/null || true
  wait $fio || true
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
