# lib - what the guest tests share; each begins with `. tests/vm/lib.sh`.
#
# The guest has /dev/vda (1 GiB) and /dev/vdb (256 MiB) with 4096-byte physical blocks and /dev/vdc
# (512 MiB) with 512, unless the test's `# vm:` line asks for others; all of them scratch. A test
# leaves nothing behind when it passes; when it fails the guest is thrown away.
# shellcheck shell=bash
set -euo pipefail
shopt -s inherit_errexit
export LC_ALL=C

ublk_integrity=$PWD/target/release/ublk-integrity
ui() { "$ublk_integrity" "$@"; }

step() { echo "[$SECONDS s] $*"; }
die() { echo "$*" >&2; exit 1; }
skip() { echo "$*"; exit 77; }

key=/run/key
[ -e $key ] || ui keygen $key
# A key of no volume. Tests that share a boot share it.
another_key=/run/another-key
[ -e $another_key ] || ui keygen $another_key
data=/dev/vda

# The volume of most tests: format [OPTION...], add [OPTION...], which sets $disk and $id, and remove.
format() { ui format --data $data --key-file $key --force "$@"; }
add() {
  disk=$(ui add --data $data --key-file $key "$@")
  [ -b "$disk" ] || die "add printed '$disk', which is no block device"
  id=${disk#/dev/ublkb}
}
remove() { ui del -n "$id"; [ ! -e "$disk" ] || die "$disk outlived del"; }
# All blocks verify, whatever the log has to settle first.
check_clean() { ui check --data $data --key-file $key "$@"; }
# And the log has nothing to settle: the volume was closed in order. (A killed one passes check_clean, too.)
check_closed() {
  check_clean --json "$@" >/run/report || { cat /run/report; die 'bad blocks'; }
  jq -e '.recovery.records == 0' /run/report >/dev/null || { cat /run/report; die 'the volume was not closed'; }
}

# A value of the device's status, wherever in it.
counter() { ui status -n "$id" --json | jq -e "first(.. | objects | select(has(\"$1\")) | .$1)"; }
daemon() { ui list --json | jq -e ".[] | select(.id == $id) | .pid"; }

# A command must fail with exactly this code, on one line (apart from what it had to wait for) and without a panic:
# refused CODE COMMAND...
refused() {
  local want=$1 got=0
  shift
  "$@" >/run/out 2>/run/err || got=$?
  sed 's/^/    | /' /run/err
  [ $got = "$want" ] || die "exit code $got, not $want: $*"
  [ "$(grep -vc '^ublk-integrity: waiting for ' /run/err)" = 1 ] || die "not one line on stderr: $*"
  if grep -q panicked /run/err; then die "a panic: $*"; fi
}

# What a direct read of a 4096-byte block says: ok, or the kernel's word for the error.
read_block() { # FILE BLOCK [BLOCK SIZE]
  local answer
  if answer=$(dd if="$1" of=/run/block bs="${3:-4096}" skip="$2" count=1 iflag=direct status=none 2>&1); then echo ok
  else echo "${answer##*: }"; fi
}
EILSEQ='Invalid or incomplete multibyte or wide character'
EIO='Input/output error'

# Waiting is for events, never for a time: how long something takes is up to the machine, and others may be at work on it. This
# is the limit for what hangs, and promises nothing.
patience=180
# Waits until a command succeeds: wait_for COMMAND...
wait_for() { within $patience "$@"; }
# The same where the time is a promise to the user: within SECONDS COMMAND...
within() {
  local deadline=$((SECONDS + $1))
  shift
  until "$@"; do [ $SECONDS -lt $deadline ] || die "in vain waited for: $*"; sleep 0.2; done
}
# Without this fio makes a plain file where it finds no device, and is content.
fio() { command fio --allow_file_create=0 "$@"; }
gone() { ! kill -0 "$1" 2>/dev/null; }
# The monitor has passed all events on, and has saved that: its program may be done a moment before. One that is ended in between
# passes the last one on again.
passed_on() {
  local file volume
  for file in /run/ublk-integrity/*.events; do
    volume=${file##*/} volume=${volume%.events}
    [ "$(jq --arg volume "$volume" '.[$volume].offset' /run/ublk-integrity/monitor-*.position)" = "$(stat -c %s "$file")" ] || return 1
  done
}
kill_daemon() { pid=$(daemon); kill -9 "$pid"; wait_for gone "$pid"; }

