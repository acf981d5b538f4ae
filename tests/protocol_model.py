#!/usr/bin/env python3
"""Random model of the orders of writes (docs/crash-safety.md), with crashes between any two steps.

In it: one ring log with group commit, two records under way, torn records, and a finite size; writes of 1 to 3 blocks, plain,
admitted (answered early, also behind others in line, held, not written where a later one covers them, kept in
order for whoever comes after a kill) and FUA; records that carry the blocks of small writes;
parked writes, which later ones pass, their turns, and those that are superseded; writes that fail, before and after their
answer; flushes with and without a sync; flush entries that find no room, and lists cut short; runs of zeros; checkpoints (two
slots a page, two superblock copies that can tear, epochs, drain); pages that are touched, which are written anew as they are; blocks that rot,
and are healed from a copy;
reads; recovery cut short and repeated, read-only opens, blocks and parts of the log that can't be read; volumes that grow as
they are opened, and a data device that says their size. Not in it: the hash tree above the pages, the cache, keys, MACs, time.

Oracle:
- After every crash each block reads as an allowed version: there is no false alarm, and nothing older than the last flush or
  FUA write that was answered.
- What a flush or a FUA write was answered for before a record was sealed is *recorded* once that record is durable. Forks at
  every recovery put each older version, and garbage, on each block, with the superblock that is there and with the one before
  it. None may read as something older than what is recorded.
- What is recorded in a record that was durable when a later one was sealed is *firm*: it may not read as something older
  where any one record has rotted.
- A kill without a power cut loses nothing that was answered: what is not kept is there, and nothing that is kept is older. A read returns what was answered last.
- A volume never shrinks, and opens whatever size its data device says after a crash.
- Nothing ever deadlocks. Nothing is left that flushes had to say, and the last record that carries blocks is followed by one.

usage: protocol_model.py [RUNS] [SEED] [FAULT]    FAULT: one that is planted (protocol/faults.py); `each`: one after the other
       FAIL=0.05: share of data writes that fail      HOLD=0.6: share of admitted writes that are held
       RDERR=0.1, LOGERR=0.1: share of recoveries that can't read a block, a part of the log"""
import random
import sys

from protocol.disk import BLOCKS, Disk, User, Wrong
from protocol.faults import BUGS, COUNTS, FAIL, bug, count, plant
from protocol.recovery import look, newest, recover
from protocol.volume import Lock, Volume


class Run:
    def __init__(x, seed, size=None):
        x.r = r = random.Random(seed)
        x.d, x.u = Disk(r), User()
        x.d.identity = size = size or r.choice((2, BLOCKS, BLOCKS))
        sb = dict(epoch=0, root={}, tail=0, link="format", size=size)
        x.d.sb = [sb, sb]
        x.n = Volume(x.d, x.u, sb, 0)
        x.small = r.random() < .6                   # a load of small writes and flushes
        x.where = r.choice((2, BLOCKS, BLOCKS))     # few blocks, many overlaps
        x.last = range(1)
        x.speeds = r.choice(((1,), (1, 1, 1, .1), (1, .3, .02)))

    def spawn(x, task):                             # some are much slower than others
        x.n.tasks.append((task, x.r.choice(x.speeds)))

    def step(x):
        tasks, r = x.n.tasks, x.r
        for _ in range(9):
            i = r.randrange(len(tasks))
            task, speed = tasks[i]
            if speed == 1 or r.random() < speed:
                break
        try:
            next(task)
        except StopIteration:
            del tasks[i]

    def used(x):
        return min(x.where, x.n.sb["size"])

    def range(x):
        if x.r.random() < .3:                       # the same again, as with a log's tail
            return x.last
        length = min(x.r.choice((1, 1, 2, 3)), x.used())
        first = x.r.randrange(x.used() - length + 1)
        x.last = range(first, first + length)
        return x.last

    def begin(x):                                   # perhaps a request
        n, r = x.n, x.r
        k = r.random()
        if k < .40:
            modes = ("admitted", "small") if x.small else ("plain", "admitted", "admitted", "small", "large")
            x.spawn(n.write(x.range(), r.choice(modes), r.random() < FAIL))
        elif k < (.43 if x.small else .46):
            x.spawn(n.zero(x.range()))
        elif k < (.46 if x.small else .50):
            x.spawn(n.read(r.randrange(x.used())))
        elif k < .62:
            x.spawn(n.flush())
        elif k < .70 and not n.ck:
            n.ck = True
            x.spawn(n.checkpoint() if k < .67 else n.between())
        elif k > .98:
            n.touched.add(r.randrange(BLOCKS))
        elif k > .96:
            n.rot(r.randrange(x.used()))
        elif k > .90 and x.u.torn:
            x.spawn(n.heal(r.choice(sorted(x.u.torn))))

    def what_if(x, power_cut):                      # there were a crash now
        d = x.d.copy()
        d.crash(power_cut)
        got = [v for v, _ in look(d, x.u, newest(d))[3]]
        if not power_cut:
            x.check_kill(d, got)

    def check_kill(x, d, got):
        u = x.u
        for b in set(range(BLOCKS)).difference(u.torn, d.damaged, *x.n.kept.values()):
            if u.index(b, got[b]) < u.acked[b]:
                raise Wrong(f"a kill lost what was answered on block {b}: {got[b]}, answered was {u.acked[b]} of {u.issued[b]}")
        for b, v in {b: v for v, blocks in x.n.kept.items() for b in sorted(blocks)}.items():   # what is replayed last
            if u.index(b, v) < u.acked[b]:
                raise Wrong(f"what is kept of block {b} is older than what was answered: {v}, {u.acked[b]} of {u.issued[b]}")

    def live(x):
        n, r = x.n, x.r
        replays = list(n.tasks)                     # nothing is served before what was kept is in place
        for _ in range(r.randint(5, 500)):
            replays = [t for t in replays if t in n.tasks]
            if len(n.tasks) < 7 + sum(l.safe for l in n.locks) and not n.latched and not replays:
                x.begin()
            if n.tasks:
                x.step()
            if r.random() < .05:
                x.what_if(r.random() < .7)
            if n.latched and r.random() < .1:
                return
        if r.random() < .25:
            x.end()

    def end(x):                                     # no crash yet: everything must come to an end
        n = x.n
        for _ in range(8000):
            if n.latched:
                return
            if not n.ck and n.full():
                n.ck = True
                x.spawn(n.checkpoint())
            elif not n.ck and not n.tasks and (n.unlogged or n.bare is not None):
                n.ck = True
                x.spawn(n.between())
            if not n.tasks:
                if any(a > b for a, b in zip(n.carried_to, x.u.firm)):
                    raise Wrong("the last record that carries blocks is not followed by another")
                return
            x.step()
        raise Wrong(f"deadlock: {len(n.tasks)} tasks never end")

    def crash(x):
        n, d, u, r = x.n, x.d, x.u, x.r
        cut = r.random() < .7
        count("power cuts" if cut else "kills")
        d.crash(cut)
        while True:
            found = x.recover(r.randint(1, 14) if r.random() < .5 else 999)
            if found:
                break
            again = r.random() < .5
            cut |= again
            d.crash(again)
        count("recoveries")
        got, sb, top, placed = found
        u.size = sb["size"]
        if not cut:
            x.check_kill(d, got)
        d.damaged = set()
        kept = {} if cut else n.kept
        for b in range(BLOCKS):
            u.torn -= placed & {b}                  # a block that a failed write has torn reads as what the log carries
            u.issued[b].append(got[b])
            u.acked[b] = u.floor[b] = u.recorded[b] = u.firm[b] = len(u.issued[b]) - 1
        x.n = n = Volume(d, u, sb, top)
        replays = [(Lock(blocks), u.issue("w", blocks)) for blocks in kept.values()]
        if bug("kept_unordered"):
            r.shuffle(replays)
        for mine, v in replays:                     # still kept
            n.admit(mine, v)
            n.locks.append(mine)
            x.spawn(n.replay(mine, v))

    def recover(x, steps):
        task = recover(x.d, x.u)
        for _ in range(steps):
            try:
                next(task)
            except StopIteration as end:
                return end.value
        count("recoveries cut short")

    def all(x):
        for _ in range(x.r.randint(1, 4)):
            x.live()
            x.crash()


