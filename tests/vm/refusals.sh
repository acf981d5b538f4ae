#!/bin/bash
# refusals - wrong key, missing or foreign disk, busy volume: one clear line and the right exit code
. tests/vm/lib.sh
ui keygen /run/other-key
step 'what is there already is not formatted over'
mkfs.ext4 -qF /dev/vdb
refused 5 ui format --data /dev/vdb --key-file $key
wipefs -qa /dev/vdb
step 'a mounted disk is not formatted'
mkfs.ext4 -qF /dev/vdb
mkdir -p /mnt/t
mount /dev/vdb /mnt/t
refused 5 ui format --data /dev/vdb --key-file $key
umount /mnt/t
step 'a key is not overwritten, and is nobody else'\''s to read'
refused 5 ui keygen /run/other-key
[ "$(stat -c %a /run/other-key)" = 600 ] || die "mode $(stat -c %a /run/other-key)"

format
step 'wrong key'
refused 2 ui add --data $data --key-file /run/other-key
refused 2 ui check --data $data --key-file /run/other-key
step 'no such disk, no volume on the disk, no key file'
refused 4 ui add --data /dev/nothing-here --key-file $key
# Another test of this guest may have left a volume there.
dd if=/dev/zero of=/dev/vdc bs=1M count=2 conv=fsync status=none
refused 4 ui add --data /dev/vdc --key-file $key
code=0
ui add --data $data --key-file /run/no-such-key 2>/run/err || code=$?
cat /run/err
[ $code != 0 ] || die 'a key file that is not there'
[ "$(wc -l </run/err)" = 1 ] || die 'not one line for a key file that is not there'
step 'bad arguments'
refused 1 ui add --data $data --key-file $key --on-mismatch perhaps
step 'a second add of an open volume'
add
refused 5 ui add --data $data --key-file $key
refused 5 ui format --data $data --key-file $key --force
refused 5 ui add --data $data --key-file $key -n "$id"
step 'del of a device that is open, or mounted'
exec 9<"$disk"
refused 5 ui del -n "$id"
exec 9<&-
mkfs.ext4 -q "$disk"
mount "$disk" /mnt/t
refused 5 ui del -n "$id"
echo still here >/mnt/t/file
umount /mnt/t
remove
step 'del of nothing'
refused 4 ui del -n 77
[ "$(ui list --json)" = '[]' ] || die "list: $(ui list --json)"
step 'a damaged volume is told from a wrong key'
dd if=/dev/zero of=$data bs=1M count=16 conv=notrunc,fsync status=none
refused 4 ui add --data $data --key-file $key
