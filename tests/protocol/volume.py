"""A volume that is open: its requests and its checkpoint thread. Each is a task, which a crash can cut off where it yields."""

from .disk import Wrong, covers, write_page
from .faults import HOLD, bug, count
from .log import Log


class Lock:
    """A range that is locked, in the order of locking, and what is known of its write."""

    def __init__(l, blocks):
        l.blocks, l.epoch = set(blocks), None
        l.reads = l.admitted = l.carried = False
        l.waits, l.heir = False, None               # admitted, and nothing has begun; what it need not be written for
        l.logged = l.safe = False                   # its record is durable, and of a carried one: it is parked
        l.durable, l.asked = False, False           # by the log, as a flush sees it that has logged it; somebody waits for it
        l.go, l.place = None, False                 # what ends the hold ('carried' or 'tags'), and the parking


class Volume(Log):
    def tag(n, b):
        for p in (n.active, n.frozen or {}):
            if b in p:
                return p[b]
        return n.root[b][1] if b in n.root else ("zero", 0)

    def publish(n, epoch, b, v):
        (n.active if bug("put_active") or epoch == n.epoch else n.frozen if n.frozen is not None else {})[b] = v

    def lock(n, blocks, passes):
        """Takes a range. Writes pass what is parked; for all others that goes to its place. What is held goes on."""
        def in_the_way(l):
            return l.blocks & set(blocks) and not (passes and (l.safe or bug("pass_early") and l.carried))
        while waits := [l for l in n.locks if in_the_way(l)]:
            for l in waits:
                l.place |= not passes
                l.go, l.asked = l.go or "tags", True
            yield
        mine = Lock(blocks)
        n.locks.append(mine)
        return mine

    def earlier(n, mine):
        """What overlaps and is to be in place before `mine` is sent. It goes there now."""
        found = [l for l in n.locks[:n.locks.index(mine)] if l.blocks & mine.blocks]
        for l in found:
            l.place = True
        return found

    def superseded(n, mine):
        """Whether one later write that is safe by the log covers all of it."""
        def safe(l):
            return l.safe or bug("super_unsafe") and l.carried or bug("super_tags") and l.logged
        later = [l.blocks for l in n.locks[n.locks.index(mine) + 1:] if safe(l)]
        return any(blocks >= mine.blocks or bug("super_partial") and blocks & mine.blocks for blocks in later)

    def answered(n, blocks, v, durable=False):
        if not n.latched:
            for b in blocks:
                n.u.acked[b] = max(n.u.acked[b], n.u.index(b, v))
                if durable:
                    n.u.floor[b] = max(n.u.floor[b], n.u.index(b, v))

    def admit(n, mine, v):                          # answered; its range is locked until it is in place
        mine.admitted = True
        n.answered(mine.blocks, v)
        if not bug("kept_answered"):
            n.kept[v] = mine.blocks

    def queue(n, blocks):
        """Admits a write, which need not have its range yet. The one before it need not be written if it covers that, and nothing
        has begun of it."""
        before = [l for l in n.locks if l.blocks & set(blocks)]
        mine, v = Lock(blocks), n.u.issue("w", blocks)
        n.locks.append(mine)
        n.admit(mine, v)
        mine.waits = True
        last = ([l for l in before if not (bug("heir_over_read") and l.reads)] or [mine])[-1]
        if last is not mine and last.waits and (last.blocks <= mine.blocks or bug("heir_of_part")):
            last.heir, mine.go = mine, last.go
        return mine, v

    def behind(n, mine):
        """What an admitted write waits for before it begins. It goes on."""
        found = [l for l in n.locks[:n.locks.index(mine)] if l.blocks & mine.blocks and not l.safe]
        for l in found:
            l.go, l.asked = l.go or "tags", True
        return found

    def write(n, blocks, mode, fails):
        """mode: plain, admitted, small (FUA), large (FUA)"""
        if mode == "admitted":
            mine, v = n.queue(blocks)
            while n.behind(mine) and not mine.heir and not bug("queue_passes"):
                yield
            if n.d.r.random() < HOLD:
                while not (mine.go or mine.heir) and n.d.r.random() < .9:   # held: nothing is logged
                    yield
            mine.waits = False
            if mine.heir:
                count("writes that had an heir")
                if not bug("heir_keeps"):
                    n.kept.pop(v, None)
                n.locks.remove(mine)
                return
        else:
            mine = yield from n.lock(blocks, True)
            v = n.u.issue("w", blocks)
        yield from n.log_and_place(mine, v, mode == "small" or mine.go == "carried", mode in ("small", "large"), fails)

    def replay(n, mine, v):
        """What was kept, in the order in which it was admitted."""
        while n.behind(mine):
            yield
        yield from n.log_and_place(mine, v, False, False, False)

    def log_and_place(n, mine, v, carry, fua, fails):
        q, epoch, mine.carried = yield from n.append("pay" if carry else "tag", mine.blocks, v)
        mine.epoch = epoch
        if mine.carried:
            yield from n.carry(mine, v, q, epoch, fua, fails)
            return
        if not bug("log_after"):
            yield from n.commit(q)
        mine.logged = True
        while not bug("no_turn") and n.earlier(mine):
            yield
        old = {b: n.tag(b) for b in mine.blocks}    # its turn has come: an earlier carried write may have brought this
        yield from n.send_data(mine, v, fails)
        if bug("log_after"):
            yield from n.commit(q)
        n.done += 1
        n.need = mine_done = n.done
        if fails and mine.admitted and not bug("fail_admitted"):  # its writer can't be told
            n.u.torn |= {b for b in mine.blocks if n.d.data[b][-1][0] == "torn"}
            n.latched = True
            return
        if fails:
            yield from n.resolve(mine, v, q, epoch, old)
        else:
            for b in mine.blocks:
                n.publish(epoch, b, v)
                n.u.torn.discard(b)
            if not fua or bug("fua_early", "fua_unsynced"):
                n.answered(mine.blocks, v, durable=fua)
        n.kept.pop(v, None)
        del n.inflight[q]
        n.locks.remove(mine)
        if fua and not fails and not bug("fua_unsynced"):
            yield from n.sync(mine_done, quiet=bug("fua_unrecorded"))
            n.answered(mine.blocks, v, durable=True)
            n.hear()

    def send_data(n, mine, v, fails):
        for b in mine.blocks:
            if not fails or n.d.r.random() < .4:
                n.d.send(b, v)
            elif n.d.r.random() < .4:
                n.d.send(b, ("torn", v))
        yield
        n.d.flying -= mine.blocks

    def resolve(n, mine, v, q, epoch, old):
        """A data write has failed: under its range, sync and read back."""
        u = n.u
        yield from n.sync(n.done)
        for b in mine.blocks:
            found = n.d.data[b][-1]
            if found == v:
                n.publish(epoch, b, v)
                u.torn.discard(b)
                continue
            if not bug("fail_forgets"):
                n.failed[q] = epoch
            if found == old[b] or old[b][0] == "zero":
                u.issued[b][u.index(b, v)] = ("failed", v[1])   # later ones may have been answered: they keep their places
            else:                                   # proves nothing: reads fail until the next write
                n.publish(epoch, b, v)
                u.torn.add(b)

    def carry(n, mine, v, q, epoch, fua, fails):
        """Its blocks are in the record: durable with it. The place can wait."""
        d, u = n.d, n.u
        count("carried writes")
        if bug("pay_fua_early") and fua:
            n.answered(mine.blocks, v, durable=True)
        if bug("kept_appended"):
            n.kept.pop(v, None)
        if bug("inplace_early"):
            yield from n.send_data(mine, v, False)
        yield from n.commit(q)
        mine.logged = mine.durable = True           # a flush that has logged it is answered, and does not wake it
        u.torn -= mine.blocks
        n.answered(mine.blocks, v, durable=fua)
        mine.safe = bug("kept_passed")
        while not (fua or mine.asked or mine.place) and d.r.random() < n.lazy:
            yield
        n.kept.pop(v, None)
        mine.safe = True                            # parked from now on: later writes pass it
        if bug("unlocked"):
            n.locks.remove(mine)
        while not mine.place and d.r.random() < n.lazy:
            yield
        while not bug("unlocked"):
            if n.superseded(mine):
                count("superseded writes")
                del n.inflight[q]
                n.locks.remove(mine)
                return
            if bug("no_turn_carried") or not n.earlier(mine):
                break
            yield
        fails &= d.r.random() < .5                  # it ends this life
        yield from n.send_data(mine, v, fails)
        n.done += 1                                 # no flush needs it synced, but a checkpoint does
        if fails and not bug("fail_unlatched"):
            n.latched = True                        # in flight for ever: no checkpoint passes
            count("carried writes that failed")
            return
        for b in mine.blocks if not bug("place_unpublished") else ():
            n.publish(epoch, b, v)
        del n.inflight[q]
        if not bug("unlocked"):
            n.locks.remove(mine)

    def zero(n, blocks):
        mine = yield from n.lock(blocks, bug("zeros_pass"))
        v = n.u.issue("zero", blocks)
        q, epoch, _ = yield from n.append("tag", blocks, v)
        yield from n.commit(q)
        for b in blocks:                            # passed down: who knows what is there from now on
            if n.d.r.random() < .3:
                n.d.send(b, ("gone", v[1]))
        yield
        n.d.flying -= mine.blocks
        for b in blocks:
            n.publish(epoch, b, v)
            n.u.torn.discard(b)
        n.answered(blocks, v)
        del n.inflight[q]
        n.locks.remove(mine)

    def rot(n, b):                                  # nobody has it in hand, and what is on the medium goes bad
        if not any(b in l.blocks for l in n.locks):
            n.d.data[b] = [("torn", "rot")] * len(n.d.data[b])
            n.u.torn.add(b)

    def heal(n, b):
        """From a copy that has the block as it is now: put in place, where its tag still proves it."""
        v = n.tag(b)
        mine = None if bug("heal_unheld") else (yield from n.lock([b], False))
        yield
        if v[0] != "zero" and (v == n.tag(b) or bug("heal_stale")) and not n.latched:
            n.d.send(b, v)
            yield
            n.d.flying -= {b}
            n.done += 1
            if not bug("heal_unsynced"):
                yield from n.sync(n.done)
            if any(content[0] == "torn" for content in n.d.data[b]) and not n.latched:
                raise Wrong(f"block {b} has been healed, and a power cut may leave it as it was")
            n.u.torn.discard(b)
            count("blocks healed")
        if mine:
            n.locks.remove(mine)

    def read(n, b):
        mine, acked = Lock([b]), n.u.acked[b]
        mine.reads = True
        n.locks.append(mine)

        def in_the_way(l):
            return b in l.blocks and not l.reads and not (bug("read_medium") and l.safe)
        while waits := [l for l in n.locks[:n.locks.index(mine)] if in_the_way(l)]:
            for l in waits:
                l.place = True
                l.go = l.go or "tags"
            yield
        n.locks.remove(mine)
        v, found = n.tag(b), n.d.data[b][-1]
        if b in n.u.torn or found[0] == "torn":
            return
        if v[0] != "zero" and found != v:
            raise Wrong(f"a read of block {b} fails: {found} is not {v}")
        if n.u.index(b, v) < acked:
            raise Wrong(f"a read of block {b} returns {v}, answered was {acked} of {n.u.issued[b]}")

    def flush(n):
        acked, before = list(n.u.acked), [l for l in n.locks if l.admitted and not l.durable]
        for l in before:
            l.go = l.go or "carried"

        def done(l):                                # in place, or safe by the log; or its heir is
            while l.heir and not bug("heir_unawaited"):
                l = l.heir
            return l not in n.locks or l.durable or bug("pay_early") and l.carried
        while not bug("early_flush") and not all(done(l) for l in before):
            yield
        if bug("sync_skipped") or bug("nothing") and n.claim[0] == n.seq:
            n.tell(n.snapshot())
        else:
            yield from n.sync(n.need)
        if not n.latched:
            n.u.acked = [max(x) for x in zip(n.u.acked, acked)]
            n.u.floor = [max(x) for x in zip(n.u.floor, acked)]
            n.hear()

    # --- the checkpoint thread ----------------------------------------------------------------

    def between(n):
        """What no record has carried along gets one of its own, and so does what rots unseen in the last record."""
        if not n.gathers and not n.way and not n.full():
            if n.unlogged and not bug("stay_unlogged") or n.bare is not None and not bug("not_followed"):
                yield from n.send(n.epoch)
        n.ck = False

    def checkpoint(n):
        d, u, epoch = n.d, n.u, n.epoch
        n.frozen, n.active = n.active, {}
        n.epoch += 1
        yield
        while not bug("no_drain") and epoch in [e for q, e in n.inflight.items() if not (bug("ck_parked") and q in n.carried)]:
            for l in n.locks:
                l.place |= l.epoch == epoch
            yield
        while any(w["rec"]["epoch"] == epoch for w in n.way):
            yield
        pos, link = n.last.get(epoch, (n.sb["tail"], n.sb["link"]))
        # What a flush need not sync, this must. The log is told in any case, in the next epoch: it matters where the ended
        # one's superblock is put back.
        quiet = bug("silent_checkpoint") or bug("ck_mute") and n.synced >= n.done
        yield from n.sync(n.done if not bug("ck_need") else n.need, quiet)
        for b, v in n.frozen.items():
            if covers(n.claim, u.number[v]):
                n.checkpointed[b] = max(n.checkpointed[b], u.index(b, v))
        yield
        root = dict(n.sb["root"])
        for b, v in sorted(n.frozen.items()):
            yield from write_page(d, root, b, v)
        for b in sorted(n.touched & set(root) - set(n.frozen)):     # as it is: its slot has rotted, its content is known
            count("pages touched")
            yield from write_page(d, root, b, root[b][1], bug("touch_in_place"))
        n.touched = set()
        if not bug("no_meta_sync"):
            d.sync_meta()
        yield
        sb = dict(epoch=epoch + 1, root=root, tail=pos, link=link, size=n.sb["size"])
        yield from d.write_superblock(sb)
        d.before, n.sb, n.root, n.tail, n.frozen = n.sb, sb, root, pos, None
        n.failed = {q: e for q, e in n.failed.items() if e != epoch}
        n.ck = False
        yield
