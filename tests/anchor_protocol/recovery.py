"""Opening: the chain, the candidates, the anchor's verdict, and the two steps by which the anchor moves on."""

from protocol.faults import bug

from .disk import BLOCKS, RING, Bad, Refuse
from .keys import newest_area, permits, read


def newest(d):
    s = [x for x in d.sb if x]
    if not s:
        raise Refuse("no valid superblock")
    if len(s) == 2 and s[0]["epoch"] == s[1]["epoch"] and s[0] != s[1]:
        raise Refuse("two superblocks of one epoch")
    return max(s, key=lambda x: x["epoch"])


def scan(d, sb):
    pos, link, ents = sb["tail"], sb["link"], []
    points = {pos: link}
    while True:  # record numbers (pos) never restart
        rec = d.log.get(pos % RING)
        if not rec or rec["pos"] != pos or rec["prev"] != link:
            later = [
                x for x in d.log.values() if x["pos"] >= pos
            ]  # a crash may leave one that was sent before this one was durable
            if any(x["pos"] == pos or x["first"] > pos or bug("refuse_stranded") for x in later):
                raise Refuse("the log holds a record newer than the superblock allows")
            return ents, max([pos] + [x["pos"] + 1 for x in later if not bug("no_skip")]), link, points
        ents += rec["entries"]
        pos += 1
        link = rec["id"]
        points[pos] = link


def candidates(sb, ents):
    c = [[(0, sb["root"][b][1] if b in sb["root"] else ("zero", 0))] for b in range(BLOCKS)]
    F = [x[2] for x in ents if x[1] == "flush"]
    for x in sorted((x for x in ents if x[1] == "tag"), key=lambda x: x[2]):
        c[x[3]].append((x[2], x[4]))
    for b in range(BLOCKS):
        base = 0
        for i, (q, v) in enumerate(c[b]):
            if v[0] == "zero" and not bug("zero_any"):
                base = i  # logged zeros are done
            if not bug("ignore_flush") and any(q <= W and q not in ex for W, ex in F):
                base = max(base, i)
        c[b] = c[b][base:]
    return c


def settle(c, content):
    for q, v in reversed(c):
        if v == content:
            return v
    if c[0][1][0] == "zero" and not bug("zero_newest_only") or c[-1][1][0] == "zero":
        return c[-1][1] if c[-1][1][0] == "zero" else c[0][1]
    return None


def judge(a, sb, points):  # may this be what the anchor speaks of?
    if a is None:
        return  # (only with a planted fault)
    end = max(points)
    if bug("number_only"):
        ok = end >= a["pos"]
    elif bug("number_and_link"):
        ok = points.get(a["pos"], a["link"] if sb["tail"] > a["pos"] else None) == a["link"] or sb["id"] == a["next"]
    elif bug("open_unchecked"):
        ok = True
    elif bug("zero_next") and a["next"] is None and sb["id"] == "format":
        ok = True  # zeros stand for none, and are the id of a fresh format
    elif sb["id"] == a.get("was"):
        ok = True  # keep_next: the window is never closed
    elif sb["id"] == a["id"]:
        if sb["tail"] > a["pos"]:
            ok = not bug("refuse_newer")  # a later checkpoint of the same life
        elif bug("no_link"):
            ok = end >= a["pos"]
        else:
            ok = points.get(a["pos"]) == a["link"] and (not bug("end_exact") or end == a["pos"])
    else:
        ok = sb["id"] == a["next"]  # the open that was under way; nothing was served yet
    if not ok:
        raise Refuse("older than the anchor")


def decide(d, u, a, honest, mode):
    """What the disk holds, judged by what the anchor says now: (anchor's body, superblock, entries, end, link, contents, dead)."""
    held = a.load(d)
    sb = newest(d)
    for b, (s, v) in sb["root"].items():
        if d.slot[b][s][-1] != v:
            raise Refuse(f"page {b}: its slot does not hold what the root says")
    ents, pos, link, points = scan(d, sb)
    judge(held, sb, points)
    area = newest_area(read(d))
    if not permits(held, area):
        raise Refuse("the key area is not the anchor's")
    if area["id"] not in u.areas:
        raise Bad(f"an old key area opens the volume again: {area} of {u.areas}, {a.kind}")
    c = candidates(sb, ents)
    got = []
    dead = set()
    must = [max(x, y) for x, y in zip(u.anch, u.floor)] if mode == "flush" else u.anch
    for b in range(BLOCKS):
        content = d.data[b][-1]
        v = settle(c[b], content)
        vs = [x for _, x in c[b]]
        if v is None:
            if b not in u.torn and not (content[0] == "torn") and honest:
                raise Bad(f"false alarm: block {b} holds {content}, candidates {vs}")
            v = vs[-1]
            dead.add(b)
        elif b not in u.torn and honest:
            if u.index(b, v) < (u.logged if content[0] == "torn" else u.floor)[b]:
                raise Bad(f"stale: block {b} settled as {v}, floor {u.floor[b]} of {u.issued[b]}")
            for x in vs:
                if x in u.issued[b] and u.index(b, x) < u.logged[b]:
                    raise Bad(f"replay of {x} accepted on block {b}, logged floor {u.logged[b]} of {u.issued[b]}")
        if v is not None and b not in dead and b not in u.torn and u.index(b, v) < must[b] and (content[0] != "torn"):
            raise Bad(
                f"ROLLBACK: block {b} settled as {v}, {'flushed' if mode == 'flush' else 'anchored'} {must[b]} of {u.issued[b]}, {a.kind}"
            )
        for x in vs if b not in u.torn else ():  # whatever data the adversary puts under it
            if x in u.issued[b] and u.index(b, x) < must[b]:
                raise Bad(f"ROLLBACK possible: block {b} may be {x}, covered {must[b]} of {u.issued[b]}, {a.kind}")
        got.append(v)
    return held, sb, ents, pos, link, got, dead, area["id"]


