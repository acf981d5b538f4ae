#!/bin/bash
# key-slots - who opens a volume is changed while it is in use; what was removed brings no daemon back
. tests/vm/lib.sh
# A guess is cheap here: an emulated processor takes minutes over the usual one.
cheap=(--pbkdf-memory 8M --pbkdf-force-iterations 1)
echo 'a passphrase' >/run/word
echo 'another one' >/run/new-word
ui keygen /run/second
format --key-slots
add
mkfs.ext4 -q "$disk"
mkdir -p /mnt/t
mount "$disk" /mnt/t
plant /mnt/t
step 'slots change below a mounted file system'
ui key add --data $data --key-file $key --new-passphrase-file /run/word --label rescue "${cheap[@]}"
ui key change --data $data --passphrase-file /run/word --new-passphrase-file /run/new-word "${cheap[@]}"
ui key add --data $data --key-file $key --new-key-file /run/second
refused 2 ui key add --data $data --passphrase-file /run/word --new-key-file $key
[ "$(ui key list --data $data --json | jq '.slots | length')" = 3 ] || die "$(ui key list --data $data)"
step 'two at a time: none is lost'
for n in 1 2 3; do ui keygen /run/more$n; done
for n in 1 2 3; do ui key add --data $data --key-file $key --new-key-file /run/more$n & done
wait
[ "$(ui key list --data $data --json | jq '.slots | length')" = 6 ] || die "$(ui key list --data $data)"
for slot in 3 4 5; do ui key remove --data $data --key-file /run/second --slot $slot; done
[ "$(ui key list --data $data --json | jq '.slots | length')" = 3 ] || die "$(ui key list --data $data)"
ui key list --data $data --json | jq -e .copies_agree >/dev/null || die 'the copies differ'
step 'the key that it was added with is removed, and its daemon killed'
ui key remove --data $data --key-file /run/second --slot 0
same_tree /mnt/t
kill_daemon
refused 2 ui recover -n "$id"
ui recover -n "$id" --passphrase-file /run/new-word
same_tree /mnt/t
umount /mnt/t
step 'another program, by a passphrase'
ui upgrade -n "$id" --passphrase-file /run/new-word
remove
refused 2 ui add --data $data --key-file $key
key=/run/second
check_closed
add
mount "$disk" /mnt/t
same_tree /mnt/t
umount /mnt/t
remove

step 'with an anchor: slots change while it is served, and an old key area that is put back brings no daemon back'
areas() { dd if=$data of="$1" bs=32K skip=2 count=1 iflag=direct status=none; }
put_back() { for at in 2 18; do dd if="$1" of=$data bs=32K seek=$at oflag=direct conv=fsync status=none; done; }
mkdir -p /mnt/stick
mkfs.ext4 -q -F /dev/vdb
mount /dev/vdb /mnt/stick
anchor=(--anchor file:/mnt/stick/t.anchor)
key=/run/key
format --key-slots "${anchor[@]}"
add "${anchor[@]}" --anchor-mode interval:0.2
mkfs.ext4 -q "$disk"
mount "$disk" /mnt/t
plant /mnt/t
areas /run/older
ui key add --data $data --key-file $key --new-key-file /run/second
ui key remove --data $data --key-file /run/second --slot 0
areas /run/newest
ui anchor show --data $data --key-file /run/second "${anchor[@]}" | grep 'generation 3'
same_tree /mnt/t
put_back /run/older
refused 6 ui key add --data $data --key-file $key --new-key-file /run/more1
dd if=/dev/zero of=$data bs=32K seek=18 count=1 oflag=direct conv=fsync status=none
refused 6 ui key remove --data $data --key-file $key --slot 7
[ "$(dd if=$data bs=32K skip=18 count=1 iflag=direct status=none | tr -d '\0' | wc -c)" = 0 ] ||
  die 'the anchor was asked when it was too late'
[ "$(ui status -n "$id" --json | jq -r .latched)" = null ] || die 'who asks for that ends the device'
kill_daemon
refused 6 ui recover -n "$id" --key-file $key
grep -q 'key area' /run/err || die 'it does not say what is old'
put_back /run/newest
refused 2 ui recover -n "$id" --key-file $key
ui recover -n "$id" --key-file /run/second
same_tree /mnt/t
ui upgrade -n "$id" --key-file /run/second
dd if=/dev/zero of=$data bs=32K seek=2 count=1 oflag=direct conv=fsync status=none
ui key list --data $data | grep 'one of the two copies' || die "$(ui key list --data $data)"
refused 1 ui key remove --data $data --key-file /run/second --slot 7
ui key list --data $data --json | jq -e .copies_agree >/dev/null || die 'a command that finds nothing to do leaves the copies as they are'
ui key add --data $data --key-file /run/second --new-key-file $key
same_tree /mnt/t
umount /mnt/t
remove
refused 1 ui key remove --data $data --key-file $key --slot 1
ui key remove --data $data --key-file $key --slot 1 "${anchor[@]}"
check_closed "${anchor[@]}"
put_back /run/newest
refused 6 ui add --data $data --key-file /run/second "${anchor[@]}"
umount /mnt/stick
