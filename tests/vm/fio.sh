#!/bin/bash
# fio - random writes verified, at depth 32 on 4 queues, then the same bytes after opening again, in both ways of copying
# vm: cpus=4
. tests/vm/lib.sh
format
add -q 4 -d 128
[ -d "/sys/block/${disk#/dev/}/mq/3" ] || die 'not 4 queues'

job=(--filename="$disk" --ioengine=libaio --direct=1 --iodepth=32 --numjobs=4 --offset_increment=200M
  --verify=crc32c --verify_fatal=1 --verify_state_save=0 --group_reporting --randrepeat=1 --output=/run/fio)
run() { fio "$@" "${job[@]}" || { tail -n 30 /run/fio; die 'fio'; }; }
step 'random 4 KiB writes, each verified'
run --name=small --rw=randwrite --bs=4k --size=8M
step 'random mixed sizes, each verified'
run --name=mixed --size=48M --rw=randwrite --bsrange=4k-512k --end_fsync=1
[ "$(counter mismatches)" = 0 ] || die 'mismatches on an honest disk'
remove
step 'opened again, verified once more, by buffers that the driver knows'
add -q 4 --write-back 0
run --name=mixed --size=48M --rw=randwrite --bsrange=4k-512k --verify_only
run --name=small --rw=randwrite --bs=4k --size=8M
remove
check_closed
