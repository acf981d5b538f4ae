#!/bin/bash
# crash-ext4 - reset and power cut under fsync-heavy load on ext4: no synced file is missing or wrong
# vm: boots=3
. tests/vm/lib-crash.sh
make() { :; }
# Four writers make files, sync file and folder, and only then say so.
load() {
  python3 - "$boot" <<'P'
import hashlib, os, random, sys, threading
boot, folder = sys.argv[1], os.open("/mnt/t", os.O_RDONLY)
def writer(me):
    with open(f"/out/synced.{boot}.{me}", "a") as out:
        for n in range(1_000_000):
            name, data = f"{boot}.{me}.{n}", random.randbytes(random.randrange(100_000))
            fd = os.open(f"/mnt/t/{name}", os.O_WRONLY | os.O_CREAT)
            os.write(fd, data)
            os.fsync(fd)
            os.close(fd)
            os.fsync(folder)
            out.write(f"{hashlib.md5(data).hexdigest()}  {name}\n")
            out.flush()
for me in range(4):
    threading.Thread(target=writer, args=[me]).start()
P
}
enough() { [ "$(cat "/out/synced.$boot".* 2>/dev/null | wc -l)" -ge 150 ]; }
verify() {
  cat /out/synced.* >/run/synced
  step "$(wc -l </run/synced) synced files"
  # The last line of a list may have been cut short by the crash.
  (cd /mnt/t && grep -E '^[0-9a-f]{32}  [0-9.]+$' /run/synced | md5sum --quiet -c -)
}
crash_test 3
