#!/bin/bash
# anchor-tpm - the TPM's agent on /dev/tpmrm0: killed in the middle of requests it counts none twice, and leaves no session
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
        assert self.ask(f"hello 1 {UUID}") == "ok counter auth"
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
kill $tpm
trap - EXIT
wait $tpm || true
gone() { [ ! -e /dev/tpmrm0 ]; }
wait_for gone
