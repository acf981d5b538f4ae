#!/bin/bash
# keyring - a key from the kernel's keyrings: format, add, recover and check find it there
. tests/vm/lib.sh
# What `keyctl padd user NAME @u` does; -4 is @u.
python3 - volume-key $key <<'P'
import ctypes, sys
add_key = 248
name, payload = sys.argv[1].encode(), open(sys.argv[2], "rb").read()
if ctypes.CDLL(None, use_errno=True).syscall(add_key, b"user", name, payload, len(payload), -4) < 0:
    sys.exit(f"add_key: error {ctypes.get_errno()}")
P
grep 'user *volume-key' /proc/keys
ring=(--key keyring:volume-key)
step 'a volume'
ui format --data $data "${ring[@]}" --force
disk=$(ui add --data $data "${ring[@]}")
id=${disk#/dev/ublkb}
mark_block "$disk" 7 under-a-key-of-the-kernel
pid=$(daemon)
kill -9 "$pid"
wait_for gone "$pid"
step 'recover knows where the key is'
ui recover -n "$id"
[ "$(read_block "$disk" 7)" = ok ] || die 'block 7'
remove
ui check --data $data "${ring[@]}"
step 'it is the key in the file, and another name is refused'
check_closed
refused 2 ui check --data $data --key keyring:no-such-key
