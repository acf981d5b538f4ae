#!/usr/bin/env python3
"""Random model of an anchor (docs/format.md, "Anchor body"), on top of the orders of writes, flushes, checkpoints and recovery.

In it: the anchor as a file of two slots, as a store with compare-and-swap, and as a bare counter whose body lies on the
untrusted disk; its writes that fail, tear, arrive late, twice or after a crash; an anchor that goes away; both modes. Crashes
between any two steps, opens cut short; an adversary who puts back any earlier state of the whole disk, mixtures of them, and
logs cut short, at every crash and in the middle of an open; a second host that opens a copy while the first runs on. The key
area is changed while the volume is served and while it is not, and cut short; older ones are put back; a copy can't be read for
a moment; a daemon dies, another opens, and the command goes on. Another counter takes the place of the one before.
Not in it: MACs (nothing is forged), time (a tick comes at any moment), several anchors, writes that records carry
(protocol_model.py has these).

Oracle:
- What an honest crash leaves is never refused.
- No state is accepted that lacks a version which the anchor covers: in mode flush what an answered flush covers, in mode
  interval what a tick that has ended covers, in both what an open has settled.
- No key area opens the volume but the newest, from the end of its change on. What a change that was cut short has begun to
  write may, as what was there before, until the next change.
- An open that is refused leaves the anchor alone. A fenced host answers no flush, and moves the anchor no more.
- Nothing deadlocks. An orderly stop is anchored to the last write.

usage: anchor_model.py [RUNS] [SEED] [FAULT]    FAULT: one that is planted (anchor_protocol/faults.py), or `each`: all, one after
                                                the other, each until it is found, in RUNS runs at most
       FAIL=0.05: share of data writes that fail      MODE=flush|interval, KIND=file|store|counter: of one sort only"""
import os
import random
import sys

from anchor_protocol.anchor import Anchor, Away
from anchor_protocol.disk import BLOCKS, Bad, Disk, Refuse, User
from anchor_protocol.faults import BUGS, HOSTILE, ONLY
from anchor_protocol.keys import change_unserved
from anchor_protocol.recovery import recover, tamper
from anchor_protocol.volume import Node
from protocol.faults import COUNTS, FAIL, bug, count, plant, planted


