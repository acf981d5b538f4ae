"""Recovery, and the oracle that watches it."""

from .disk import BLOCKS, RING, Wrong, covers, write_page
from .faults import FAIL, LOGERR, RDERR, bug, count


class Unreadable(Exception):
    pass


def newest(d):
    s = [x for x in d.sb if x]
    if not s:
        raise Wrong("no valid superblock")
    if len(s) == 2 and s[0]["epoch"] == s[1]["epoch"] and s[0] != s[1]:
        raise Wrong("two superblocks of one epoch")
    return max(s, key=lambda x: x["epoch"])


def scan(log, sb, bad=()):
    """The log from a superblock on; `bad`: places that can't be read. Returns entries, next position and torn versions."""
    pos, link, entries, torn = sb["tail"], sb["link"], [], set()
    while True:                                     # record numbers (pos) never restart
        if pos % RING in bad:
            if bug("log_cut"):
                return entries, None, torn
            raise Unreadable
        rec = log.get(pos % RING)
        if not rec or rec["pos"] != pos or rec["prev"] != link or rec["torn"] and not bug("torn_whole"):
            break
        if rec["torn"]:
            torn |= {x[4] for x in rec["entries"] if x[1] == "pay"}
        entries += rec["entries"]
        pos += 1
        link = rec["id"]
    # A crash may leave a record that was sent before this one was durable, and this one torn.
    later = [x for at, x in log.items() if x["pos"] >= pos and at not in bad]
    for x in later:
        is_torn = x["torn"] and not bug("torn_refused")
        if x["pos"] == pos and not is_torn or x["first"] > pos or bug("refuse_stranded"):
            raise Wrong("the log holds a record newer than the superblock allows")
    hidden = 2 if bad and not bug("no_skip_bad") else 0           # as many as may be on their way, where they can't be seen
    return entries, max([pos + hidden] + [x["pos"] + 1 for x in later if not bug("no_skip")]), torn


def candidates(sb, entries):
    """Of each block: (number, version, whether it is carried), oldest first, and apart those older than the newest base."""
    of = [[(0, sb["root"][b][1] if b in sb["root"] else ("zero", 0), False)] for b in range(BLOCKS)]
    claims = [x[2] for x in entries if x[1] == "flush"][-1:]    # the last one only: what it lists was listed before
    for _, kind, q, blocks, v in sorted((x for x in entries if x[1] != "flush"), key=lambda x: x[2]):
        for b in blocks:
            of[b].append((q, v, kind == "pay"))
    found = []
    for c in of:
        base = 0
        for i, (q, v, pay) in enumerate(c):
            if v[0] == "zero" and not bug("zero_any") or pay and not bug("pay_not_base"):     # done once logged
                base = i
            if not bug("ignore_flush") and any(covers(w, q) for w in claims):
                base = max(base, i)
        found.append((c[base:], c[:base]))
    return found


def settle(candidates, content):
    """What a block is from now on, and whether it is to be put in its place. Content None: can't be read. None: EILSEQ."""
    c, shadowed = candidates
    last, pays = c[-1], [x[1] for x in c if x[2]]
    if last[2] or bug("pay_preferred") and pays:
        return pays[-1], True                       # P1
    if last[1][0] == "zero" or len(c) == 1 and content is None:
        return last[1], False                       # A
    if content is None:
        return last[1] if bug("decided") else "undecided", False                        # F
    if content in [v for _, v, _ in c]:
        return content, False                       # B, C
    if pays:                                        # P2: the newer ones never arrived; P3: no version explains this
        explained = any(v == content or v[0] == "zero" for _, v, _ in shadowed) and not bug("no_shadow")
        return (pays[-1], True) if explained or bug("pay_restored") else (None, False)
    if c[0][1][0] == "zero" and not bug("zero_newest_only"):
        return c[0][1], False                       # D
    return None, False                              # E


def fork(u, b, cs, at_least, when):
    """Somebody puts each of these on the block."""
    for x in u.issued[b][:at_least[b]] + [("garbage", "x")]:
        w, _ = settle(cs, x)
        if w not in (None, "undecided") and u.index(b, w) < at_least[b]:
            raise Wrong(f"{when}{x} put on block {b} reads as {w}, recorded is {at_least[b]} of {u.issued[b]}")


