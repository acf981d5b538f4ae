#!/bin/bash
# threads - several threads share one queue where the kernel lets them, where not, one thread is what there is; others hash for them
# vm: cpus=4
. tests/vm/lib.sh
# The daemon's threads for requests and those that hash, and how long each has run, in hundredths of a second.
threads() { cat "/proc/$(daemon)"/task/*/comm | grep -E '^(queue|hash)' | sort | paste -sd,; }
ran() { sed 's/.*) //' "$1/stat" | awk '{print $12 + $13}'; }
threads_are() { [ "$(threads)" = "$1" ] || die "threads: $(threads)"; }
busy() {
  step 'one submitter keeps all of them busy'
  fio --name=one --filename="$disk" --ioengine=libaio --direct=1 --iodepth=32 --rw=randwrite --bsrange=4k-128k --size=64M \
    --verify=crc32c --verify_fatal=1 --verify_state_save=0 --output=/run/fio || { tail -n 30 /run/fio; die 'fio'; }
  for task in "/proc/$(daemon)"/task/*; do
    case $(cat "$task/comm") in
      "${1:-queue}"* | hash*) [ "$(ran "$task")" -ge 10 ] || die "$(cat "$task/comm") has only run for $(ran "$task") hundredths of a second" ;;
    esac
  done
  [ "$(counter mismatches)" = 0 ] || die 'mismatches'
}
format

if [ "$(printf "%s\n" 6.16 "$(uname -r)" | sort -V | head -n 1)" != 6.16 ]; then
  step 'refused here'
  refused 4 ui add --data $data --key-file $key -T 2
  grep -q 'threads-per-queue 2: on this kernel a queue has one thread' /run/err || die 'not the reason'
  [ ! -e /dev/ublkb0 ] || die 'something was left'
  add
  threads_are 'hash 0,hash 1,queue 0,queue 1'
  busy hash
  remove
  add -q 4
  threads_are 'queue 0,queue 1,queue 2,queue 3'
  remove
  exit
fi

add
threads_are 'hash 0,hash 1,queue 0.0,queue 0.1'
[ ! -d "/sys/block/${disk#/dev/}/mq/1" ] || die 'more than one queue'
busy
remove

step 'as many as are wanted'
add -q 2 -T 3 -d 8 --hash-threads 0
threads_are 'queue 0.0,queue 0.1,queue 0.2,queue 1.0,queue 1.1,queue 1.2'
dd if=/dev/urandom of="$disk" bs=64k count=64 oflag=direct status=none
remove
add -T 1 --hash-threads 1
threads_are 'hash 0,queue 0'
busy
[ "$(counter hash_threads)" = 1 ] || die 'not what status says'
remove
refused 1 ui add --data $data --key-file $key -d 2 -T 3
refused 1 ui add --data $data --key-file $key --hash-threads 257
check_closed