def run(seed, only=None, hostile=False):
    r = random.Random(seed)
    d = Disk(r)
    u = User()
    mode = os.environ.get("MODE") or r.choice(["flush", "interval"])
    kind = only or os.environ.get("KIND") or r.choice(["file", "store", "counter"])
    a = Anchor(r, kind, u)
    snaps = []
    trials = []
    left = []  # a command that has outlived the daemon
    sb0 = dict(epoch=0, root={}, tail=0, link="format", id="format")
    d.sb = [sb0, sb0]
    first = dict(gen=2, id="first")
    d.keys = [[first], [first]]
    u.areas = {"first"}
    held = dict(gen=0, id="format", next=None, pos=0, link="format", covers=None, then=None, keys="first", keys_next=None, era=0)
    if r.random() < 0.2:  # by a program that did not ask: what was there before it counts until the next change
        held.update(keys=None)
        u.areas.add("ancient")
    a.store = held
    a.file = [held, None]
    d.body = [held, None]
    n = Node(d, u, sb0, 0, a, mode, held)
    snaps.append(d.copy())
    ancient = dict(gen=1, id="ancient")
    snaps[0].keys = [[ancient], [ancient]]
    snaps.append(d.copy())

    def snap(p):
        if r.random() < p:
            snaps.append(d.copy())
            snaps[0 if len(snaps) < 9 else r.randrange(len(snaps) - 1)] = snaps[-1]
            del snaps[9:]

    def late():
        if a.late and r.random() < 0.1 and not a.out:
            exp, b = a.late.pop(r.randrange(len(a.late)))
            count("late")
            a.land(exp, b)

    def step(tasks):
        t = r.choice(tasks)
        try:
            next(t)
        except StopIteration:
            tasks.remove(t)

    def go(disk, honest, steps, accepted=False):  # one open: refused, cut short or done
        g = recover(disk, u, a, honest and not accepted, mode)
        judged = False
        try:
            for i, y in enumerate(g):
                if left and r.random() < 0.2:
                    step(left)
                late()
                snap(0.05)
                if y == "judged":
                    judged = True
                    if not honest:
                        count("window")
                if y == "failed":
                    if honest and not any(a.store.get("by") is t for t in trials if t is not disk):
                        raise Bad(f"an honest crash has left what says that somebody else has opened ({mode}, {kind})")
                    return "failed", judged
                if isinstance(y, dict):
                    count("opens")
                    return y, judged
                if i >= steps:
                    return "cut", judged
        except Refuse as e:
            if honest and any(a.store.get("by") is t for t in trials if t is not disk):
                return "moved", False  # the adversary's open, cut short, has arrived after all
            if honest:
                raise Bad(f"refused what an honest crash has left: {e} ({mode}, {kind})")
            return "refused", False
        except Away:
            return "away", False

    def change_offline():  # between two lives, to its end or not
        try:
            for i, _ in enumerate(change_unserved(d, u, a)):
                late()
                snap(0.5)
                if r.random() < 0.1:
                    break
        except Away:
            pass

    try:
        for _ in range(6 if hostile else r.randint(1, 6)):
            for _ in range(r.randint(5, 60 if hostile else 200)):
                x = r.random()
                late()
                snap(0.06)
                if r.random() < 0.004:
                    a.out = True
                    count("outages")
                elif r.random() < 0.1:
                    a.out = False
                if n.latched:
                    break
                if len(n.tasks) < 7:
                    if x < 0.30:
                        n.tasks.append(n.write(r.randrange(BLOCKS), r.random() < FAIL))
                    elif x < 0.38:
                        n.tasks.append(n.zero(r.randrange(BLOCKS)))
                    elif x < 0.48:
                        n.tasks.append(n.flush())
                    elif x < 0.53 and not n.ck:
                        n.ck = True
                        n.tasks.append(n.checkpoint())
                    elif x < 0.58 and mode == "interval" and not n.anchoring:
                        n.tasks.append(n.flush(True))
                    elif x < 0.6 and not any(t.__name__ == "change_keys" for t in n.tasks):
                        n.tasks.append(n.change_keys())
                    elif x < 0.605 and not n.telling:  # such a command is killed
                        for t in [t for t in n.tasks if t.__name__ == "change_keys"]:
                            t.close()
                            n.tasks.remove(t)
                if n.tasks:
                    step(n.tasks)
            a.out = False
            if r.random() < 0.2 and not n.latched:  # no crash yet: everything must come to an end
                for k in range(5000):
                    if n.full() and not n.ck:
                        n.ck = True
                        n.tasks.append(n.checkpoint())
                    if not n.tasks or n.latched:
                        break
                    step(n.tasks)
                else:
                    return f"seed {seed}: deadlock: {len(n.tasks)} tasks never end"
                if r.random() < 0.5 and not n.latched:  # an orderly stop: flush, record, anchor
                    n.done_flush = (-1, ())
                    t = [n.flush(True)]
                    for k in range(5000):
                        if not t:
                            break
                        step(t)
                    if u.anch != [max(x, y) for x, y in zip(u.anch, u.floor)] and not planted():
                        return f"seed {seed}: closed and not anchored"
            if (
                kind != "counter" and r.random() < 0.1 and not n.latched and not (kind == "file" and n.anchoring)
            ):  # another host opens a copy while this one goes on
                t = d.copy()
                t.power_cut()
                out, _ = go(t, False, 9999)
                if isinstance(out, dict):
                    count("taken")
                    s = u.save()
                    old, d = d, t
                    lost = n
                    for k in range(60):
                        if lost.tasks:
                            step(lost.tasks)
                        elif k % 7 == 0:
                            lost.tasks.append(lost.flush())
                        if mode == "flush" and not lost.latched and u.floor > s[2] and any(x > y for x, y in zip(u.floor, s[2])):
                            raise Bad(f"a fenced host has answered a flush ({kind})")
                        if lost.latched:
                            count("fenced")
                            break
                    if u.anch != s[5] and any(x > y for x, y in zip(u.anch, s[5])):
                        raise Bad(f"a fenced host has moved the anchor ({kind})")
                    u.load(s)
                    n = Node(d, u, out["sb"], out["top"], a, mode, out["held"])
                    snaps.append(old.copy())
                    continue
            cut = r.random() < 0.7
            n.dead = True
            left = [t for t in n.tasks if t.__name__ == "change_keys" and not n.latched and not cut]
            if cut:
                d.power_cut()
            if kind == "counter" and r.random() < 0.1 and (not planted() or bug("any_era")):
                count("other_counters")
                a.other_counter(d)
            trials.clear()
            tries, out = 8 if hostile else r.choice([0, 0, 1, 2, 4]), None
            accepted = False
            while not isinstance(out, dict):
                steps = r.randint(1, 25) if r.random() < 0.5 else 999
                while r.random() < (0.4 if hostile else 0.12) and not left and d not in trials:
                    change_offline()
                if tries > 0 and r.random() < 0.8:
                    tries -= 1
                    count("tampered")
                    t = tamper(r, d, snaps)
                    trials.append(t)
                    snap(0.3)
                    s = (a.store, list(a.file), a.count)
                    out, judged = go(t, False, steps)
                    if out == "refused":
                        count("refused")
                        if a.count != s[2] or any(x and x.get("by") is t for x in [a.store] + a.file):
                            raise Bad("a refused open has moved the anchor")
                    held = a.store if kind == "store" else max((x for x in a.file if x), key=lambda x: x["gen"], default={})
                    if judged or (a.count != s[2] if kind == "counter" else held.get("by") is t):
                        snaps.append(d.copy())
                        d = t
                        left.clear()
                        cut = True
                        accepted = judged = True  # the anchor speaks of it: from here on that is the volume
                    elif out != "refused":
                        snaps.append(t)  # with a body that was prepared, perhaps
                    if judged and out != "refused" and r.random() < 0.5:
                        d.power_cut()
                        left.clear()
                else:
                    out, judged = go(d, True, steps, accepted)
                    if out == "moved":
                        count("moved")
                        d = next(t for t in trials if a.store.get("by") is t)
                        left.clear()
                        cut = accepted = True
                    if not isinstance(out, dict) and r.random() < 0.7:
                        d.power_cut()
                        left.clear()
                        cut = True
            if not cut and not accepted:
                for b in range(BLOCKS):
                    if (
                        b not in n.kept
                        and b not in u.torn
                        and d.data[b][-1][0] != "torn"
                        and u.issued[b][:-1]
                        and u.index(b, out["got"][b]) < len(u.issued[b]) - 1
                    ):
                        return f"seed {seed}: settled wrongly"
            kept = {} if cut else n.kept
            n = Node(d, u, out["sb"], out["top"], a, mode, out["held"])
            n.tasks += [n.write(b, False) for b in kept]  # in the order in which it likes: they don't overlap
            n.tasks += left
    except (Bad, Refuse) as e:
        return f"seed {seed}: {type(e).__name__}: {e}"
    return None


def seeds(runs, seed):
    return (seed * 1000003 + i for i in range(runs))


def find_each(runs, seed):
    """Plants each fault; the names of those that are not found."""
    missed = []
    for name, what in BUGS.items():
        plant(name)
        found = next((i for i, s in enumerate(seeds(runs, seed)) if run(s, ONLY.get(name), name in HOSTILE)), None)
        missed += [name] if found is None else []
        print(f"{name:16} {'NOT FOUND' if found is None else f'run {found + 1}':>10}  {what}", flush=True)
    return missed


def main(runs=4000, seed=1, fault=None):
    runs, seed = int(runs), int(seed)
    if fault == "each":
        missed = find_each(runs, seed)
        sys.exit(f"not found in {runs} runs: {', '.join(missed)}" if missed else 0)
    plant(fault)
    wrong = [m for m in (run(s, hostile=s % 4 == 0) for s in seeds(runs, seed)) if m]
    print(*wrong[:3], sep="\n", end="\n" if wrong else "")
    print(f"{runs} runs, {len(wrong)} wrong; " + ", ".join(f"{n} {what}" for what, n in sorted(COUNTS.items())))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
