# lib-crash - the tests of several boots: load, crash, and see that nothing acknowledged is missing.
#
# The test gives: make (on the mounted, empty file system), load (runs until the crash; adds to /out
# what was synced), enough (something was, in this boot), verify (everything in /out is there). Odd boots end in a reset, even ones in a
# power cut, and the last in peace; each but the first verifies first.
# shellcheck shell=bash
. tests/vm/lib.sh
key=/out/key
[ -e $key ] || cp /run/key $key
boot=$1

# What reached the virtual disk stays with the host, so it's the daemon's and the kernel's memory that is lost.
crash() {
  case $boot in
    *[02468]) step 'power cut'; touch /out/power-cut; sleep $patience;;
    *) step 'reset'; echo 1 >/proc/sys/kernel/sysrq; echo b >/proc/sysrq-trigger; sleep $patience;;
  esac
  die 'the crash did not come'
}

crash_test() { # BOOTS
  mkdir -p /mnt/t
  if [ "$boot" = 1 ]; then
    format --log-size 4M # small, so that there are many checkpoints
    add
    mkfs.ext4 -q "$disk"
    mount "$disk" /mnt/t
    make
  else
    step 'check, before anything is opened: no false alarm'
    check_clean
    add
    ui status -n "$id"
    mount "$disk" /mnt/t
    verify
    umount /mnt/t
    e2fsck -fn "$disk"
    mount "$disk" /mnt/t
    [ "$(counter mismatches)" = 0 ] || die 'mismatches after a crash'
  fi
  if [ "$boot" = "$1" ]; then
    umount /mnt/t
    remove
    check_closed
    exit
  fi
  step 'load'
  load & load=$!
  until enough; do loads; sleep 0.2; done
  crash
}
