#!/bin/bash
# stuck - a daemon that is stopped or kept busy by silent clients holds no command up, and says what it can
# vm: limit=150
. tests/vm/lib.sh
socket_client() { # COMMAND: python with a connected socket s to the daemon
  python3 - "/run/ublk-integrity/$id.sock" "$1" <<'P'
import socket, sys, json, time
def connect():
    s = socket.socket(socket.AF_UNIX)
    s.settimeout(20)
    s.connect(sys.argv[1])
    return s
def ask(line, s=None):
    s = s or connect()
    s.sendall(line)
    return json.loads(s.makefile().readline())
exec(sys.argv[2])
P
}
format
add
step 'requests and what is wrong with them'
socket_client '
assert ask(b"{\"verb\":\"status\"}\n")["device"] == "/dev/ublkb0", "status"
answer = ask(b"{\"verb\":\"scrub\"}\n")
assert "knows no scrub" in answer["error"] and "version" in answer["error"], answer
assert "JSON" in ask(b"status\n")["error"]
s = connect()
for _ in range(3): assert "pid" in ask(b"{\"verb\":\"status\"}\n", s)
assert "no request" in connect().makefile().readline()  # who only connects hears why, at last
'
step 'silent clients, more than are served at a time'
socket_client '
silent = [connect() for _ in range(40)]
open("/run/silent", "w").close()
time.sleep(600)
' & silent=$!
within 30 test -e /run/silent
since=$SECONDS
ui status -n "$id" --json >/run/status
[ $((SECONDS - since)) -lt 10 ] || die "status took $((SECONDS - since)) s"
kill $silent
wait $silent || true
rm /run/silent
step 'a daemon that is stopped'
pid=$(daemon)
mark_block "$disk" 5 before-it-was-stopped
kill -STOP "$pid"
mark_block "$disk" 6 while-it-was-stopped & waiting=$!
within 30 busy
since=$SECONDS
refused 5 ui status -n "$id"
[ $((SECONDS - since)) -lt 15 ] || die "status took $((SECONDS - since)) s"
cat /run/out
grep -q 'T (stopped)' /run/out || die 'not what the process does'
grep -q 'live, [1-9][0-9]* requests under way' /run/out || die 'not what the kernel knows'
grep -q "pid $pid" /run/err || die 'not who does not answer'
refused 5 ui status -n "$id" --json
jq -e '.process_state == "T (stopped)" and .kernel_state == "live" and .data == "/dev/vda"' /run/out
[ "$(daemon)" = "$pid" ] || die 'list does not know it'
refused 5 ui recover -n "$id"
refused 5 ui add --data $data --key-file $key
refused 5 ui del -n "$id"
kill -CONT "$pid"
wait $waiting || die 'the request that waited failed'
ui status -n "$id" >/dev/null
[ "$(read_block "$disk" 6)" = ok ] || die 'block 6'
remove
check_closed
