"""The disk and what a crash leaves of it; what its user was promised."""

from protocol.faults import bug

BLOCKS, RING = 3, 14  # blocks (one a page); records in the ring


class Refuse(Exception):
    pass  # the volume is not opened


class Bad(Exception):
    pass  # the model has found a fault


class Disk:  # what a crash leaves
    def __init__(d, r):
        d.r = r
        d.body = [None, None]  # anchor bodies, where the anchor is a bare counter
        d.data = [[("garbage", b)] for b in range(BLOCKS)]  # possible contents, newest last
        d.slot = [[[None], [None]] for _ in range(BLOCKS)]  # two slots a page, possible contents
        d.log = {}  # place in the ring -> record
        d.sb = [None, None]
        d.keys = [[None], [None]]  # two copies of the key area, possible contents
        d.mixed = False  # they may be of two times

    def copy(d):
        c = Disk(d.r)
        c.body = list(d.body)
        c.data = [list(x) for x in d.data]
        c.slot = [[list(s) for s in p] for p in d.slot]
        c.log = dict(d.log)
        c.sb = list(d.sb)
        c.keys = [list(x) for x in d.keys]
        c.mixed = d.mixed
        return c

    def sync_data(d):
        d.data = [[c[-1]] for c in d.data]

    def sync_meta(d):
        d.slot = [[[s[-1]] for s in p] for p in d.slot]
        d.sync_keys()

    def sync_keys(d):
        d.keys = [[x[-1]] for x in d.keys]

    def power_cut(d):
        d.data = [[d.r.choice(c)] for c in d.data]
        d.slot = [[[d.r.choice(s)] for s in p] for p in d.slot]
        d.keys = [[d.r.choice(x)] for x in d.keys]

    def write_sb(d, sb):  # A durable, then B durable; a crash can tear the one being written
        for i in ((0, 1) if not bug("one_sb") else (sb["epoch"] % 2,)):
            old = d.sb[i]
            d.sb[i] = d.r.choice([None, old])
            yield
            d.sb[i] = sb
            yield


class User:  # what was promised
    def __init__(u):
        u.next = 1
        u.issued = [[("zero", 0)] for _ in range(BLOCKS)]
        u.acked = [0] * BLOCKS
        u.floor = [0] * BLOCKS
        u.logged = [0] * BLOCKS
        u.torn = set()
        u.anch = [0] * BLOCKS
        u.areas = set()  # key areas by which the volume may be opened

    def save(u):
        return ([list(x) for x in u.issued], list(u.acked), list(u.floor), list(u.logged), set(u.torn), list(u.anch), set(u.areas))

    def load(u, s):
        u.issued, u.acked, u.floor, u.logged, u.torn, u.anch, u.areas = (
            [list(x) for x in s[0]],
            list(s[1]),
            list(s[2]),
            list(s[3]),
            set(s[4]),
            list(s[5]),
            set(s[6]),
        )

    def index(u, b, v):
        if v not in u.issued[b]:
            return 1 << 30  # a write that failed: the adversary has kept it
        return len(u.issued[b]) - 1 - u.issued[b][::-1].index(v)