def overtaken(seed):
    """What chance hardly finds: a flush without a sync takes its snapshot while the sync of a checkpoint is under way."""
    x = Run(seed, BLOCKS)
    n = x.n
    n.longest = 1

    def all_of(task):
        for _ in zip(range(999), task):             # a planted fault may keep it from ending
            pass

    zeros = [n.zero([0]), n.zero([1])]              # with numbers, and not settled
    for q, task in enumerate(zeros):
        while n.durable < q + 1 and n.seq <= q + 1:
            next(task)
    all_of(n.write([2], "plain", False))
    all_of(n.write([3], "small", False))            # in place: only a checkpoint needs it synced
    all_of(n.flush())
    all_of(n.write([3], "small", False))
    sync = n.sync(n.done)
    next(sync)                                      # its list is cut short
    for task in zeros:
        all_of(task)
    all_of(n.flush())                               # the whole list is empty now
    all_of(n.between())
    all_of(sync)
    all_of(n.between())
    x.what_if(True)


def never_safe(seed):
    """The same: what covers a parked write is of the next epoch, and its record does not arrive before a whole checkpoint."""
    x = Run(seed, BLOCKS)
    n = x.n
    n.lazy = 1                                      # parked until it is asked for
    parked, checkpoint, later = n.write([0], "small", False), n.checkpoint(), n.write([0], "small", False)
    for _ in range(9):
        next(parked)
    next(checkpoint)
    next(later)
    for _ in range(99):
        next(parked, None)
        next(checkpoint, None)
    for _ in range(9):
        x.what_if(True)


def runs(first, number, quiet=False):
    bad = 0
    tasks = [("directed", overtaken, first), ("directed", never_safe, first)]
    tasks += [("seed", lambda seed: Run(seed).all(), first * 1000003 + i) for i in range(number)]
    for kind, task, seed in tasks:
        try:
            task(seed)
        except Wrong as why:
            bad += 1
            if bad <= 3 and not quiet:
                print(f"{kind} {seed}: {why}")
    return bad


def each(first, number):
    missed = []
    for name, what in BUGS.items():
        plant(name)
        bad = runs(first, number, quiet=True)
        print(f"{bad:6} {name:17} {what}", flush=True)
        missed += [name] if not bad else []
    print(f"{len(BUGS)} planted faults, {number} runs each; never found: {' '.join(missed) or 'none'}")
    return missed


def main(number=20000, first=1, fault=None):
    number, first = int(number), int(first)
    if fault == "each":
        return each(first, number)
    if fault and fault not in BUGS:
        sys.exit(f"unknown fault {fault}: one of {' '.join(BUGS)}")
    plant(fault)
    bad = runs(first, number)
    print(f"{number} runs, {bad} bad" + (f" with fault {fault}" if fault else ""))
    if not fault:
        print(", ".join(f"{v} {k}" for k, v in sorted(COUNTS.items())))
    return bad


if __name__ == "__main__":
    sys.exit(1 if main(*sys.argv[1:]) else 0)
