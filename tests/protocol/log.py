"""The log of an open volume: records, syncs of the data device, and what the log is told."""

from .disk import BLOCKS, RING
from .faults import bug, count


class Log:
    """The state of a volume that is open."""

    def __init__(n, d, u, sb, seq):
        n.d, n.u, n.sb, n.epoch, n.seq = d, u, sb, sb["epoch"], seq
        n.active, n.frozen, n.root, n.touched = {}, None, dict(sb["root"]), set()
        n.inflight, n.failed, n.carried = {}, {}, set()         # numbers: with their epochs, failed ones too
        n.locks, n.kept = [], {}
        n.gathers, n.way, n.pos, n.link, n.tail = [], [], sb["tail"], sb["link"], sb["tail"]
        n.durable, n.last = 0, {}                   # number; where each epoch ends
        n.bare = None                               # the last record that carries blocks, until one is sealed that began after it
        n.done = n.need = n.synced = 0              # data writes that ended; of those the last not carried; how many are synced
        n.syncing, n.snapshots, n.newest = False, 0, 0
        n.claim, n.unlogged = (-1, frozenset()), False
        n.said, n.checkpointed, n.carried_to, n.answers = [0] * BLOCKS, [0] * BLOCKS, [0] * BLOCKS, []
        n.longest = d.r.choice((0, 1, 2, 9, 9))     # list of a flush entry
        n.lazy = d.r.choice((.6, .9, .97))          # how long a parked write stays so
        n.tasks, n.ck, n.latched = [], False, False

    def used(n):
        return n.pos + bool(n.gathers) - n.tail

    def full(n):
        return n.used() >= (RING - 2 if not bug("overrun") else 99)

    def append(n, kind, blocks, v):
        """Epoch, number, in-flight list and the record that gathers: one step."""
        while n.full() or not bug("mixed") and any(x[0] != n.epoch for x in n.gathers):
            yield                                   # what gathers is of one epoch
        if kind == "pay" and n.used() >= RING * 3 // 4:
            count("carried writes that found no room")
            kind = "tag"                            # carried blocks never wait for space, and leave some to tags
        n.seq += 1
        q, epoch = n.seq, n.epoch
        n.inflight[q] = epoch
        if kind == "pay":
            n.carried.add(q)
        if bug("late_buf"):
            yield
        n.gathers.append((epoch, kind, q, tuple(blocks), v))
        n.u.number[v] = q
        return q, epoch, kind == "pay"

    def commit(n, q):                               # group commit: whoever finds room for a record leads
        while n.durable < q:
            if len(n.way) < 2 and n.gathers:
                yield from n.send(n.gathers[0][0])
            yield

    def send(n, epoch):
        """A record: sealed one after the other, two on their way side by side, durable in order."""
        entries = [x for x in n.gathers if x[0] == epoch]       # one epoch a record
        n.gathers = [x for x in n.gathers if x[0] != epoch]
        if bug("mixed"):
            entries, n.gathers = entries + n.gathers, []
        if n.unlogged and (not entries or n.d.r.random() < .8):  # an entry that finds no room waits for the next record
            entries.append((epoch, "flush", n.claim))
            n.unlogged = False
        elif bug("drop_entry"):
            n.unlogged = False
        # All that was answered by now is said by this record or one before it.
        told = [0] * BLOCKS if n.unlogged else [max(x) for x in zip(n.said, n.checkpointed)]
        rec = dict(pos=n.pos, prev=n.link, id=(id(n), n.pos, n.d.r.random()), epoch=epoch, entries=entries, torn=False,
                   first=n.way[0]["rec"]["pos"] if n.way else n.pos, pay=any(x[1] == "pay" for x in entries))
        if n.bare is not None and (n.bare < rec["first"] or bug("followed_early")):
            n.bare = None
        if rec["pay"]:
            n.bare = n.pos
        n.pos += 1
        n.link = rec["id"]
        way = dict(rec=rec, done=False, told=told)
        n.way.append(way)
        n.d.way.append(rec)
        yield
        n.d.way.remove(rec)
        n.d.log[rec["pos"] % RING] = rec
        yield
        way["done"] = True
        if bug("own_durable"):
            n.durable = max([n.durable] + [x[2] for x in entries if x[1] != "flush"])
        while n.way and n.way[0]["done"]:
            n.is_durable(**n.way.pop(0))

    def is_durable(n, rec, told, done):
        u = n.u
        n.durable = max([n.durable] + [x[2] for x in rec["entries"] if x[1] != "flush"])
        n.last[rec["epoch"]] = (rec["pos"] + 1, rec["id"])
        carried = [0] * BLOCKS
        for _, kind, _, *what in rec["entries"]:
            for b in what[0] if kind == "pay" else ():
                carried[b] = max(carried[b], u.index(b, what[1]))
        told = [max(x) for x in zip(told, carried)]
        u.recorded = [max(x) for x in zip(u.recorded, told)]
        n.carried_to = [max(x) for x in zip(n.carried_to, carried)]
        n.answers.append((rec["pos"], told))
        for pos, said in n.answers:
            if pos < rec["first"]:
                u.firm = [max(x) for x in zip(u.firm, said)]

    def snapshot(n):
        """What is durable once the next record is: all numbers but those in flight and not carried, and those that failed."""
        n.snapshots += 1
        listed = sorted(set() if bug("flush_all") else set(n.inflight) - n.carried | set(n.failed))
        return n.snapshots, n.seq, listed

    def tell(n, snapshot, quiet=False):
        """What the log is to be told, in some later record: the newest only."""
        taken, highest, listed = snapshot
        if taken < n.newest and not bug("old_snapshot"):
            return
        n.newest = taken
        longest = n.longest if not bug("cut_varies") else n.d.r.choice((0, 9))
        if len(listed) > longest:
            highest, listed = highest if bug("cut_high") else listed[longest] - 1, listed[:longest]
        claim = (highest, frozenset(listed))
        n.unlogged |= claim != n.claim and not quiet
        n.claim = claim

    def hear(n):                                    # for the oracle: what has been promised and told by now
        n.said = [max(s, n.u.claimed(b, n.claim)) for b, s in enumerate(n.said)]

    def sync(n, wanted, quiet=False):
        """Every sync of the data device: one at a time. Where all that is wanted is synced, the log is told so in one step."""
        if n.synced >= wanted:
            n.tell(n.snapshot(), quiet)
            count("flushes without a sync")
            return
        while n.synced < wanted:
            if n.syncing:
                if bug("join"):
                    while n.syncing:
                        yield
                    return
                yield
                continue
            n.syncing = True
            began, ended, snapshot = n.done, n.d.ended(), n.snapshot()
            if bug("entry_early"):
                n.tell(snapshot)
            yield
            if not bug("flush_no_sync"):
                n.d.sync_data(ended)
            yield
            n.syncing, n.synced = False, max(n.synced, began)
            count("syncs")
            n.tell(snapshot, quiet)
