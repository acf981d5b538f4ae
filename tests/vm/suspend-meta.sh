#!/bin/bash
# suspend-meta - the metadata device stands still for 20 s: cached reads go on, the rest waits and then goes on
. tests/vm/lib.sh
linear meta /dev/vdb
meta=(--meta /dev/mapper/meta)
format "${meta[@]}"
add "${meta[@]}"
step 'write 256 MiB, open again, warm one corner'
fio --name=w --filename="$disk" --ioengine=libaio --direct=1 --rw=write --bs=512k --iodepth=8 --size=256M --output=/run/fio
remove
add "${meta[@]}"
warm() { fio --name=warm --filename="$disk" --ioengine=libaio --direct=1 --rw=read --bs=64k --iodepth=4 --size=4M --output=/run/fio; }
warm
step 'the metadata device stands still'
suspend meta
start=$SECONDS
# Reads of what is not cached: stuck, and the prefetch with them.
dd if="$disk" of=/dev/null bs=64k skip=$((100 * 16)) count=64 iflag=direct status=none & cold=$!
wait_for busy
# The time is what is tested: nothing gives up in it.
while [ $SECONDS -lt $((start + 20)) ]; do
  timeout $patience fio --name=warm --filename="$disk" --ioengine=libaio --direct=1 --rw=read --bs=64k --iodepth=4 --size=4M \
    --output=/run/fio || die 'a cached read waits for the metadata device'
done
gone $cold && die 'the cold read did not need the metadata: the test shows nothing'
step 'status answers, too'
timeout $patience "$ublk_integrity" status -n "$id" >/dev/null || die 'status waits for the metadata device'
resume meta
step 'it goes on'
wait $cold || die 'the waiting read failed'
fio --name=v --filename="$disk" --ioengine=libaio --direct=1 --rw=randwrite --bs=4k --iodepth=32 --size=16M --verify=crc32c \
  --verify_fatal=1 --verify_state_save=0 --output=/run/fio || die 'fio'
[ "$(counter mismatches)" = 0 ] || die 'mismatches'
remove
check_closed "${meta[@]}"
unlinear meta
