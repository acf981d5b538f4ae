#!/bin/bash
# attach - volumes of a table: attached by name, mounted, recovered after a kill, detached; what udev and systemd are told
# vm: disks=1G,256M,512M,256M
. tests/vm/lib.sh
tab=/run/tab
listed() { ui list --json | jq -e --arg name "$1" '[.[] | select(.name == $name)] | length == 1' >/dev/null; }
pid_of() { ui list --json | jq -e --arg name "$1" '.[] | select(.name == $name) | .pid'; }
attach() { ui attach --table $tab "$@"; }

# One whose metadata is elsewhere, by a path; one by its UUID, which nobody but us can find here.
ui format --data /dev/vda --meta /dev/vdb --key-file $key --force
ui format --data /dev/vdc --key-file $key --force
uuid=$(ui dump --data /dev/vdc --json | jq -r .volume.uuid)
cat >$tab <<T
# NAME DATA KEY OPTIONS
home   /dev/vda    $key   meta=/dev/vdb,cache=8M
srv    UUID=$uuid  $key   queues=1,no-discard
later  /dev/vde    $key   noauto
T

step 'attach all: each has its name, its options and its link'
attach --all >/run/attached
cat /run/attached
[ "$(wc -l </run/attached)" = 2 ] || die 'not two devices'
ui list
for name in home srv; do listed $name || die "$name is not in the list"; done
ui status -n home
ui status -n home | grep -q '^name  *home$' || die 'no name in status'
ui status -n /dev/ublk-integrity/srv --json | jq -e --arg uuid "$uuid" '.name == "srv" and .uuid == $uuid and .queues == 1 and .discard == false'
ui status -n home --json | jq -e '.cache == 8388608 and .meta == "/dev/vdb"'
for name in home srv; do mkfs.ext4 -q /dev/ublk-integrity/$name; mkdir -p /mnt/$name; mount /dev/ublk-integrity/$name /mnt/$name; done
step 'again: nothing to do; one by its name, or with a name that is taken: refused'
[ -z "$(attach --all)" ] || die 'something was attached again'
refused 5 attach home
refused 5 ui add --data /dev/vdd --key-file $key --name home
refused 5 ui add --data /dev/vdd --key-file $key --name home --or-recover

step 'udev-probe names what the disks hold, and what is served'
probe() { ui udev-probe "$1" | tee /run/probe; }
probe /dev/vdc
grep -qx "ID_FS_UUID=$uuid" /run/probe
grep -qx 'ID_FS_TYPE=ublk_integrity' /run/probe
probe /dev/vda
grep -qx 'ID_FS_TYPE=ublk_integrity_data' /run/probe
probe "$(readlink -f /dev/ublk-integrity/srv)"
grep -qx 'UBLK_INTEGRITY_NAME=srv' /run/probe
grep -qx "UBLK_INTEGRITY_UUID=$uuid" /run/probe
refused 4 ui udev-probe /dev/vdd

step 'detach refuses while it is mounted'
refused 5 ui detach home
refused 5 ui detach srv
[ -e /dev/ublk-integrity/home ] || die 'the link is gone'

step 'a daemon that is killed: the name stays with the device, and attach recovers it'
echo before >/mnt/home/file
sync -f /mnt/home
pid=$(pid_of home)
kill -9 "$pid"
wait_for gone "$pid"
refused 5 ui add --data /dev/vdd --key-file $key --name home
attach home
[ "$(pid_of home)" != "$pid" ] || die 'no new daemon'
[ "$(ui list --json | jq length)" = 2 ] || die 'another device was made'
echo after >>/mnt/home/file
sync -f /mnt/home
[ "$(paste -sd' ' /mnt/home/file)" = 'before after' ] || die 'the file has changed'
step 'the same of two at once, by attach --all'
for name in home srv; do kill -9 "$(pid_of $name)"; done
dead() { ui list --json | jq -e 'all(.pid == null)' >/dev/null; }
wait_for dead
attach --all
for name in home srv; do pid_of $name; done

step 'detach all, and their names and links go'
umount /mnt/home /mnt/srv
ui detach --all --table $tab
[ "$(ui list --json)" = '[]' ] || die 'some are left'
[ -z "$(ls -A /dev/ublk-integrity)" ] || die 'links are left'
left=$(find /run/ublk-integrity -name 'name-*')
[ -z "$left" ] || die "left: $left"
check_clean --meta /dev/vdb
data=/dev/vdc check_closed

step 'the search for a volume passes over what lies on a device whose daemon is dead'
attach home
dm above '0 2048 linear /dev/ublk-integrity/home 0'
pid=$(pid_of home)
kill -9 "$pid"
wait_for gone "$pid"
timeout $patience "$ublk_integrity" attach --table $tab srv || die "exit code $?"
attach home
unlinear above
ui detach --all --table $tab

step 'a line that can not be attached: the others are, and the exit code tells; nofail does not'
echo "bad /dev/nowhere $key" >>$tab
code=0
attach --all || code=$?
[ $code = 4 ] || die "exit code $code, not 4"
for name in home srv; do listed $name || die "$name is not in the list"; done
sed -i 's/^bad.*/& nofail/' $tab
attach --all
refused 4 ui detach bad
ui detach srv
ui detach home