# A system log: what daemons say that are started from now on goes to /run/syslog; and its end.
syslog() {
  python3 -c 'import socket
log = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
log.bind("/dev/log")
while True: print(log.recv(65536).decode(), flush=True)' >/run/syslog & syslog_pid=$!
  within 30 test -S /dev/log
}
logged() { grep -q "$1" /run/syslog; }
no_syslog() {
  kill "$syslog_pid"
  wait "$syslog_pid" || true
  rm -f /dev/log
}
# SIGTERM while the device is in use: the second one counts.
term_twice() { # PID
  kill -TERM "$1"
  within 60 logged "\[$1\]: $data: the device is in use: it is stopped when its last user is gone"
  kill -TERM "$1"
}

# The byte offset of the block with this mark (mark_block's) in its place: the last one, as the tag log before it may hold
# the block, too. Only whole blocks count: a test before may have left a file on the disk that says the same somewhere.
where_is() { # FILE MARK
  python3 - "$@" <<'P'
import sys
name, mark = sys.argv[1], sys.argv[2].encode() + b"\n"
block = (mark * 4096)[:4096]
at, place = 0, None
with open(name, "rb", buffering=1 << 20) as f:
    while piece := f.read(4096):
        if piece == block:
            place = at
        at += len(piece)
sys.exit(print(place) if place is not None else f"{name} holds no block of {mark}")
P
}
# Flip the lowest bit of one byte behind everyone's back.
flip_bit() { # FILE OFFSET
  local byte
  byte=$(dd if="$1" bs=1 skip="$2" count=1 status=none | od -An -tu1)
  printf %b "\\x$(printf %x $((byte ^ 1)))" | dd of="$1" bs=1 seek="$2" conv=notrunc,fsync status=none
}
# Make one 4096-byte block of a device say its name: mark_block DEVICE BLOCK NAME.
mark_block() { head -c 4096 <(yes "$3") | dd of="$1" bs=4096 seek="$2" oflag=direct iflag=fullblock conv=notrunc,fsync status=none; }

# --- loads -----------------------------------------------------------------------------------------
# A load goes on until it is told to end, so that what a test does meanwhile may take as long as it likes.

# Starts a load in the background, as $load. The command must end when there is a file /run/end.
start_load() {
  rm -f /run/end
  "$@" & load=$!
}
end_load() { touch /run/end; wait "$load"; }
# A load of fio's.
start_fio() { # OF FIO...
  start_load fio --name=load --filename="$disk" --ioengine=libaio --direct=1 --time_based --runtime=1d --trigger-file=/run/end \
    --aux-path=/run --output=/run/fio "$@"
  goes_on
}
end_fio() { end_load || { tail -n 30 /run/fio; die 'fio saw an error'; }; }
# A load whose every block is known by its version, on 512 blocks from FIRST on for each thread: see versions.py. It has
# written all of them once when this returns.
start_writer() { # FIRST THREADS
  rm -f /run/versions
  start_load versions write "$disk" "$1" "$2" /run/table /run/end
  wait_for has_filled
}
has_filled() { grep -qs '^filled' /run/versions || { loads; false; }; }
# Its end. 11: an error must have reached it.
end_writer() { # [EXIT CODE]
  local code=0
  end_load || code=$?
  cat /run/versions
  judge "$code" "${1:-0}"
}
# Each block reads as what it may.
check_versions() {
  local code=0
  versions check "$disk" /run/table || code=$?
  cat /run/versions
  judge "$code" 0
}
versions() { python3 tests/vm/versions.py "$@" >/run/versions; }
# What an exit code of versions.py means, where it is not the one that is wanted.
judge() { # CODE WANTED
  [ "$1" != "$2" ] || return 0
  case $1 in
    0) die 'no error reached the writer: the test shows nothing';;
    10) die 'a block reads as what it may not be';;
    11) die 'an I/O error';;
    *) die "versions.py itself has failed, with exit code $1";;
  esac
}

