"""The disk and what a crash leaves of it; what its user was promised."""

from .faults import bug, count

BLOCKS, RING = 4, 14                                # blocks (one a page); records in the ring


class Wrong(Exception):
    pass


class Disk:
    """What a crash leaves: for each block and slot all contents that a power cut may leave, newest last."""

    def __init__(d, r):
        d.r = r
        d.data = [[("garbage", b)] for b in range(BLOCKS)]
        d.flying = set()                            # blocks whose newest content is on its way
        d.slot = [[[None], [None]] for _ in range(BLOCKS)]
        d.log, d.way = {}, []                       # place in the ring -> record; records on their way
        d.sb, d.before = [None, None], None         # the superblock's copies; the superblock before the last
        d.identity = BLOCKS                         # the volume's size as the data device says it, of metadata on another device
        d.damaged = set()                           # blocks that failed writes have torn before the last crash

    def copy(d):
        c = Disk(d.r)
        c.data, c.flying, c.damaged = [list(x) for x in d.data], set(d.flying), set(d.damaged)
        c.slot = [[list(s) for s in page] for page in d.slot]
        c.log, c.way, c.sb, c.before, c.identity = dict(d.log), list(d.way), list(d.sb), d.before, d.identity
        return c

    def send(d, b, content):
        d.data[b].append(content)
        d.flying.add(b)

    def ended(d):                                   # how many contents a sync that begins now covers
        return [len(c) - (b in d.flying) for b, c in enumerate(d.data)]

    def sync_data(d, ended):
        d.data = [c[n - 1:] for c, n in zip(d.data, ended)]

    def sync_meta(d):
        d.slot = [[s[-1:] for s in page] for page in d.slot]

    def crash(d, power_cut):
        for rec in d.way:
            x, at = d.r.random() if power_cut else d.r.choice((0, 1)), rec["pos"] % RING
            if x < .3:
                continue
            if x < .6 and rec["pay"]:
                d.log[at] = dict(rec, torn=True)
                count("torn records")
            elif x < .4:
                d.log.pop(at, None)
            else:
                d.log[at] = rec
        for b in d.flying if not power_cut else (): # sent, or not yet
            if d.r.random() < .5:
                d.data[b].pop()
        d.way, d.flying = [], set()
        if power_cut:
            d.data = [[d.r.choice(c)] for c in d.data]
            d.slot = [[[d.r.choice(s)] for s in page] for page in d.slot]
        d.damaged |= {b for b in range(BLOCKS) if d.data[b][-1][0] == "torn"}

    def write_superblock(d, sb, grown=False):       # A durable, then B durable; a crash can tear the one being written
        one = (sb["epoch"] % 2,) if bug("one_sb") else (0,) if grown and bug("grown_in_one") else None
        for i in one or (0, 1):
            d.sb[i] = d.r.choice([None, d.sb[i]])
            yield
            d.sb[i] = sb
            yield


def write_page(d, root, b, v, in_place=False):      # to the slot that nothing current names
    slot = 1 - root[b][0] if b in root else 0
    if (bug("same_slot") or in_place) and b in root:
        slot = root[b][0]
    d.slot[b][slot] += [("torn", "page"), v]
    root[b] = (slot, v)
    yield


def covers(claim, q):
    return q <= claim[0] and q not in claim[1]


class User:
    """What was promised. A version is ('w', n) or ('zero', n); the lists hold its place in what was issued for the block."""

    def __init__(u):
        u.next = 1
        u.issued = [[("zero", 0)] for _ in range(BLOCKS)]
        u.acked, u.floor = [0] * BLOCKS, [0] * BLOCKS           # the newest answered, and promised to be durable
        u.recorded, u.firm = [0] * BLOCKS, [0] * BLOCKS
        u.torn = set()                              # blocks whose tag no data has: reads fail until they are written
        u.number = {}
        u.size = 0                                  # blocks that the volume has, as was said last

    def issue(u, kind, blocks):
        v = (kind, u.next)
        u.next += 1
        for b in blocks:
            u.issued[b].append(v)
        return v

    def index(u, b, v):
        return len(u.issued[b]) - 1 - u.issued[b][::-1].index(v) if v in u.issued[b] else -1

    def claimed(u, b, claim):                       # the newest promised version that a claim covers
        promised = enumerate(u.issued[b][:u.floor[b] + 1])
        return max(i for i, v in promised if i == 0 or v in u.number and covers(claim, u.number[v]))
