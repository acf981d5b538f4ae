#!/bin/bash
# many-volumes - twelve volumes with defaults in 1.5 GiB: the later ones get less or are refused, and the machine lives
# vm: memory=1536 long
. tests/vm/lib.sh
# Nothing may be killed for memory: a daemon can't be, and then the kernel panics.
no_kills() { if dmesg | grep -E 'Out of memory|oom-kill|invoked oom'; then die 'memory ran out'; fi; }
mkfs.ext4 -qF /dev/vda
mkdir -p /mnt/d
mount /dev/vda /mnt/d
for n in $(seq 12); do ui format --data "/mnt/d/$n" --create --size 32M --key-file $key >/dev/null; done

step 'two at a time, until there are twelve or memory is short'
served=() refusals=0
add_one() { # VOLUME
  local code=0
  ui add --data "/mnt/d/$1" --key-file $key >"/run/out.$1" 2>"/run/err.$1" || code=$?
  echo $code >"/run/code.$1"
}
for n in 1 3 5 7 9 11; do
  add_one $n & first=$!
  add_one $((n + 1)) & second=$!
  wait $first $second
  for one in $n $((n + 1)); do
    cat "/run/err.$one"
    case $(cat "/run/code.$one") in
      0) served+=("$(cat "/run/out.$one")");;
      3) refusals=$((refusals + 1))
         [ "$(wc -l <"/run/err.$one")" = 1 ] || die 'not one line'
         grep -q 'MemAvailable' "/run/err.$one" || die 'without the numbers';;
      *) die "exit code $(cat "/run/code.$one")";;
    esac
  done
done
grep MemAvailable /proc/meminfo
echo "${#served[@]} served, $refusals refused"
[ ${#served[@]} -ge 4 ] || die 'too few'
total=$(awk '/^MemTotal/ {print $2}' /proc/meminfo)
[ "$(awk '/^MemAvailable/ {print $2}' /proc/meminfo)" -gt $((total / 16)) ] || die 'too little is left'
no_kills

step 'what was asked for and does not fit is refused at once'
ui format --data /mnt/d/more --create --size 32M --key-file $key >/dev/null
refused 3 ui add --data /mnt/d/more --key-file $key --cache 1G

step 'all of them serve'
writers=()
for disk in "${served[@]}"; do
  head -c 16M <(yes "this is $disk") | dd of="$disk" bs=1M iflag=fullblock oflag=direct status=none & writers+=($!)
done
for pid in "${writers[@]}"; do wait "$pid" || die 'a writer failed'; done
for disk in "${served[@]}"; do dd if="$disk" bs=1M count=16 iflag=direct status=none | cmp -n 16777216 - <(yes "this is $disk"); done
no_kills

step 'one whose daemon was killed comes back'
disk=${served[0]} id=${served[0]#/dev/ublkb}
pid=$(daemon)
kill -9 "$pid"
wait_for gone "$pid"
ui recover -n "$id" --key-file $key
dd if="$disk" bs=1M count=16 iflag=direct status=none | cmp -n 16777216 - <(yes "this is $disk")

step 'and all end'
ui del -a
umount /mnt/d
if compgen -G '/run/ublk-integrity/*.memory'; then die 'a promise outlived its daemon'; fi
no_kills
