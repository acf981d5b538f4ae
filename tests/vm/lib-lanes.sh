# lib-lanes - runs tests in guests, side by side; read by scripts/test, whose words for verdicts it uses.
#
#   queue_guests KERNEL NAME...   puts them into the queue, those together that can share a boot
#   run_queue                     runs all of it; what came of them is in the counts of scripts/test

disks=1G,256M,512M:512   # unless a test asks for others
declare -A ran_on=()      # the names of those that really ran, by version
in_guest=(env FULL="$full" SOAK_SECONDS="${SOAK_SECONDS:-}" tests/vm/guest)
# What a test needs in this run, where it says N:N: the latter is for --full.
needs_now() { # NAME KEY DEFAULT
  local need
  need=$(needs "$@")
  if [ -n "$full" ]; then echo "${need#*:}"; else echo "${need%:*}"; fi
}
limit_of() {
  local limit
  limit=$(needs_now "$1" limit 900)
  [ "$1" != soak ] || limit=$((limit + ${SOAK_SECONDS:-0}))
  echo "$limit"
}
ran() { ran_on[$(cat "target/vm/kernel-$2/VERSION")]+=" $1"; } # NAME KERNEL
boot_options() { # NAME: what it needs, as options of scripts/vm, disks apart
  echo "-m $(needs "$1" memory 2048) -c $(needs_now "$1" cpus 2) -H $(needs "$1" hung 120)"
}
# Take a guest's word for a test: result NAME KERNEL FOLDER [SECONDS], false if there is none.
result() {
  local verdict rest
  read -r verdict rest 2>/dev/null <"$3/$1.result" || return 1
  case $verdict in
    passed) ran "$1" "$2"; pass "$1 on $2 (${4:-$rest} s)";;
    skipped) skip "$1 on $2: $rest";;
    *) ran "$1" "$2"; fail "$3/$1.log" "$1 on $2: $rest";;
  esac
}
sum_of_limits() { local name sum=60; for name; do sum=$((sum + $(limit_of "$name"))); done; echo $sum; }