def forks(d, u, sb):
    """The superblock before the last with older blocks; one record that has rotted with older blocks."""
    worlds = []
    if d.before and d.before["epoch"] == sb["epoch"] - 1:
        worlds.append((d.log, d.before, u.recorded, set(), "superblock put back: "))
    if live := [at for at, rec in d.log.items() if rec["pos"] >= sb["tail"]]:
        rotten = d.r.choice(live)
        # With it goes what was on its way beside it. That may have superseded what was firm.
        gone = [x for rec in d.log.values() if rec["pos"] >= d.log[rotten]["pos"] for x in rec["entries"]]
        lost = {b for x in gone if x[1] == "pay" for b in x[3]}
        log = {at: rec for at, rec in d.log.items() if at != rotten}
        worlds.append((log, sb, u.firm, lost, "a record has rotted: "))
    for log, superblock, at_least, lost, when in worlds:
        try:
            entries = scan(log, superblock)[0]
        except Wrong:                               # refused
            continue
        count("forks that open")
        for b, cs in enumerate(candidates(superblock, entries)):
            if b not in u.torn | lost:
                fork(u, b, cs, at_least, when)


def judge(d, u, cs, bad, log_cut):
    """What each block is to be, checked against what was promised. `bad`: blocks that can't be read."""
    got = []
    for b in range(BLOCKS):
        content = d.data[b][-1]
        v, place = settle(cs[b], None if b in bad else content)
        if v is None:
            if not log_cut and b not in u.torn and content[0] != "torn":
                raise Wrong(f"false alarm: block {b} holds {content}, candidates {cs[b]}")
            v = cs[b][0][-1][1]
        elif v != "undecided" and b not in u.torn:
            explained = place and all(x[1][0] != "zero" for x in cs[b][1])      # a carried block is never a mere guess
            if u.index(b, v) < (u.recorded if b in d.damaged and not explained else u.floor)[b]:
                raise Wrong(f"stale: block {b} settled as {v}, floor {u.floor[b]} of {u.issued[b]}")
            fork(u, b, cs[b], u.recorded, "")
        got.append((v, place))
    return got


def look(d, u, sb, blocks=(), places=()):
    """What an open finds; `blocks` and `places` of the ring can't be read."""
    for b, (slot, v) in sb["root"].items():
        if d.slot[b][slot][-1] != v:
            raise Wrong(f"page {b}: its slot does not hold what the root says")
    if sb["size"] < u.size:
        raise Wrong(f"the volume has {sb['size']} blocks, and had {u.size}")
    if d.identity > sb["size"] or d.identity < sb["size"] and bug("identity_exact"):
        raise Wrong(f"refused: the data device is of a volume of {d.identity} blocks, this has {sb['size']}")
    entries, pos, torn = scan(d.log, sb, places)
    forks(d, u, sb)
    return entries, pos, torn, judge(d, u, candidates(sb, entries), blocks, pos is None)


def recover(d, u):
    """A generator too: it can be cut short anywhere. Ends with None where nothing was opened for writing."""
    r, read_only = d.r, d.r.random() < .1
    blocks = {b for b in range(BLOCKS) if r.random() < RDERR}
    places = {p for p in range(RING) if r.random() < LOGERR / 3}
    if not read_only:
        d.sync_data(d.ended())
        d.sync_meta()
        yield
    sb = newest(d)
    for i in (0, 1) if not bug("one_sb") and not read_only else ():   # both copies newest again, before anything old is reused
        if d.sb[i] != sb:
            d.sb[i] = None
            yield
            d.sb[i] = sb
            yield
    try:
        entries, pos, torn, got = look(d, u, sb, blocks, places)
    except Unreadable:
        count("opens refused for the log")
        return None
    if any(v == "undecided" for v, _ in got):
        count("opens with undecided blocks")
        return None
    if pos is None or read_only:
        return None
    yield
    root, placed = dict(sb["root"]), {b for b, (_, place) in enumerate(got) if place}
    for b in placed if not bug("pay_unwritten") else ():          # to its place, while the log still has it
        v = got[b][0]
        if r.random() < FAIL:                       # read-only then: nothing is written down
            if r.random() < .5:
                d.data[b].append(r.choice((v, ("torn", v))))
            return None
        d.data[b].append(("rot", v) if v in torn else v)
        count("blocks put in place by recovery")
        yield
    if not bug("pay_unsynced"):
        d.sync_data(d.ended())
    yield
    for b, (v, _) in enumerate(got):
        if b not in root or root[b][1] != v:
            yield from write_page(d, root, b, v)
    d.sync_meta()
    yield
    # Perhaps it grows. What is new has no page: it reads as zeros, whatever lies there.
    size = r.randint(sb["size"], BLOCKS) if r.random() < .3 else sb["size"]
    if bug("identity_first"):
        d.identity = size
        yield
    new = dict(epoch=sb["epoch"] + 2, root=root, tail=pos, link=("open", r.random()), size=size)
    yield from d.write_superblock(new, size > sb["size"])
    if d.identity != size:                          # it grew now, or before a crash that came in between
        count("identity blocks that follow")
        d.identity = size
        yield
    return [v for v, _ in got], new, max([x[2] for x in entries if x[1] != "flush"], default=0), placed
