#!/bin/bash
# systemd - a Debian whose init serves volumes: package, boot, hand-over by reload, shutdown, credentials; three boots
# vm: long image boots=3 disks=256M,128M,64M memory=1024 limit=600
. tests/vm/lib.sh
ublk_integrity=/usr/bin/ublk-integrity
boot=$1
unit=ublk-integrity@home

# systemd's word for the unit, and whether it takes the daemon for its main process.
shows() { systemctl show --property="$1" --value "$unit"; }
main() { shows MainPID; }
served() { # [NAME]
  local state pid name=${1:-home}
  state=$(shows ActiveState) pid=$(main)
  [ "$state" = active ] || { systemctl status --no-pager "$unit"; die "the unit is $state"; }
  grep -q "/$unit.service$" "/proc/$pid/cgroup" || die "the main process is in $(cat "/proc/$pid/cgroup")"
  [ "$pid" = "$(daemon_of "$name")" ] || { systemctl status --no-pager "$unit"; die "main process $pid, daemon $(daemon_of "$name")"; }
}
daemon_of() { ui list --json | jq -r --arg name "$1" '.[] | select(.name == $name) | .pid'; }
# It serves, and another process does.
followed() { served; [ "$(main)" != "$1" ] || die 'no new daemon'; gone "$1" || die "the daemon before, $1, lives"; }
second() { cmp -s "/proc/$(main)/exe" /usr/bin/ublk-integrity; }
package() { dpkg "$@" >/run/dpkg 2>&1 || { cat /run/dpkg; return 1; }; }
# What the journal has of the unit, of boot N.
journal() { journalctl -b "$1" -u "$unit" --no-pager -o cat; }
sums() { (cd /home && sha256sum -c --quiet sums) || die "the files in /home have changed"; }

# The daemon that was started by hand, below /hand, and that it is in no session.
hand() { ui list --json | jq -r '.[] | select(.id == 9) | .pid'; }
apart() {
  grep -qE '^0::/system.slice/ublk-integrity-[0-9]+-[0-9a-f]{8}\.scope$' "/proc/$(hand)/cgroup" || die "it is in $(cat "/proc/$(hand)/cgroup")"
  [ "$(head -c 1 "/proc/$(hand)/cmdline")" = @ ] || die 'systemd would kill it at the end of a shutdown'
}
# What passes for a session of somebody's, with a command in it.
session() { # NUMBER COMMAND...
  systemd-run --quiet --scope --slice=user.slice --unit="session-$1.scope" "${@:2}" & session=$!
  wait_for test -d "/sys/fs/cgroup/user.slice/session-$1.scope"
}
end_session() { systemctl stop "session-$1.scope"; wait $session || true; }

# A writer on the mounted volume: an error of it is a failure.
start_writing() {
  # shellcheck disable=SC2016 # it is for the shell that runs it
  start_load bash -c 'n=0; while [ ! -e /run/end ]; do n=$((n + 1)); echo $n >/home/counter && sync -f /home/counter || exit 1; done'
}
counted() { cat /home/counter 2>/dev/null || true; }
writes_on() {
  local before
  before=$(counted)
  counts() { loads && [ "$(counted)" != "$before" ]; }
  wait_for counts
}

