#!/bin/bash
# ext4 - made, filled with a real tree, checked, and the same after the volume was opened again
. tests/vm/lib.sh
file_system 'mkfs.ext4 -q' 'e2fsck -fn'
