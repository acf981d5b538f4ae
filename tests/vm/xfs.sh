#!/bin/bash
# xfs - made, filled with a real tree, checked, and the same after the volume was opened again
. tests/vm/lib.sh
modprobe xfs
file_system 'mkfs.xfs -q' 'xfs_repair -n'
