#!/bin/bash
# btrfs - made, filled with a real tree, scrubbed, and the same after the volume was opened again
. tests/vm/lib.sh
modprobe btrfs
file_system 'mkfs.btrfs -q' 'btrfs check' 'btrfs scrub start -Bq'
