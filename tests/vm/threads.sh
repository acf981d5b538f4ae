#!/bin/bash
# threads - several threads share one queue where the kernel lets them; where not, one thread is what there is
# vm: on=newest,6.12 cpus=4 limit=180
. tests/vm/lib.sh
# The daemon's threads for requests, and how long each has run, in hundredths of a second.
threads() { cat "/proc/$(daemon)"/task/*/comm | grep '^queue' | sort; }
ran() { sed 's/.*) //' "$1/stat" | awk '{print $12 + $13}'; }
format

if [ "$(printf "%s\n" 6.16 "$(uname -r)" | sort -V | head -n 1)" != 6.16 ]; then
  step 'refused here'
  refused 4 ui add --data $data --key-file $key -T 2
  grep -q 'threads-per-queue 2: on this kernel a queue has one thread' /run/err || die 'not the reason'
  [ ! -e /dev/ublkb0 ] || die 'something was left'
  add -q 4
  [ "$(threads)" = "$(printf 'queue %s\n' 0 1 2 3)" ] || die "threads: $(threads)"
  remove
  exit
fi

add
[ "$(threads)" = "$(printf 'queue 0.%s\n' 0 1 2 3)" ] || die "threads: $(threads)"
[ ! -d "/sys/block/${disk#/dev/}/mq/1" ] || die 'more than one queue'
step 'one submitter keeps all of them busy'
fio --name=one --filename="$disk" --ioengine=libaio --direct=1 --iodepth=32 --rw=randwrite --bsrange=4k-128k --size=64M \
  --verify=crc32c --verify_fatal=1 --verify_state_save=0 --output=/run/fio || { tail -n 30 /run/fio; die 'fio'; }
for task in "/proc/$(daemon)"/task/*; do
  case $(cat "$task/comm") in
    queue*) [ "$(ran "$task")" -ge 10 ] || die "$(cat "$task/comm") has only run for $(ran "$task") hundredths of a second" ;;
  esac
done
[ "$(counter mismatches)" = 0 ] || die 'mismatches'
remove

step 'as many as are wanted'
add -q 2 -T 3 -d 8
[ "$(threads)" = "$(printf 'queue %s\n' 0.0 0.1 0.2 1.0 1.1 1.2)" ] || die "threads: $(threads)"
dd if=/dev/urandom of="$disk" bs=64k count=64 oflag=direct status=none
remove
add -T 1
[ "$(threads)" = 'queue 0' ] || die "threads: $(threads)"
remove
refused 1 ui add --data $data --key-file $key -d 2 -T 3
check_closed
