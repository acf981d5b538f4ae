"""versions - write numbered versions of blocks to a device, and know for each block what it may read as.

    versions.py write DEVICE FIRST THREADS TABLE END    (blocks from FIRST on, 512 for each thread; until there is a file END)
    versions.py check DEVICE TABLE

A fio --verify that looks at each block's own checksum takes an old block for a good one; this does not.
Each thread has blocks of its own, writes runs of them directly, and reads others of them back in between:
they must be the versions that were acknowledged last. All are written once before it begins, which the line "filled" tells.
An error ends the thread that meets it; where it was a write, its blocks may then hold either version. `write` checks all
blocks at its end and leaves a line "BLOCK VERSION [VERSION]" for each; `check` compares with that.

Exit code 10: a block reads as what it may not be, with a line on stderr for each. 11: no such block, but an I/O error, with a
line for each. Any other but 0 is a failure of this program itself, which shows nothing about the device.
"""
import contextlib, mmap, os, random, struct, sys, threading, traceback

SIZE, OWN, RUN = 4096, 512, 8
WRONG, FAILED, BROKEN = 10, 11, 12
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


class DeviceError(Exception):
    """The device has failed, and not this program."""


@contextlib.contextmanager
def of_device():
    try:
        yield
    except OSError as e:
        raise DeviceError(e) from e


class Device:
    """Direct reads and writes through a page-aligned buffer."""

    @of_device()
    def __init__(self, name):
        self.fd = os.open(name, os.O_RDWR | os.O_DIRECT)
        self.buffer = mmap.mmap(-1, RUN * SIZE)

    @of_device()
    def write(self, block, versions):
        length = len(versions) * SIZE
        self.buffer[:length] = b"".join(content(block + i, v) for i, v in enumerate(versions))
        if os.pwritev(self.fd, [memoryview(self.buffer)[:length]], block * SIZE) != length:
            raise OSError("a short write")

    @of_device()
    def read(self, block, count):
        length = count * SIZE
        if os.preadv(self.fd, [memoryview(self.buffer)[:length]], block * SIZE) != length:
            raise OSError("a short read")
        return [version_in(block + i, self.buffer[i * SIZE:(i + 1) * SIZE]) for i in range(count)]


class Blocks:
    """The blocks of one thread, and for each the versions it may read as: the last acknowledged first."""

    def __init__(self, first):
        self.first, self.allowed, self.writes, self.wrong = first, [(FIRST_VERSION,)] * OWN, 0, []
        # An error of the device, which a test may want; and one of our own, which shows nothing.
        self.error, self.broken = None, None

    def fill(self, device):
        for at in range(0, OWN, RUN):
            device.write(self.first + at, [FIRST_VERSION] * RUN)

    def compare(self, device, at, count):
        for i, version in enumerate(device.read(self.first + at, count), at):
            if version not in self.allowed[i]:
                self.wrong.append(f"block {self.first + i} reads as {version}, not {self.allowed[i]}")

    def work(self, name, end):
        try:
            device = Device(name)
            while not os.path.exists(end) and not self.wrong and not self.error:
                self.write_some(device)
                try:
                    self.compare(device, random.randrange(OWN - RUN + 1), RUN)
                except DeviceError as e:
                    self.error = self.error or e
        except Exception:
            self.broken = traceback.format_exc()

    def write_some(self, device):
        count = random.randint(1, RUN)
        at = random.randrange(OWN - count + 1)
        new = [versions[0] + 1 for versions in self.allowed[at:at + count]]
        try:
            device.write(self.first + at, new)
        except DeviceError as e:
            self.error = e
            self.allowed[at:at + count] = [(v - 1, v) for v in new]
        else:
            self.allowed[at:at + count] = [(v,) for v in new]
            self.writes += 1

    def check(self, device):
        for at in range(0, OWN, RUN):
            self.compare(device, at, RUN)


def write(name, first, threads, table, end):
    all_blocks = [Blocks(int(first) + n * OWN) for n in range(int(threads))]
    device = Device(name)
    for blocks in all_blocks:
        blocks.fill(device)
    print("filled", flush=True)
    workers = [threading.Thread(target=blocks.work, args=[name, end]) for blocks in all_blocks]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if broken := [blocks.broken for blocks in all_blocks if blocks.broken]:
        sys.stderr.write(broken[0])
        sys.exit(BROKEN)
    errors = [f"blocks from {blocks.first} on: {blocks.error}" for blocks in all_blocks if blocks.error]
    if not errors:
        for blocks in all_blocks:
            blocks.check(device)
    with open(table, "w") as out:
        for blocks in all_blocks:
            for i, versions in enumerate(blocks.allowed):
                print(blocks.first + i, *versions, file=out)
    print(f"{sum(blocks.writes for blocks in all_blocks)} writes acknowledged, {len(errors)} threads met an error")
    return [line for blocks in all_blocks for line in blocks.wrong], errors


def check(name, table):
    device, wrong, errors = Device(name), [], []
    lines = [[int(word) for word in line.split()] for line in open(table)]
    for block, *allowed in lines:
        try:
            version = device.read(block, 1)[0]
        except DeviceError as e:
            errors.append(f"block {block}: {e}")
            continue
        if version not in allowed:
            wrong.append(f"block {block} reads as {version}, not {allowed}")
    print(f"{len(lines)} blocks, {sum(len(line) > 2 for line in lines)} with a write in flight, {len(wrong)} wrong, {len(errors)} unreadable")
    return wrong, errors


def main(what, *words):
    try:
        wrong, errors = {"write": write, "check": check}[what](*words)
    except DeviceError as e:
        # While it fills, or checks all that it has written.
        wrong, errors = [], [f"{what}: {e}"]
    for line in (wrong + errors)[:20]:
        print(line, file=sys.stderr)
    return WRONG if wrong else FAILED if errors else 0


sys.exit(main(*sys.argv[1:]))
