#!/bin/bash
# suspend-data - the data device stands still under load: everything waits, then goes on
. tests/vm/lib.sh
linear lower /dev/vda
data=/dev/mapper/lower
stand_still() { # SECONDS REQUESTS AT ONCE
  step "standing still for $1 s"
  suspend lower
  wait_for stuck "$2"
  # The time is what is tested: nothing gives up in it.
  sleep "$1"
  timeout $patience "$ublk_integrity" status -n "$id" >/dev/null || die 'status waits for the data device'
  resume lower
}

format
add -q 2
step 'under fio --verify'
start_fio --rw=randwrite --bsrange=4k-64k --iodepth=16 --numjobs=2 --size=24M --offset_increment=200M \
  --verify=crc32c --verify_fatal=1 --verify_state_save=0 --verify_backlog=64
for seconds in 2 20; do
  stand_still $seconds 2 # each job waits for one at least: while it verifies, for no more
  goes_on
done
end_fio
step 'under a writer that knows the version of each block'
start_writer 0 8
for seconds in 1 5; do
  goes_on
  stand_still $seconds 8
done
goes_on
end_writer
remove
check_closed
add
check_versions
remove
unlinear lower