first_boot() {
  step 'the package is installed; nothing of it runs by itself'
  package -i /out/first.deb || die 'it does not install'
  for other in ublk-integrity-metrics.service ublk-integrity-monitor.service ublk-integrity-scrub@home.timer; do
    [ "$(systemctl is-enabled $other || true)" = disabled ] || die "$other is $(systemctl is-enabled $other)"
  done
  getent group ublk-integrity >/dev/null || die 'there is no group'
  ui doctor || true
  step 'a new disk becomes a file system'
  install -d -m 700 /etc/ublk-integrity-keys.d
  ui keygen /etc/ublk-integrity-keys.d/home.key
  ui format --data /dev/vda --size 64M --max-size 128M --key-file /etc/ublk-integrity-keys.d/home.key
  uuid=$(ui dump --data /dev/vda --json | jq -r .volume.uuid)
  echo "home UUID=$uuid" >>/etc/ublk-integritytab
  udevadm trigger --settle /dev/vda
  [ "$(readlink -f "/dev/disk/by-uuid/$uuid")" = /dev/vda ] || die 'the UUID does not lead to the disk'
  systemctl daemon-reload
  systemctl start $unit
  served
  [ "$(shows Type)" = notify ]
  [ "$(shows StatusText)" = 'serving /dev/ublkb0' ] || die "status: $(shows StatusText)"
  wait_for test -b /dev/ublk-integrity/home
  wait_for test -b "/dev/disk/by-id/ublk-integrity-$uuid"
  step 'udev deals with the events of a disk while it is served'
  # shellcheck disable=SC2016 # of the shell that has the lock
  flock --exclusive /dev/vdc sh -c 'udevadm trigger /dev/vdc && ! udevadm settle --timeout=3' || die 'the test shows nothing'
  udevadm settle
  udevadm trigger /dev/vda
  udevadm settle --timeout=10 || die 'they are put off'
  mkfs.ext4 -q /dev/ublk-integrity/home
  echo '/dev/ublk-integrity/home /home ext4 defaults 0 2' >>/etc/fstab
  systemctl daemon-reload
  mount /home
  head -c 8M /dev/urandom >/home/file
  (cd /home && sha256sum file >sums)

  step 'another version of the package, below the mounted file system'
  start_writing
  writes_on
  pid=$(main)
  package -i /out/second.deb || die 'the new version does not install'
  cat /run/dpkg
  served
  [ "$(main)" = "$pid" ] || die 'the daemon was restarted'
  grep -q "systemctl reload 'ublk-integrity@\*'" /run/dpkg || die 'nobody is told what to do'
  ui list | grep -q 'from a file that was replaced' || die "list: $(ui list)"
  writes_on
  step 'systemctl reload: the new program serves'
  systemctl reload $unit || { journal 0; die 'the reload fails'; }
  followed "$pid"
  second || die 'it is not the program that is installed'
  journal 0 | tail -n 5
  writes_on
  step 'again, by hand: by way of systemd, too'
  pid=$(main)
  ui upgrade -n home | tee /run/line
  grep -q 'requests waited' /run/line || die 'it is not said'
  followed "$pid"
  [ "$(head -c 1 "/proc/$(main)/cmdline")" = @ ] || die 'systemd would kill it at shutdown'
  grep -q '^NoNewPrivs:.*1' "/proc/$(main)/status" || die 'it has not the limits of the unit'
  ui upgrade --all | grep -qx 'upgraded 0, up to date 1, not upgraded 0' || die 'done twice'
  step 'a program that can not serve: refused beforehand, or the one of before has the device back'
  pid=$(main)
  printf '#!/bin/sh\nexit 3\n' >/run/fake && chmod +x /run/fake
  refused 4 ui upgrade -n home --binary /run/fake
  [ "$(main)" = "$pid" ] || die 'another daemon'
  # It takes longer than systemd would wait for a start, and is waited for all the same.
  mkdir -p /run/systemd/system/$unit.service.d
  printf '[Service]\nTimeoutStartSec=10s\n' >/run/systemd/system/$unit.service.d/short.conf
  systemctl daemon-reload
  [ "$(shows TimeoutStartUSec)" = 10s ] || die "limit $(shows TimeoutStartUSec): the test shows nothing"
  printf '#!/bin/sh\necho R 9.9.9; read -r end; sleep 25; exit 1\n' >/run/fake
  refused 4 ui upgrade -n home --binary /run/fake
  if journal 0 | grep -i 'timed out'; then die 'the reload was cut short'; fi
  rm -r /run/systemd/system/$unit.service.d
  systemctl daemon-reload
  grep -q 'is served by the program of before' /run/err || die 'it is not said who serves'
  followed "$pid"
  writes_on
  step 'and that hands over again'
  pid=$(main)
  systemctl reload $unit || { journal 0; die 'the reload fails'; }
  followed "$pid"
  writes_on
  step 'it grows in use'
  pid=$(main)
  ui resize -n home
  followed "$pid"
  [ "$(blockdev --getsize64 /dev/ublk-integrity/home)" = $((128 << 20)) ] || die 'it has not grown'
  resize2fs /dev/ublk-integrity/home
  writes_on
  step 'a daemon that is killed is followed by another'
  pid=$(main)
  systemctl kill --signal=SIGKILL $unit
  another() { [ "$(main)" != "$pid" ] && [ "$(main)" != 0 ] && [ "$(shows ActiveState)" = active ]; }
  wait_for another
  served
  writes_on
  step 'the package can not go while it serves'
  for how in -r -P; do
    if package $how ublk-integrity; then die "dpkg $how has removed it"; fi
    grep -q 'del -a' /run/dpkg || { cat /run/dpkg; die 'it is not said what to do'; }
  done
  # Installed, whatever was wanted of it.
  [[ $(dpkg-query -Wf '${db:Status-Abbrev}' ublk-integrity) = ?'i ' ]] || die "$(dpkg-query -l ublk-integrity)"
  served
  end_load
  sums
  step 'stop, after all that: the daemon that serves ends, and closes the volume'
  systemctl reload $unit
  umount /home
  systemctl stop $unit
  [ "$(shows ActiveState) $(shows Result)" = 'inactive success' ] || die "$(shows ActiveState), $(shows Result)"
  [ -z "$(daemon_of home)" ] || die 'a daemon is left'
  key=/etc/ublk-integrity-keys.d/home.key data=/dev/vda check_closed
  step 'a daemon that is started in a session does not end with that, nor does the one that follows it'
  ui keygen /root/hand.key
  ui format --data /dev/vdb --key-file /root/hand.key
  session 8 bash -c "$ublk_integrity add -n 9 --data /dev/vdb --key-file /root/hand.key >/run/added && exec sleep 1d"
  wait_for grep -sx /dev/ublkb9 /run/added
  apart
  pid=$(hand)
  end_session 8
  [ "$(hand)" = "$pid" ] || die 'it has ended with the session'
  ui upgrade -n 9
  apart
  [ "$(hand)" != "$pid" ] || die 'no new daemon'
  step 'nor does one that the program of before brings back: it is where the one before was'
  pid=$(hand)
  printf '#!/bin/sh\necho R 9.9.9; read -r end; exit 1\n' >/run/fake
  if ui upgrade -n 9 --binary /run/fake 2>/run/err; then die 'it serves'; fi
  grep 'is served by the program of before' /run/err || die "$(cat /run/err)"
  [ "$(hand)" != "$pid" ] || die 'no new daemon'
  apart
  step 'one that is in a session, as of an older program: it is named, and the next one is not'
  session 7 sleep 1d
  hand >/sys/fs/cgroup/user.slice/session-7.scope/cgroup.procs
  { ui doctor || true; } | grep 'sessions.*session-7.scope.*upgrade -n 9' || die "$(ui doctor)"
  ui upgrade -n 9
  apart
  end_session 7
  mkfs.ext4 -q /dev/ublkb9
  mkdir -p /hand
  mount /dev/ublkb9 /hand

  step 'one that was started by hand is taken over by the unit'
  ui attach home
  pid=$(daemon_of home)
  systemctl start $unit
  served
  [ "$(main)" = "$pid" ] || die 'another daemon'
  mount /home
  sums
  head -c 3M /dev/urandom >/root/unsynced
  sync
  step 'the shutdown comes before anybody has synced what is on the volume that was started by hand'
  cp /root/unsynced /hand/
}