# Tests that share a boot. One that fails ends its guest, which may be in any state; the rest go on in a new one.
run_together() { # KERNEL FOLDER NAME...
  local kernel=$1 folder=$2 todo spec name left said=$2/guest.log console=$2/console
  shift 2
  todo=("$@")
  while [ ${#todo[@]} -gt 0 ]; do
    local options=()
    # shellcheck disable=SC2207 # options are words
    options=($(boot_options "${todo[0]}"))
    for spec in $(needs "${todo[0]}" disks $disks | tr , ' '); do options+=(-d "$spec"); done
    scripts/vm -k "$kernel" "${options[@]}" -o "$folder" -l "$console" -t "$(sum_of_limits "${todo[@]}")" \
      -- "${in_guest[@]}" "${todo[@]}" >"$said" 2>&1
    left=()
    for name in "${todo[@]}"; do
      if result "$name" "$kernel" "$folder"; then continue; fi
      if [ ${#left[@]} = 0 ] && [ -e "$folder/$name.log" ]; then
        cat "$said" "$console" >>"$folder/$name.log"
        ran "$name" "$kernel"
        fail "$folder/$name.log" "$name on $kernel: the guest did not survive it"
      else left+=("$name"); fi
    done
    if [ ${#left[@]} = ${#todo[@]} ]; then
      for name in "${left[@]}"; do fail "$said" "$name on $kernel: the guest did not start"; done
      return
    fi
    todo=("${left[@]}")
  done
}

# The disks of a test, as files in a folder; the caller's `options` of scripts/vm name them from then on.
make_disks() { # NAME FOLDER
  local spec n=0
  mkdir -p "$2"
  for spec in $(needs "$1" disks $disks | tr , ' '); do
    truncate -s "${spec%%:*}" "$2/$n"
    case $spec in *:*) options+=(-d "$2/$n:${spec#*:}");; *) options+=(-d "$2/$n");; esac
    n=$((n + 1))
  done
}

# What a test in an image of its own needs from the host; false, with its verdict, where that can't be had.
prepare_image() { # FOLDER NAME
  local folder=$1 name=$2 image status=0
  image=$(scripts/debian 2>"$folder/$name.host") || status=$?
  if [ $status = 77 ]; then
    skip "$name: scripts/debian: $(tail -n 1 "$folder/$name.host")"
    return 1
  fi
  if [ $status != 0 ] || ! cp --sparse=always "$image" "$folder/disks/root" ||
    ! "tests/vm/$name.prepare" "$folder" >>"$folder/$name.host" 2>&1; then
    fail "$folder/$name.host" "$name: what it needs of the host"
    return 1
  fi
}

# A test of several boots over the same disks.
run_boots() { # KERNEL FOLDER NAME BOOTS
  local kernel=$1 folder=$2 name=$3 boots=$4 boot status options=() since=$SECONDS said=$2/guest.log
  # shellcheck disable=SC2207 # options are words
  options=($(boot_options "$name"))
  make_disks "$name" "$folder/disks"
  # A crash is what the test makes; a shutdown is how its guest ends when it has passed.
  local ends='126|137' power_cut=-K
  if [ -n "$(needs "$name" image '')" ]; then
    prepare_image "$folder" "$name" || return
    options+=(-R "$folder/disks/root") ends=0 power_cut=''
  fi
  for boot in $(seq "$boots"); do
    # shellcheck disable=SC2086 # an option or nothing
    scripts/vm -k "$kernel" "${options[@]}" $power_cut -o "$folder" -l "$folder/console" -t "$(limit_of "$name")" \
      -- "${in_guest[@]}" -b "$boot" "$name" >"$said" 2>&1
    status=$?
    if [ -e "$folder/$name.result" ]; then break; fi
    if ! [[ $status =~ ^($ends)$ ]]; then
      cat "$said" >>"$folder/$name.log"
      break
    fi
  done
  rm -rf "$folder/disks"
  result "$name" "$kernel" "$folder" $((SECONDS - since)) || fail "$folder/$name.log" "$name on $kernel: boot $boot ended with $status"
}

# A test of several guests at the same time, on the same disks. Each is told its number, and sees /out/shared.
run_guests() { # KERNEL FOLDER NAME GUESTS
  local kernel=$1 folder=$2 name=$3 guests=$4 guest options=() since=$SECONDS pids=()
  # shellcheck disable=SC2207 # options are words
  options=($(boot_options "$name"))
  rm -rf "$folder/shared"
  mkdir -p "$folder/shared"
  make_disks "$name" "$folder/disks"
  for guest in $(seq "$guests"); do
    scripts/vm -S -k "$kernel" "${options[@]}" -o "$folder" -l "$folder/console.$guest" -t "$(limit_of "$name")" \
      -- "${in_guest[@]}" -b "$guest" "$name" >"$folder/guest.$guest.log" 2>&1 &
    pids+=($!)
  done
  wait "${pids[@]}"
  rm -rf "$folder/disks"
  for guest in $(seq 2 "$guests"); do
    if grep -qs '^passed' "$folder/$name.$guest.result"; then continue; fi
    { echo "--- guest $guest"; cat "$folder/$name.$guest.log" "$folder/guest.$guest.log"; } >>"$folder/$name.log"
    echo "failed guest $guest: $(cat "$folder/$name.$guest.result" 2>/dev/null)" >"$folder/$name.result"
  done
  result "$name" "$kernel" "$folder" $((SECONDS - since)) || fail "$folder/guest.1.log" "$name on $kernel: a guest did not survive it"
}

# Guests run side by side, in lanes, each with a folder of its own: whichever is free takes the next line of the queue. Most
# tests wait more than they compute.
queue=$logs/queue.$$
most_together=8 # tests in a boot, so that neither lane has all of them
lanes=1
[ "$(nproc)" -lt 2 ] || [ "$(awk '/^MemAvailable/ {print int($2 / 1048576)}' /proc/meminfo)" -lt 8 ] || lanes=2

# Puts the tests into the queue: queue_guests KERNEL NAME...
queue_guests() {
  local kernel=$1 name key
  local -A groups=() count=()
  shift
  scripts/kernel "$kernel" >"$logs/kernel-$kernel.log" 2>&1 || { fail "$logs/kernel-$kernel.log" "fetching kernel $kernel"; return; }
  for name; do
    if [ "$(needs "$name" boots 1)" -gt 1 ]; then
      echo "boots $kernel $name" >>"$queue"
      continue
    fi
    if [ "$(needs "$name" guests 1)" -gt 1 ]; then
      echo "guests $kernel $name" >>"$queue"
      continue
    fi
    key="$(boot_options "$name") $(needs "$name" disks $disks)"
    key+=" $((count[$key]++ / most_together))"
    groups[$key]+=" $name"
  done
  for key in "${!groups[@]}"; do echo "together $kernel${groups[$key]}" >>"$queue"; done
}
next_in_queue() {
  (
    flock 9
    head -n 1 "$queue"
    sed -i 1d "$queue"
  ) 9>"$queue.lock"
}
# One lane, a process of its own: what it has to tell comes back in a file, after each line of the queue.
run_lane() { # LANE
  local lane=$1 what kernel names folder
  while read -r what kernel names < <(next_in_queue); do
    passed=0 failed=0 skipped=0 failures=() ran_on=()
    folder=$logs/$kernel-lane-$lane
    mkdir -p "$folder"
    # shellcheck disable=SC2086 # the names are words
    case $what in
      together) run_together "$kernel" "$folder" $names;;
      guests) run_guests "$kernel" "$folder" "$names" "$(needs "$names" guests 1)";;
      boots) run_boots "$kernel" "$folder" "$names" "$(needs "$names" boots 1)";;
    esac
    {
      for name in "${failures[@]}"; do echo "failure $name"; done
      for name in "${!ran_on[@]}"; do echo "ran $name${ran_on[$name]}"; done
      # shellcheck disable=SC2086 # likewise
      echo "counts $passed $failed $skipped $(wc -w <<<"$names")"
    } >>"$queue.lane-$lane"
  done
}
lane_pids=()
# shellcheck disable=SC2317 # called by the trap
end_lanes() { local group; for group in "${lane_pids[@]}"; do kill -- "-$group" 2>/dev/null; done; }
run_queue() {
  local lane word rest p f i n version wanted done=0
  wanted=$(awk '{n += NF - 2} END {print n + 0}' "$queue")
  for lane in $(seq $lanes); do
    set -m # a process group, which ends as one
    run_lane "$lane" &
    set +m
    lane_pids+=($!)
  done
  wait "${lane_pids[@]}"
  lane_pids=()
  while read -r word rest; do
    case $word in
      counts) read -r p f i n <<<"$rest"; passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + i)) done=$((done + n));;
      failure) failures+=("$rest");;
      ran) read -r version rest <<<"$rest"; ran_on[$version]+=" $rest";;
    esac
  done < <(cat "$queue".lane-*)
  [ "$done" = "$wanted" ] || fail '' "the guests: of $wanted tests $done were run"
}
