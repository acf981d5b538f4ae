"""versions - write numbered versions of blocks to a device, and know for each block what it may read as.

    versions.py write DEVICE FIRST THREADS SECONDS TABLE    (blocks from FIRST on, 512 for each thread)
    versions.py check DEVICE TABLE

A fio --verify that looks at each block's own checksum takes an old block for a good one; this does not.
Each thread has blocks of its own, writes runs of them directly, and reads others of them back in between:
they must be the versions that were acknowledged last. All are written once before it begins. An error ends the
thread that meets it; where it was a write, its blocks may then hold either version. `write` checks all blocks at its end and leaves a line "BLOCK VERSION [VERSION]"
for each; `check` compares with that. Exit code 1 and a line on stderr for each block that is wrong.
"""
import mmap, os, random, struct, sys, threading, time

SIZE, OWN, RUN = 4096, 512, 8
# No two runs of this program write the same versions.
FIRST_VERSION = random.getrandbits(40) << 20


def content(block, version):
    """Number and version fill the block, so that a torn one shows."""
    return struct.pack("<QQ", block, version) * (SIZE // 16)


def version_in(block, data):
    number, version = struct.unpack_from("<QQ", data)
    if data == content(block, version):
        return version
    return f"no version (it begins with block {number}, version {version})"


class Device:
    """Direct reads and writes through a page-aligned buffer."""

    def __init__(self, name):
        self.fd = os.open(name, os.O_RDWR | os.O_DIRECT)
        self.buffer = mmap.mmap(-1, RUN * SIZE)

    def write(self, block, versions):
        length = len(versions) * SIZE
        self.buffer[:length] = b"".join(content(block + i, v) for i, v in enumerate(versions))
        if os.pwritev(self.fd, [memoryview(self.buffer)[:length]], block * SIZE) != length:
            raise OSError("a short write")

    def read(self, block, count):
        length = count * SIZE
        if os.preadv(self.fd, [memoryview(self.buffer)[:length]], block * SIZE) != length:
            raise OSError("a short read")
        return [version_in(block + i, self.buffer[i * SIZE:(i + 1) * SIZE]) for i in range(count)]


class Blocks:
    """The blocks of one thread, and for each the versions it may read as: the last acknowledged first."""

    def __init__(self, first):
        self.first, self.allowed, self.writes, self.wrong, self.error = first, [(FIRST_VERSION,)] * OWN, 0, [], None

    def fill(self, device):
        for at in range(0, OWN, RUN):
            device.write(self.first + at, [FIRST_VERSION] * RUN)

    def compare(self, device, at, count):
        for i, version in enumerate(device.read(self.first + at, count), at):
            if version not in self.allowed[i]:
                self.wrong.append(f"block {self.first + i} reads as {version}, not {self.allowed[i]}")

    def work(self, name, until):
        device = Device(name)
        while time.monotonic() < until and not self.wrong and not self.error:
            self.write_some(device)
            try:
                self.compare(device, random.randrange(OWN - RUN + 1), RUN)
            except OSError as e:
                self.error = e

    def write_some(self, device):
        count = random.randint(1, RUN)
        at = random.randrange(OWN - count + 1)
        new = [versions[0] + 1 for versions in self.allowed[at:at + count]]
        try:
            device.write(self.first + at, new)
        except OSError as e:
            self.error = e
            self.allowed[at:at + count] = [(v - 1, v) for v in new]
        else:
            self.allowed[at:at + count] = [(v,) for v in new]
            self.writes += 1

    def check(self, device):
        for at in range(0, OWN, RUN):
            self.compare(device, at, RUN)


def write(name, first, threads, seconds, table):
    all_blocks = [Blocks(int(first) + n * OWN) for n in range(int(threads))]
    device = Device(name)
    for blocks in all_blocks:
        blocks.fill(device)
    until = time.monotonic() + float(seconds)

    workers = [threading.Thread(target=blocks.work, args=[name, until]) for blocks in all_blocks]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    failed = [blocks for blocks in all_blocks if blocks.error]
    if not failed:
        for blocks in all_blocks:
            blocks.check(device)
    with open(table, "w") as out:
        for blocks in all_blocks:
            for i, versions in enumerate(blocks.allowed):
                print(blocks.first + i, *versions, file=out)
    print(f"{sum(blocks.writes for blocks in all_blocks)} writes acknowledged, {len(failed)} threads failed")
    return [line for blocks in all_blocks for line in blocks.wrong]


def check(name, table):
    device, wrong = Device(name), []
    lines = [[int(word) for word in line.split()] for line in open(table)]
    for block, *allowed in lines:
        try:
            version = device.read(block, 1)[0]
        except OSError as e:
            version = e
        if version not in allowed:
            wrong.append(f"block {block} reads as {version}, not {allowed}")
    print(f"{len(lines)} blocks, {sum(len(line) > 2 for line in lines)} with a write in flight, {len(wrong)} wrong")
    return wrong


wrong = {"write": write, "check": check}[sys.argv[1]](*sys.argv[2:])
if wrong:
    sys.exit("\n".join(wrong[:20]))