step 'as systemd runs it: in the foreground, with what it leaves of privileges, told when it is ready and when it stops'
python3 -c 'import socket
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
s.bind("/run/notify")
while True: print(s.recv(4096).decode(), flush=True)' >/run/notified & notify=$!
wait_for test -S /run/notify
capabilities=$(ui generator --dry-run --table $tab | sed -n 's/^CapabilityBoundingSet=//p' | head -n 1)
bounds=-all
for capability in $capabilities; do capability=${capability#CAP_}; bounds+=,+${capability,,}; done
unit() {
  NOTIFY_SOCKET=/run/notify setpriv --bounding-set "$bounds" --no-new-privs \
    bash -c "exec -a @ublk-integrity $ublk_integrity attach --foreground --table $tab srv" 2>/run/unit & pid=$!
}
ready() { grep -qx READY=1 /run/notified || gone "$pid"; }
unit
wait_for ready
cat /run/notified /run/unit
if gone "$pid"; then die 'it ended'; fi
if grep -i warning /run/unit; then die 'it lacks something'; fi
grep -qx 'STATUS=serving /dev/ublkb0' /run/notified
[ "$(head -c 1 /proc/$pid/cmdline)" = @ ] || die 'systemd would kill it at shutdown'
mount /dev/ublk-integrity/srv /mnt/srv
step 'SIGTERM, as at shutdown: it waits for the mount to go'
kill -TERM $pid
wait_for grep -q 'the device is in use: it is stopped when its last user is gone' /run/unit
# No later look at the users may end it either.
for _ in 1 2 3; do ls /mnt/srv >/dev/null; sleep 1; done
if gone "$pid"; then die 'it ended below the mount'; fi
umount /mnt/srv
wait $pid || die "exit code $?"
grep -qx STOPPING=1 /run/notified || die 'not said'
kill $notify
wait $notify || true
data=/dev/vdc check_closed

step 'the units'
ui generator --dry-run --table $tab >/run/units
grep -qx '=== ublk-integrity@home.service' /run/units

[ -x /lib/systemd/systemd-udevd ] || { echo 'no udev here: its rules are not tried'; exit 0; }
step 'the links that udev makes'
mkdir -p /run/udev/rules.d
sed "s|/usr/bin/ublk-integrity|$ublk_integrity|" dist/udev/61-ublk-integrity.rules >/run/udev/rules.d/61-ublk-integrity.rules
/lib/systemd/systemd-udevd >/run/udevd 2>&1 & udevd=$!
wait_for test -S /run/udev/control
udevadm trigger --action=add --subsystem-match=block
udevadm settle --timeout=120
udevadm info /dev/vdc
[ "$(readlink -f "/dev/disk/by-uuid/$uuid")" = /dev/vdc ] || die 'the UUID does not lead to the disk'
udevadm info -q property /dev/vdc | grep -qx ID_FS_TYPE=ublk_integrity || die 'no type'
attach srv
wait_for test -e "/dev/disk/by-id/ublk-integrity-$uuid"
wait_for test -e /dev/ublk-integrity/srv
ui list --json | jq -e --arg path "/dev/disk/by-uuid/$uuid" '.[0].data == $path' || die 'not opened by the link'
echo 'start=2048' | sfdisk -q /dev/ublk-integrity/srv
wait_for test -e /dev/ublk-integrity/srv-part1
wait_for test -e "/dev/disk/by-id/ublk-integrity-$uuid-part1"
udevadm settle --timeout=120
ui detach srv
udevadm settle --timeout=120
[ ! -e /dev/ublk-integrity/srv ] || die 'the link is left'
step 'a volume on a partition is found by its UUID, too'
echo 'label: gpt
start=2048' | sfdisk -q --wipe always /dev/vdd
udevadm settle --timeout=120
ui format --data /dev/vdd1 --key-file $key --force
udevadm trigger --action=change /dev/vdd1
udevadm settle --timeout=120
udevadm info /dev/vdd1
part=$(ui dump --data /dev/vdd1 --json | jq -r .volume.uuid)
udevadm info -q property /dev/vdd1 | grep -qx ID_PART_TABLE_TYPE=gpt || die 'it has nothing of its disk: the test shows nothing'
udevadm info -q property /dev/vdd1 | grep -qx ID_FS_TYPE=ublk_integrity || die 'no type'
[ "$(readlink -f "/dev/disk/by-uuid/$part")" = /dev/vdd1 ] || die 'the UUID does not lead to the partition'
echo "part UUID=$part $key" >>$tab
attach part
ui list --json | jq -e --arg path "/dev/disk/by-uuid/$part" '.[0].data == $path' || die 'not opened by the link'
ui detach part
udevadm settle --timeout=120
wipefs -aq /dev/vdd1 /dev/vdd
kill $udevd
wait $udevd || true
rm -rf /run/udev
