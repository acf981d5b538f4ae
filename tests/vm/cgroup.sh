#!/bin/bash
# cgroup - the daemon in a memory cgroup as tight as what it said it needs: it works, and is not killed
. tests/vm/lib.sh
format
group=/sys/fs/cgroup/daemon
mkdir $group
echo +memory >/sys/fs/cgroup/cgroup.subtree_control
step 'how much is it?'
add
pid=$(daemon)
resident=$(awk '/^VmRSS/ {print $2}' "/proc/$pid/status")
echo "resident: $resident KiB"
remove
# What the kernel charges for it beyond that: its page tables and rings.
limit=$((resident + 8192))
step "the daemon in $limit KiB"
echo "${limit}K" >$group/memory.max
add_inside() { echo $BASHPID >$group/cgroup.procs; add; echo "$disk" >/run/disk; }
(add_inside)
disk=$(cat /run/disk) id=${disk#/dev/ublkb}
grep -qx "$(daemon)" $group/cgroup.procs || die 'the daemon is not in the group'
fio --name=v --filename="$disk" --ioengine=libaio --direct=1 --rw=randwrite --bsrange=4k-512k --iodepth=32 --size=200M \
  --verify=crc32c --verify_fatal=1 --verify_state_save=0 --output=/run/fio || { tail /run/fio; die 'fio failed'; }
fio --name=r --filename="$disk" --ioengine=libaio --direct=1 --rw=randread --bs=4k --iodepth=32 --size=64M --output=/run/fio
cat $group/memory.peak $group/memory.events
grep -qx 'oom_kill 0' $group/memory.events || die 'the daemon was killed'
remove
echo "$$" >/sys/fs/cgroup/cgroup.procs
wait_for rmdir $group
check_closed
