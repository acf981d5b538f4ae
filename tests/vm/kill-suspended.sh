#!/bin/bash
# kill-suspended - writes of a killed daemon still on their way: nobody opens the volume before they land
# vm: limit=180
. tests/vm/lib.sh
linear lower /dev/vda
data=/dev/mapper/lower
format
add
mark_block "$disk" 50 the-first-version
fio --name=io --filename="$disk" --rw=randwrite --bs=4k --iodepth=16 --ioengine=libaio --direct=1 --offset=16M --size=64M \
  --time_based --runtime=20 --output=/run/fio & fio=$!
within 30 busy
sleep 1
step 'the disk under the volume stops answering, and the daemon is killed'
suspend lower
sleep 1
pid=$(daemon)
kill -9 "$pid"
sleep 2
step 'recovery waits for the writes under way'
ui recover -n "$id" --key-file $key & recovery=$!
sleep 5
gone $recovery && die 'recovery did not wait'
resume lower
wait $recovery || die 'recovery failed'
wait $fio || { tail /run/fio; die 'fio saw an error'; }
[ "$(read_block "$disk" 50)" = ok ] || die 'block 50'
remove
check_clean
unlinear lower