second_boot() {
  step 'at boot: the volume is served, and its file system mounted'
  findmnt /home || { systemctl status --no-pager $unit home.mount; die '/home is not mounted'; }
  served
  second || die 'it is not the program that is installed'
  sums
  nothing_failed
  step 'the shutdown before this boot has closed the volume'
  journal -1 | tac | sed '/^Stopping/q' | tac >/run/end-before
  cat /run/end-before
  grep -q 'Deactivated successfully' /run/end-before || die 'it was not stopped in good order'
  if journal 0 | grep 'recovery of'; then die 'it was not closed'; fi
  if grep -E 'SIGKILL|status=|Failed' /run/end-before; then die 'it was not stopped in good order'; fi

  step 'and that which was started by hand, below what was mounted there'
  journalctl -b -1 --no-pager -o cat -u 'ublk-integrity-*.scope' -u hand.mount
  if journalctl -b -1 --no-pager -o cat -u 'ublk-integrity-*.scope' | grep -E 'SIGKILL|timed out|Failed'; then die 'it was not stopped in good order'; fi
  key=/root/hand.key data=/dev/vdb check_closed
  ui add -n 9 --data /dev/vdb --key-file /root/hand.key
  mount /dev/ublkb9 /hand
  cmp /root/unsynced /hand/unsynced || die 'what nobody had synced is lost'
  umount /hand
  ui del -n 9

  step 'a pass over the volume, by the unit that the timer starts once a month where it is asked to'
  systemctl start ublk-integrity-scrub@home
  ui scrub -n home --status | tee /run/line
  grep -q '^pass 1 has ended' /run/line || die 'no pass'
  systemctl enable --quiet --now ublk-integrity-scrub@home.timer
  systemctl list-timers --no-pager 'ublk-integrity*'
  systemctl list-timers --no-legend 'ublk-integrity*' | grep -q 'ublk-integrity-scrub@home.service' || die 'no timer'
  systemctl disable --quiet --now ublk-integrity-scrub@home.timer
  step 'a block that rots: an event in the journal, and for the program of the monitor'
  mkdir -p /etc/ublk-integrity
  # shellcheck disable=SC2016 # of the script that is made
  printf '#!/bin/sh\necho "$UBLK_EVENT_CLASS of $UBLK_EVENT_NAME" >>/var/told\n' >/etc/ublk-integrity/on-event
  chmod 755 /etc/ublk-integrity/on-event
  systemctl start ublk-integrity-monitor
  { echo 'this one rots'; head -c 40000 /dev/urandom; } >/home/rots
  sync -f /home/rots
  ui scrub -n home --wait # and with it a checkpoint
  place=$(grep -abo 'this one rots' /dev/vda | tail -n 1)
  flip_bit /dev/vda "${place%%:*}"
  echo 3 >/proc/sys/vm/drop_caches
  if cat /home/rots >/dev/null; then die 'what has rotted was read'; fi
  mismatches() { journalctl -b --no-pager -o cat MESSAGE_ID=7180734fc5164e90ba35a614684cc8e0 UBLK_NAME=home | grep 'does not match its tag'; }
  wait_for mismatches
  wait_for grep -sx 'mismatch of home' /var/told
  wait_for passed_on
  systemctl stop ublk-integrity-monitor
  step 'what comes while there is no monitor is passed on by the next, once'
  ui clear -n home
  rm /var/told
  systemctl start ublk-integrity-monitor
  wait_for grep -sx 'cleared of home' /var/told
  if grep 'mismatch' /var/told; then die 'told twice'; fi
  systemctl stop ublk-integrity-monitor
  step 'the pass of the timer fails where something has rotted, and not when that was written anew'
  if systemctl start ublk-integrity-scrub@home; then die 'it has found nothing'; fi
  [ "$(systemctl show --property=ExecMainStatus --value ublk-integrity-scrub@home)" = 6 ] || die 'for another reason'
  dd if=/dev/zero of=/home/rots bs=4096 count=10 conv=notrunc,fsync status=none
  systemctl start ublk-integrity-scrub@home
  ui clear -n home
  ui status -x

  step 'for the next boot: keys that are credentials, one of them encrypted; a disk that is missing; a volume that stays to the end'
  systemd-creds setup >/dev/null
  mkdir -p /etc/credstore /etc/credstore.encrypted
  systemd-creds encrypt --with-key=host --name=home-key /etc/ublk-integrity-keys.d/home.key /etc/credstore.encrypted/home-key
  mv /etc/ublk-integrity-keys.d/home.key /root/
  ui keygen /etc/credstore/stays-key
  ui format --data /dev/vdb --key-file /etc/credstore/stays-key --force
  sed -i 's/^home .*/& credential:home-key/' /etc/ublk-integritytab
  # And one on a partition, which udev has to find by the volume's UUID. Where there is no sfdisk a table is a few bytes: the
  # partition's type, its first sector (2048) and how many it has (129024).
  printf '\0\0\0\0\203\0\0\0\0\010\0\0\0\370\001\0' | dd of=/dev/vdc bs=1 seek=446 conv=notrunc status=none
  printf '\125\252' | dd of=/dev/vdc bs=1 seek=510 conv=notrunc status=none
  # udev opens a disk that was written, and a disk that is open keeps its table.
  udevadm settle --timeout=30 || true
  blockdev --rereadpt /dev/vdc
  udevadm settle --timeout=30 || true
  wait_for test -b /dev/vdc1
  ui format --data /dev/vdc1 --key-file /etc/credstore/stays-key
  part=$(ui dump --data /dev/vdc1 --json | jq -r .volume.uuid)
  cat >>/etc/ublk-integritytab <<T
stays /dev/vdb credential:stays-key x-initrd.attach
part UUID=$part credential:stays-key nofail,scrub
gone PARTLABEL=nothing - nofail,timeout=10min
T
  systemctl daemon-reload
  systemctl start ublk-integrity@stays
  mkfs.ext4 -q /dev/ublk-integrity/stays
  echo '/dev/ublk-integrity/stays /stays ext4 x-initrd.mount 0 2' >>/etc/fstab
  systemctl daemon-reload
  mkdir -p /stays
  mount /stays
  cp /home/file /home/sums /stays/
}