def intend(d, a, sb, held, new):
    """Makes both superblocks the newest, and has the anchor permit the id of this open. None: it holds another body by now."""
    B, pos, link = new
    if not bug("one_sb"):  # both copies newest again, before anything old is reused
        for i in (0, 1):
            if d.sb[i] != sb:
                d.sb[i] = None
                yield None
                d.sb[i] = sb
                yield None
    if held is None:
        held = dict(gen=a.count, id=sb["id"], next=None, pos=pos, link=link, covers=None, then=None, keys=None, keys_next=None, era=a.era)
    if a.kind == "counter" and held["gen"] == a.count + 1 and not bug("no_forward"):
        a.count += 1
        a.applied(held)
        yield None  # what was begun is ended first
    if sb["id"] != held["id"] and not bug("intent_keeps"):
        held = dict(held, id=sb["id"], next=None, pos=sb["tail"], link=sb["link"])  # the open that was cut short is the base now
    if bug("commit_first"):
        return (yield from a.write(d, held, dict(held, id=B, next=None, pos=pos, link=B, covers=None, then=None)))
    elif not bug("no_intent", "one_bump"):
        return (yield from a.write(d, held, dict(held, next=B, covers=None, then=None)))
    elif bug("one_bump"):  # the intent without an increment of its own
        i = min((0, 1), key=lambda i: d.body[i]["gen"] if d.body[i] else -1) if a.kind == "counter" else 0
        new = dict(held, next=B, covers=None, then=None)
        if a.kind == "counter":
            d.body = [new, new]
            return new
        return (yield from a.write(d, held, new))
    return held


def recover(d, u, a, honest, mode):  # a generator too: it can be cut short anywhere
    d.sync_data()
    d.sync_meta()
    yield None
    B = ("open", d.r.random())
    for again in range(1 if bug("taken_once") else 3):
        try:
            held, sb, ents, pos, link, got, dead, area = decide(d, u, a, honest, mode)
        except Refuse:
            if not again:
                raise
            yield "failed"  # what has taken the place of the body before is somebody else's
        yield None
        held = yield from intend(d, a, sb, held, (B, pos, link))
        if held:
            break
    else:
        yield "failed"
    root = dict(sb["root"])
    yield "judged"
    for b in range(BLOCKS):
        if b not in root or root[b][1] != got[b]:
            s = 1 - root[b][0] if b in root else 0
            d.slot[b][s].append(got[b])
            root[b] = (s, got[b])
            yield None
    d.sync_meta()
    yield None
    new = dict(epoch=sb["epoch"] + 2, root=root, tail=pos, link=B, id=B)
    yield from (None for _ in d.write_sb(new))
    once = []

    def settled():  # from here on this is what the volume holds
        if once:
            return
        once.append(1)
        u.torn |= dead
        for b in dead:
            d.data[b] = [("torn", "not ours")]
        for b in range(BLOCKS):
            u.issued[b].append(got[b])
            u.floor[b] = u.acked[b] = u.logged[b] = u.anch[b] = len(u.issued[b]) - 1

    kept = list(u.acked)
    if bug("commit_first"):
        settled()
    elif bug("no_commit"):
        settled()
    else:
        was = held["id"]  # (for a planted fault only)
        held = yield from a.write(
            d,
            held,
            dict(
                held,
                id=B,
                next=None,
                pos=pos,
                link=B,
                covers=None,
                then=settled,
                **(dict(was=was) if bug("keep_next") else {}),
                **(dict(keys=area, keys_next=None) if bug("keys_open_narrows") else {}),
            ),
        )
        if not held:
            yield "failed"
    yield dict(
        got=got,
        sb=new,
        top=max([x[2] for x in ents if x[1] == "tag"], default=0),
        held=held if not bug("no_commit") else dict(held, id=B, next=None),
        acked=kept,
    )


def tamper(r, d, snaps):  # any earlier state, mixtures, a log cut short
    t = (r.choice(snaps) if r.random() < 0.85 else d).copy()
    x = r.random()
    if x < 0.25:
        t.data = r.choice(snaps + [d]).copy().data
    if 0.2 < x < 0.3:
        t.sb = list(r.choice(snaps + [d]).sb)
    if 0.3 < x < 0.4:
        t.log = dict(r.choice(snaps + [d]).log)
    if r.random() < 0.35:
        t.body = list(r.choice(snaps + [d]).body)
    if r.random() < 0.05:
        t.body = [None, None]
    if r.random() < 0.25:
        t.keys = [list(r.choice(snaps + [d]).keys[i]) for i in (0, 1)]
    elif r.random() < 0.1:
        t.keys[r.randrange(2)] = [None]
    if r.random() < 0.3 and t.log:
        k = r.choice([x["pos"] for x in t.log.values()])
        t.log = {p: x for p, x in t.log.items() if x["pos"] < k}
    t.power_cut()
    t.mixed = True
    return t
