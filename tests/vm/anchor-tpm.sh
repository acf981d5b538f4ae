#!/bin/bash
# anchor-tpm - the TPM's agent on /dev/tpmrm0: killed it counts none twice; with it a disk put back and a cleared TPM are refused
. tests/vm/lib.sh
agent=$PWD/target/agents/debug/ublk-anchor-tpm
[ -x "$agent" ] || skip 'ublk-anchor-tpm is not built: scripts/test anchor-agents does it'
command -v swtpm >/dev/null || skip 'swtpm is not installed: scripts/setup anchor does it'
modprobe tpm_vtpm_proxy || skip 'this kernel has no tpm_vtpm_proxy, which gives it a TPM in software'

step 'a TPM in software, which the kernel takes for a chip'
mkdir /run/tpm
swtpm chardev --vtpm-proxy --tpm2 --tpmstate dir=/run/tpm >/run/tpm.log 2>&1 &
tpm=$!
trap 'kill $tpm' EXIT
there() { [ -c /dev/tpmrm0 ]; }
wait_for there || { cat /run/tpm.log; die 'no /dev/tpmrm0'; }

step 'increments, while the agent is killed again and again'
python3 - "$agent" <<'P'
import os, random, signal, socket, subprocess, sys, threading, time
PATH, UUID = "/run/anchor", "00112233-4455-6677-8899-aabbccddeeff"


class Agent:
    def __init__(self):
        self.process = subprocess.Popen([sys.argv[1], "--socket", PATH, "--wear-limit", "0"])
        self.stream = None
        deadline = time.monotonic() + 60
        while not self.stream:
            try:
                stream = socket.socket(socket.AF_UNIX)
                stream.connect(PATH)
                self.stream = stream.makefile("rw")
            except OSError:
                assert time.monotonic() < deadline, "the agent does not listen"
                time.sleep(0.01)
        assert self.ask(f"hello 1 {UUID}") == "ok counter auth era"
        assert self.ask("auth " + "07" * 32) == "ok"

    def ask(self, line):
        self.stream.write(line + "\n")
        self.stream.flush()
        answer = self.stream.readline()
        if not answer:
            raise ConnectionError
        return answer.strip()


agent = Agent()
value = int(agent.ask("init").removeprefix("ok "))
assert agent.ask("increment %d" % (value - 1)) == "conflict"
# How long one takes is up to the machine.
begun, since = value, time.monotonic()
assert agent.ask(f"increment {value}") == f"ok {value + 1}"
value += 1
took, unknown, done = time.monotonic() - since, 0, 0
for killed in range(25):
    until = threading.Timer(random.uniform(0, 4 * took), os.kill, (agent.process.pid, signal.SIGKILL))
    until.start()
    try:
        while True:
            assert agent.ask(f"increment {value}") == f"ok {value + 1}"
            value += 1
    except (ConnectionError, BrokenPipeError):
        unknown += 1
    agent.process.wait()
    agent = Agent()
    found = int(agent.ask("read").removeprefix("ok "))
    assert found in (value, value + 1), (found, value)
    done += found - value
    value = found
print(f"from {begun} to {value}, killed {unknown} times, {done} of these increments were done")
assert unknown == 25 and value - begun > 10
agent.process.kill()
agent.process.wait()
P
left=$(TPM2TOOLS_TCTI=device:/dev/tpmrm0 tpm2_getcap handles-loaded-session)
[ -z "$left" ] || die "sessions are left: $left"

step 'the index, as the kernel shows it to anybody'
TPM2TOOLS_TCTI=device:/dev/tpmrm0 tpm2_nvreadpublic

step 'the TPM is the anchor of a volume'
start_agent() {
  rm -f /run/agent
  "$agent" --socket /run/agent --wear-limit 0 & agent_pid=$!
  wait_for test -S /run/agent
}
end_agent() { kill $agent_pid; wait $agent_pid || true; }
start_agent
# An emulated machine with a TPM in software may take long for an answer.
anchor=(--anchor unix:/run/agent --anchor-timeout 60)
snapshot() { dd if=$data of="$1" bs=1M count=64 iflag=direct status=none; }
put_back() { dd if="$1" of=$data bs=1M oflag=direct conv=fsync status=none; }
fresh() { ui status -n "$id" --json | jq -e '.anchor.state == "ok" and .anchor.lag_records == 0' >/dev/null; }
format --size 32M --log-size 8M "${anchor[@]}"
refused 1 ui add --data $data --key-file $key "${anchor[@]}" --anchor-mode interval:1
refused 1 ui add --data $data --key-file $key "${anchor[@]}" --anchor-mode flush
add "${anchor[@]}"
[ "$(counter interval_seconds)" = 3600 ] || die 'it is not told each hour'
remove
snapshot /run/before
add "${anchor[@]}" --anchor-mode interval:0.5 --anchor-wear-ok
mark_block "$disk" 7 written
wait_for fresh
ui status -n "$id" | grep '^anchor  *fresh as of .* counter at '
kill_daemon
ui recover -n "$id" --key-file $key
cmp <(head -c 4096 <(yes written)) <(dd if="$disk" bs=4096 skip=7 count=1 iflag=direct status=none)
remove
check_closed "${anchor[@]}"
snapshot /run/newest

step 'the disk of before is put back, with its bodies and with the newest'
put_back /run/before
refused 6 ui add --data $data --key-file $key "${anchor[@]}"
grep -q 'the counter is at' /run/err || die 'it does not say what the counter is at'
dd if=/run/newest of=$data bs=4096 skip=64 seek=64 count=2 oflag=direct conv=notrunc,fsync status=none
refused 6 ui add --data $data --key-file $key "${anchor[@]}"
grep -q 'was the next when the anchor was written' /run/err || die 'it does not say how old it is'
put_back /run/newest
check_closed "${anchor[@]}"

step 'a key that this TPM has sealed is a credential'
# What a unit with LoadCredentialEncrypted= finds in its folder; that it does is shown by the test of systemd.
sealed=/run/sealed-key
unsealed() { rm -f /run/unsealed && systemd-creds decrypt --name=volume-key --tpm2-device=/dev/tpmrm0 $sealed /run/unsealed; }
systemd-creds encrypt --name=volume-key --with-key=tpm2 --tpm2-device=/dev/tpmrm0 $key $sealed
unsealed
key=/run/unsealed check_closed "${anchor[@]}"

step 'the TPM is cleared'
end_agent
TPM2TOOLS_TCTI=device:/dev/tpmrm0 tpm2_clear -c p
! unsealed || die 'another TPM has unsealed the key'
start_agent
refused 4 ui add --data $data --key-file $key "${anchor[@]}"
grep -q 'holds nothing' /run/err || die 'it does not say that the counter is gone'
uuid=$(ui dump --data $data --json | jq -r .volume.uuid)
ui anchor reset --accept-rollback --uuid "$uuid" --data $data --key-file $key "${anchor[@]}"
check_closed "${anchor[@]}"
end_agent
kill $tpm
trap - EXIT
wait $tpm || true
gone() { [ ! -e /dev/tpmrm0 ]; }
wait_for gone
