#!/bin/bash
# log-writes - a disk as it was at every flush and FUA write of a load: no false alarm, nothing synced is missing
# vm: limit=900:7200
. tests/vm/lib.sh
modprobe dm_log_writes
wanted=20 # points; all of them with --full
mib=48

# Everything written to $data is recorded on vdc, in the order in which it became durable.
linear lower /dev/vda $mib
dm logged "0 $((mib * 2048)) log-writes /dev/mapper/lower /dev/vdc"
data=/dev/mapper/logged
mark() { dmsetup message logged 0 mark "$1"; }
format --log-size 512K # small, so that there are checkpoints
mark begin
add
mkfs.ext4 -q "$disk"
mkdir -p /mnt/t
mount "$disk" /mnt/t
# Files written again and again, each synced; then, and only then, the log gets a mark. Until it is told to end.
files() {
  python3 - <<'P2'
import hashlib, itertools, os, random, subprocess
folder = os.open("/mnt/t", os.O_RDONLY)
with open("/run/synced", "w") as out:
    for n in itertools.count(1):
        if os.path.exists("/run/end"):
            break
        name, content = f"file{n % 12}", random.randbytes(random.randrange(30_000))
        fd = os.open(f"/mnt/t/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(fd, content)
        os.fsync(fd)
        os.close(fd)
        os.fsync(folder)
        subprocess.run(["dmsetup", "message", "logged", "0", "mark", str(n)], check=True)
        print(n, name, hashlib.md5(content).hexdigest(), file=out, flush=True)
P2
}
step 'files, each synced, and a killed daemon in between'
synced() { [ "$(wc -l </run/synced)" -ge "$1" ] || { loads; false; }; } # FILES
: >/run/synced
start_load files
wait_for synced 30
pid=$(daemon)
kill -9 "$pid"
wait_for gone "$pid"
ui recover -n "$id" --key-file $key
wait_for synced $(($(wc -l </run/synced) + 20))
checkpointed() { [ "$(counter checkpoints)" -ge 1 ] || { loads; false; }; }
wait_for checkpointed
end_load || die 'the writer saw an error'
echo "$(wc -l </run/synced) files synced, $(counter checkpoints) checkpoints since the kill"
umount /mnt/t
remove
unlinear logged
unlinear lower

# What the files must hold at a mark; the one that was being written after it may hold anything.
synced_by() { # MARK
  awk -v n="$1" '$1 <= n {sum[$2] = $3} $1 == n + 1 {busy = $2}
    END {for (name in sum) if (name != busy) print sum[name] "  " name}' /run/synced
}
look_at_files() { # MARK
  ui export --data $data --key-file $key --force /run/image
  e2fsck -E journal_only -y /run/image >/run/fsck 2>&1 || [ $? = 1 ] || { cat /run/fsck; die 'the journal'; }
  e2fsck -fn /run/image >/run/fsck 2>&1 || { cat /run/fsck; die 'the file system is damaged'; }
  rm -rf /run/tree
  mkdir /run/tree
  debugfs -R 'rdump / /run/tree' /run/image >/run/debugfs 2>&1
  (cd /run/tree && synced_by "$1" | md5sum --quiet -c -) || die 'a synced file is missing or wrong'
}

linear replayed /dev/vdb $mib
data=/dev/mapper/replayed
dd if=/dev/zero of=$data bs=1M count=$mib oflag=direct status=none
python3 tests/vm/log_writes.py points /dev/vdc >/run/points
total=$(wc -l </run/points)
[ "$total" -ge $wanted ] || die "only $total points"
[ -z "${FULL:-}" ] || wanted=$total
step "$wanted of $total points"
# The last one is among them.
awk -v total="$total" -v wanted="$wanted" 'int(NR * wanted / total) > int((NR - 1) * wanted / total)' /run/points >/run/sample
before=0 n=0 looks=0
while read -r place mark; do
  python3 tests/vm/log_writes.py apply /dev/vdc $data "$before" "$place"
  ui check --data $data --key-file $key --json >/run/report || { cat /run/report; die "at $place, after mark $mark"; }
  jq -r .recovery.records /run/report >>/run/records
  n=$((n + 1)) before=$place
  if [ "$mark" != begin ] && [ $((n % 5)) = 0 ]; then look_at_files "$mark"; looks=$((looks + 1)); fi
done </run/sample
step "$n points, $(grep -vcx 0 /run/records) with something to recover, the files looked at in $looks"
[ $looks -ge 3 ] || die 'the files were not looked at'
[ "$(tail -n 1 /run/records)" = 0 ] || die 'the last one is a closed volume'
unlinear replayed