third_boot() {
  step 'a disk that is missing, with nofail, does not hold the boot up'
  systemctl list-jobs --no-pager
  systemctl list-jobs --no-legend | grep -q 'partlabel.nothing.device.*start' || die 'nothing waits for it: the test shows nothing'
  nothing_failed
  step 'a volume on a partition'
  unit=ublk-integrity@part
  is_up() { [ "$(shows ActiveState)" = active ]; }
  wait_for is_up
  served part
  systemctl list-timers --no-legend 'ublk-integrity*' | grep -q 'ublk-integrity-scrub@part.service' || die 'it has no timer'
  unit=ublk-integrity@home
  step 'keys that are credentials'
  served
  sums
  unit=ublk-integrity@stays served stays
  pid=$(main)
  systemctl reload $unit
  followed "$pid"
  step 'the volume that has stayed to the end: its file system was unmounted'
  (cd /stays && sha256sum -c --quiet sums) || die "the files in /stays have changed"
  journalctl -b -u ublk-integrity@stays --no-pager -o cat
  if journalctl -b -1 -u ublk-integrity@stays -u stays.mount --no-pager -o cat | grep '^\(Stopp\|Unmount\)'; then die 'it was stopped before'; fi
  if dmesg | grep 'EXT4-fs.*recovery complete'; then die 'it was cut off'; fi
  step 'the end: unmounted, stopped, removed; the table and the keys stay'
  umount /home /stays
  systemctl stop $unit ublk-integrity@stays ublk-integrity@part
  [ "$(systemctl is-active ublk-integrity-scrub@part.timer || true)" = inactive ] || die 'a timer has outlived its volume'
  # Any unit that is started asks for all that is to be up at boot.
  systemctl start systemd-tmpfiles-clean.service
  for other in home stays part; do
    unit=ublk-integrity@$other
    [ "$(shows ActiveState)" = inactive ] || die "$other is served again"
  done
  unit=ublk-integrity@home
  systemctl enable --quiet --now ublk-integrity-scrub@home.timer
  key=/root/home.key data=/dev/vda check_closed
  key=/etc/credstore/stays-key data=/dev/vdb check_closed
  package -r ublk-integrity || {
    journalctl -b --no-pager -o short-monotonic -u ublk-integrity@part -u 'ublk-integrity-scrub@*' -u ublk-integrity.target -u systemd-udevd -u init.scope | tail -n 80
    die 'it can not be removed'
  }
  [ ! -e /usr/bin/ublk-integrity ] || die 'the program is left'
  [ ! -e /run/systemd/generator/$unit.service ] || die 'its units are left'
  left=$(find /etc/systemd/system -name 'ublk-integrity*')
  [ -z "$left" ] || die "left: $left"
  package -P ublk-integrity || die 'it can not be purged'
  for file in /etc/ublk-integritytab /root/home.key /etc/credstore/stays-key; do [ -s $file ] || die "$file is gone"; done
  if [ -e /etc/needrestart/conf.d/ublk-integrity.conf ]; then die 'its configuration is left'; fi
}

# But for us nothing is unfinished, and nothing has gone wrong.
nothing_failed() {
  [ -z "$(systemctl list-units --failed --plain --no-legend)" ] || { systemctl list-units --failed --no-pager; die 'units have failed'; }
}

case $boot in
  1) first_boot;;
  2) second_boot;;
  3) third_boot;;
esac