# The requests of the device that have been answered: reads, writes, discards and flushes.
answers() { awk '{print $1 + $5 + $12 + $16}' "/sys/block/${disk#/dev/}/stat"; }
# Waits until the load has had so many more: nothing is learnt from a load that has not begun, or stands still.
goes_on() { # [REQUESTS]
  wait_for has_answers $(($(answers) + ${1:-500}))
}
has_answers() { [ "$(answers)" -ge "$1" ] || { loads; false; }; }
loads() { ! gone "$load" || die 'the load has ended by itself'; }
# The requests under way, and those of them that are writes.
under_way() { awk '{print $1 + $2}' "/sys/block/${disk#/dev/}/inflight"; }
writes_under_way() { awk '{print $2}' "/sys/block/${disk#/dev/}/inflight"; }
busy() { [ "$(under_way)" -gt 0 ]; }
writing() { [ "$(writes_under_way)" -gt 0 ]; }
# A load has N requests under way at least, and gets no answer for half a second.
stuck() { # N
  local before
  before=$(answers)
  sleep 0.5
  [ "$(under_way)" -ge "$1" ] && [ "$(answers)" = "$before" ]
}
# An error of its disk has come to the volume's knowledge.
has_failed() {
  ui status -n "$id" --json | jq -e '.latched != null or first(.. | objects | select(has("failed_writes")) | .failed_writes) > 0' >/dev/null
}

# A real tree: hundreds of small files and a few large ones.
plant() {
  mkdir "$1/tree"
  cp -a /usr/include/linux /usr/bin/qemu-system-x86_64 /usr/bin/busybox "$1/tree/"
  checksums "$1" >/run/checksums
}
checksums() { (cd "$1/tree" && find . -type f -print0 | sort -z | xargs -0 sha256sum); }
same_tree() { checksums "$1" | cmp - /run/checksums || die "the tree in $1 has changed"; }

# A file system's life on the device: make it, fill it, check it, see it again after the volume was
# closed and opened: file_system "MAKE" "CHECK" (of the unmounted device) ["SCRUB" (of the mount)].
file_system() {
  mkdir -p /mnt/t
  format
  add
  step "make: $1"
  $1 "$disk"
  mount "$disk" /mnt/t
  step 'fill'
  plant /mnt/t
  rm -r /mnt/t/tree/linux/netfilter
  checksums /mnt/t >/run/checksums
  [ -z "${3:-}" ] || { step "scrub: $3"; $3 /mnt/t; }
  umount /mnt/t
  step "check: $2"
  $2 "$disk"
  step 'mount again'
  mount "$disk" /mnt/t
  same_tree /mnt/t
  umount /mnt/t
  remove
  step 'the whole volume, offline'
  check_closed
  add
  step 'open again, mount again'
  mount "$disk" /mnt/t
  same_tree /mnt/t
  [ -z "${3:-}" ] || $3 /mnt/t
  umount /mnt/t
  $2 "$disk"
  [ "$(counter mismatches)" = 0 ] || die 'mismatches on an honest disk'
  remove
}

# A device that can be suspended, or made to fail, between the volume and a disk, or a part of one.
linear() { # NAME DISK [MIB [FIRST MIB]]
  local sectors=${3:+$(($3 * 2048))}
  dm "$1" "0 ${sectors:-$(blockdev --getsz "$2")} linear $2 $((${4:-0} * 2048))"
}
dm() { # NAME TABLE
  dmsetup create "$1" --noudevsync --table "$2"
  dmsetup mknodes "$1"
}
table() { # NAME TABLE: a new table in place of the old, without waiting for what is under way
  dmsetup suspend --noflush --nolockfs --noudevsync "$1"
  dmsetup load "$1" --table "$2"
  dmsetup resume --noudevsync "$1"
}
suspend() { dmsetup suspend --noflush --nolockfs --noudevsync "$1"; }
resume() { dmsetup resume --noudevsync "$1"; }
unlinear() { dmsetup remove --noudevsync "$1"; }
