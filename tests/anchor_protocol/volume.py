"""An open volume: log, writes, flushes, checkpoints, and what it tells the anchor."""

from protocol.faults import bug

from .disk import RING
from .keys import change_keys


class Node:
    def __init__(n, d, u, sb, seq, anchor, mode, held):
        n.a, n.mode, n.held, n.latched, n.anchoring, n.anchored = anchor, mode, held, False, False, sb["tail"]
        n.dead = n.telling = False
        n.point = (sb["tail"], sb["link"], list(u.logged))
        n.done_flush = (-1, ())
        n.d, n.u, n.sb = d, u, sb
        n.epoch = sb["epoch"]
        n.seq = seq
        n.active, n.frozen, n.root = {}, None, dict(sb["root"])
        n.inflight, n.abandoned, n.guard = {}, {}, set()
        n.buf, n.way, n.pos, n.link, n.tail, n.durable = [], [], sb["tail"], sb["link"], sb["tail"], 0
        n.kept = {}
        n.ck = False
        n.tasks = []
        n.flushlock = False
        n.last_flush = (-1, ())

    def tag(n, b):
        for p in (n.active, n.frozen or {}):
            if b in p:
                return p[b]
        return n.root[b][1] if b in n.root else ("zero", 0)

    def full(n):
        return n.pos + (1 if n.buf else 0) - n.tail >= (RING - 2 if not bug("overrun") else 99)

    def append(n, b, v):  # epoch, number and in-flight entry in one step
        while n.full():
            yield
        n.seq += 1
        q = n.seq
        e = n.inflight[q] = n.epoch
        if bug("late_buf"):
            yield  # epoch, number, in-flight list and gathering buffer are one step
        n.buf.append((e, "tag", q, b, v))
        if bug("log_after"):
            return q
        yield from n.commit(q)
        return q

    def commit(n, q):  # group commit: whoever finds room for a record leads
        while n.durable < q:
            if len(n.way) < 2 and n.buf:
                yield from n.send(n.buf[0][0])
            yield

    def send(n, e):  # sealed one after the other, on their way side by side, durable in order
        batch = [x for x in n.buf if x[0] == e]
        n.buf = [x for x in n.buf if x[0] != e]  # one epoch a record
        if bug("mixed"):
            batch += n.buf
            n.buf = []
        rec = dict(
            pos=n.pos,
            prev=n.link,
            id=(id(n), n.pos, n.d.r.random()),
            epoch=e,
            entries=batch,
            first=n.way[0]["rec"]["pos"] if n.way else n.pos,
        )
        n.pos += 1
        n.link = rec["id"]
        w = dict(rec=rec, done=False)
        n.way.append(w)
        yield
        n.d.log[rec["pos"] % RING] = rec
        yield
        w["done"] = True
        if bug("own_durable"):
            n.durable = max([n.durable] + [x[2] for x in batch if x[1] == "tag"])
        while n.way and n.way[0]["done"]:
            rec = n.way.pop(0)["rec"]
            n.durable = max([n.durable] + [x[2] for x in rec["entries"] if x[1] == "tag"])
            n.last = getattr(n, "last", {})
            n.last[rec["epoch"]] = (rec["pos"] + 1, rec["id"])
            for x in rec["entries"]:
                if x[1] == "flush":
                    n.u.logged = [max(a, c) for a, c in zip(n.u.logged, x[4])]
                    x[5]["at"] = rec["pos"] + 1
            n.point = (rec["pos"] + 1, rec["id"], list(n.u.logged))

    def put(n, e, b, v):
        (n.active if bug("put_active") or e == n.epoch else n.frozen if n.frozen is not None else {})[b] = v

    def write(n, b, fail):
        d, u = n.d, n.u
        early = not fail and b not in n.guard and d.r.random() < 0.5
        while b in n.guard:
            yield
        n.guard.add(b)
        v = ("w", u.next)
        u.next += 1
        old = n.tag(b)
        u.issued[b].append(v)
        if early:
            u.acked[b] = u.index(b, v)
            n.kept[b] = v  # answered; its range is held
        if bug("early_forget"):
            n.kept.pop(b, None)
        q = yield from n.append(b, v)
        e = n.inflight[q]
        if not fail or d.r.random() < 0.4:
            d.data[b].append(v)
        elif d.r.random() < 0.4:
            d.data[b].append(("torn", v))
        yield
        if bug("log_after"):
            yield from n.commit(q)
        if not fail:
            n.put(e, b, v)
            u.torn.discard(b)
            u.acked[b] = u.index(b, v)
            n.kept.pop(b, None)
        else:  # under the range: sync, read back
            d.sync_data()
            yield
            c = d.data[b][-1]
            if c == v:
                n.put(e, b, v)
                u.torn.discard(b)
            elif c == old or old[0] == "zero":
                if not bug("fail_forgets"):
                    n.abandoned[q] = e
                u.issued[b].remove(v)
            else:
                n.put(e, b, v)
                n.abandoned[q] = e
                u.torn.add(b)  # proves nothing: reads fail until the next write
        del n.inflight[q]
        n.guard.discard(b)

    def zero(n, b):
        u = n.u
        while b in n.guard:
            yield
        n.guard.add(b)
        v = ("zero", u.next)
        u.next += 1
        u.issued[b].append(v)
        q = yield from n.append(b, v)
        e = n.inflight[q]
        yield
        n.put(e, b, v)
        u.torn.discard(b)
        u.acked[b] = u.index(b, v)
        del n.inflight[q]
        n.guard.discard(b)

    def flush(n, tick=False):
        acked, before = list(n.u.acked), dict(n.kept)
        sure = n.mode == "flush" or tick
        while not bug("early_flush") and any(n.kept.get(b) == v for b, v in before.items()):
            yield
        if bug("join") and n.flushlock:  # may only join a flush whose snapshot is not yet taken
            while n.flushlock:
                yield
            n.u.floor = [max(a, c) for a, c in zip(n.u.floor, acked)]
            return
        while n.flushlock:
            yield
        idle = n.last_flush if not sure else n.done_flush  # where the anchor is waited for, the last flush must be in it
        if n.seq == idle[0] and (bug("nothing") or not idle[1]):  # nothing to do
            n.u.floor = [max(a, c) for a, c in zip(n.u.floor, acked)]
            return
        n.flushlock = True
        u = n.u
        W = (n.seq, frozenset() if bug("flush_all") else frozenset(n.inflight) | frozenset(n.abandoned))
        yield
        if not bug("flush_no_sync"):
            n.d.sync_data()
        yield
        n.flushlock = False
        n.last_flush = W
        e = {}
        if not sure or bug("no_entry"):
            n.buf.append((n.epoch, "flush", W, None, acked, e)) if not n.full() else None  # rides on the next record
        else:  # waits for space like a writer that has logged nothing: the checkpoint does not wait for it
            while n.full():
                yield
            n.buf.append((n.epoch, "flush", W, None, acked, e))
            while "at" not in e:
                if len(n.way) < 2 and n.buf:
                    yield from n.send(n.buf[0][0])
                yield
        if sure and not bug("ack_early") or tick:
            while n.anchored < e.get("at", n.point[0]) and not n.latched:
                if not n.anchoring:
                    n.anchoring = True
                    yield from n.move_anchor()
                    n.anchoring = False
                yield
            if n.latched:
                return  # fails
            n.done_flush = W
        elif sure:
            n.tasks.append(n.flush(True))
        u.floor = [max(a, c) for a, c in zip(u.floor, acked)]
        yield

    def move_anchor(n):  # one at a time
        pos, link, covers = n.point
        if bug("anch_early"):
            pos, link = n.pos, n.link
        new = dict(
            n.held, next=n.held["next"] if bug("keep_next") else None, pos=pos, link=link, covers=covers, then=None
        )
        if bug("keys_dropped"):
            new.update(keys=None, keys_next=None)
        if bug("keep_next") and "was" in n.held:
            new["was"] = n.held["was"]
        got = yield from n.a.write(n.d, n.held, new)
        if not got:
            n.latched = True
            return  # fenced, or away too long
        n.held = got
        n.anchored = max(n.anchored, pos)

    def change_keys(n):  # a command does it, and the one who tells the anchor tells it this, too
        while n.anchoring and not n.dead:
            yield
        n.anchoring = True
        try:
            held = yield from change_keys(n.d, n.u, n.held, n.tell)
        finally:  # it may be killed
            n.anchoring = False
        if not held:
            n.latched = True

    def tell(n, held, new):
        writing, n.telling = n.a.write(n.d, held, new), True
        while not n.dead:
            try:
                next(writing)
            except StopIteration as end:
                n.held, n.telling = end.value or n.held, False
                return end.value
            yield
        return None  # the command lives on, and hears nothing

    def checkpoint(n):
        d = n.d
        E = n.epoch
        n.frozen, n.active = n.active, {}
        n.epoch += 1
        yield
        while not bug("no_drain") and E in n.inflight.values():
            yield
        while any(x[0] == E for x in n.buf):  # a flush record of E that nobody carries: write it now
            yield from n.lead(E)
        while any(w["rec"]["epoch"] == E for w in n.way):
            yield
        pos, link = getattr(n, "last", {}).get(E, (n.sb["tail"], n.sb["link"]))
        d.sync_data()
        yield
        root = dict(n.sb["root"])
        for b, v in sorted(n.frozen.items()):
            s = 1 - root[b][0] if b in root else 0
            if bug("same_slot") and b in root:
                s = root[b][0]
            d.slot[b][s].append(v)
            root[b] = (s, v)
            yield
        if not bug("no_meta_sync"):
            d.sync_meta()
        yield
        sb = dict(epoch=E + 1, root=root, tail=pos, link=link, id=n.sb["id"])
        yield from d.write_sb(sb)
        n.sb = sb
        n.root = root
        n.tail = pos
        n.frozen = None
        n.ck = False
        n.abandoned = {q: e for q, e in n.abandoned.items() if e != E}
        yield

    def lead(n, E):
        while len(n.way) == 2:
            yield
        if any(x[0] == E for x in n.buf):
            yield from n.send(E)
