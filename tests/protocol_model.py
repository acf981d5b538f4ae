#!/usr/bin/env python3
"""Random model of the write, flush, zero, checkpoint and recovery orders (docs/crash-safety.md), with crashes between any two steps.
Oracle: after every crash each block reads as an allowed version (no false alarm, nothing older than the last completed flush or FUA write).
What a flush or a FUA write was answered for before a record was sealed is *recorded* once that record is durable: forks at every recovery put
each older version, and garbage, on each block, with the superblock that is there and with the one before it; none may read as something older than what is recorded.
A kill without a power cut loses nothing that was answered and is not kept. Nothing ever deadlocks, and nothing is left that flushes had to say.
usage: protocol_model.py [RUNS] [SEED] [BUG]     FAIL=0.05: share of data writes that fail
BUG: log_after flush_all flush_no_sync ignore_flush no_drain fail_forgets same_slot no_meta_sync one_sb overrun zero_newest_only
     zero_any late_buf mixed put_active join nothing own_durable refuse_stranded no_skip
     early_flush early_forget
     fua_unrecorded fua_unsynced fua_early drop_entry entry_early cut_high cut_varies silent_checkpoint stay_unlogged
In the model: one ring log with group commit, two records under way and a finite size, lazy flush records that may find no room, lists cut short, FUA writes, zero runs, failed and torn data writes, two slots a page,
writes answered when they have their range (kept for whoever comes after a kill),
two superblock copies that can tear, epochs, drain, recovery cut short and repeated. Not in it: the hash tree above the pages, the cache, keys."""
import os, random, sys
RUNS = int(sys.argv[1]) if len(sys.argv) > 1 else 20000
SEED = int(sys.argv[2]) if len(sys.argv) > 2 else 1
BUG = sys.argv[3] if len(sys.argv) > 3 else ""
FAIL = float(os.environ.get("FAIL", "0.05"))
NB, CAP = 3, 14                                     # blocks (one a page); records in the ring
class Refuse(Exception): pass

class Disk:                                         # what a crash leaves
    def __init__(d, r):
        d.r = r; d.data = [[('garbage', b)] for b in range(NB)]          # possible contents, newest last
        d.slot = [[[None], [None]] for _ in range(NB)]                   # two slots a page, possible contents
        d.log = {}; d.prev = None                                        # place in the ring -> record; the superblock before the last
        d.sb = [None, None]
    def sync_data(d): d.data = [[c[-1]] for c in d.data]
    def sync_meta(d): d.slot = [[[s[-1]] for s in p] for p in d.slot]
    def power_cut(d):
        d.data = [[d.r.choice(c)] for c in d.data]; d.slot = [[[d.r.choice(s)] for s in p] for p in d.slot]
    def write_sb(d, sb):                            # A durable, then B durable; a crash can tear the one being written
        for i in ((0, 1) if BUG != 'one_sb' else (sb['epoch'] % 2,)):
            old = d.sb[i]; d.sb[i] = d.r.choice([None, old]); yield
            d.sb[i] = sb; yield

def covers(W, q): return q <= W[0] and q not in W[1]

class User:                                         # what was promised
    def __init__(u): u.next = 1; u.issued = [[('zero', 0)] for _ in range(NB)]; u.acked = [0] * NB; u.floor = [0] * NB; u.logged = [0] * NB; u.torn = set(); u.number = {}
    def index(u, b, v): return len(u.issued[b]) - 1 - u.issued[b][::-1].index(v)
    def said(u, b, W):                              # the newest promised version of a block that a claim covers
        return max(i for i, v in enumerate(u.issued[b][:u.floor[b] + 1]) if i == 0 or v in u.number and covers(W, u.number[v]))

class Node:
    def __init__(n, d, u, sb, seq):
        n.d, n.u, n.sb = d, u, sb; n.epoch = sb['epoch']; n.seq = seq
        n.active, n.frozen, n.root = {}, None, dict(sb['root'])
        n.inflight, n.failed, n.guard = {}, {}, set()
        n.buf, n.way, n.pos, n.link, n.tail, n.durable = [], [], sb['tail'], sb['link'], sb['tail'], 0
        n.kept = {}; n.ck = False; n.tasks = []; n.flushlock = False; n.last_flush = (-1, ()); n.unlogged = None; n.said = [0] * NB; n.checkpointed = [0] * NB; n.most = d.r.choice((0, 1, 2, 9, 9))
    def tag(n, b):
        for p in (n.active, n.frozen or {}): 
            if b in p: return p[b]
        return n.root[b][1] if b in n.root else ('zero', 0)
    def full(n): return n.pos + (1 if n.buf else 0) - n.tail >= (CAP - 2 if BUG != 'overrun' else 99)
    def append(n, b, v):                            # epoch, number and in-flight entry in one step
        while n.full() or BUG != 'mixed' and any(x[0] != n.epoch for x in n.buf): yield   # what gathers is of one epoch
        n.seq += 1; q = n.seq; e = n.inflight[q] = n.epoch
        if BUG == 'late_buf': yield                 # epoch, number, in-flight list and gathering buffer are one step
        n.buf.append((e, 'tag', q, b, v)); n.u.number[v] = q
        if BUG == 'log_after': return q
        yield from n.commit(q)
        return q
    def commit(n, q):                               # group commit: whoever finds room for a record leads
        while n.durable < q:
            if len(n.way) < 2 and n.buf: yield from n.send(n.buf[0][0])
            yield
    def send(n, e):                                 # sealed one after the other, on their way side by side, durable in order
        batch = [x for x in n.buf if x[0] == e]; n.buf = [x for x in n.buf if x[0] != e]   # one epoch a record
        if BUG == 'mixed': batch += n.buf; n.buf = []
        if n.unlogged and (not batch or n.d.r.random() < .8):                # an entry that finds no room waits for the next record
            batch.append((e, 'flush', n.unlogged)); n.unlogged = None
        elif BUG == 'drop_entry': n.unlogged = None
        told = None if n.unlogged else [max(x) for x in zip(n.said, n.checkpointed)]   # all that was answered by now is said by this record or one before it
        rec = dict(pos=n.pos, prev=n.link, id=(id(n), n.pos, n.d.r.random()), epoch=e, entries=batch, first=n.way[0]['rec']['pos'] if n.way else n.pos)
        n.pos += 1; n.link = rec['id']; w = dict(rec=rec, done=False, told=told); n.way.append(w); yield
        n.d.log[rec['pos'] % CAP] = rec; yield
        w['done'] = True
        if BUG == 'own_durable': n.durable = max([n.durable] + [x[2] for x in batch if x[1] == 'tag'])
        while n.way and n.way[0]['done']:
            w = n.way.pop(0); rec = w['rec']; n.durable = max([n.durable] + [x[2] for x in rec['entries'] if x[1] == 'tag'])
            n.last = getattr(n, 'last', {}); n.last[rec['epoch']] = (rec['pos'] + 1, rec['id'])
            if w['told']: n.u.logged = [max(a, c) for a, c in zip(n.u.logged, w['told'])]
    def put(n, e, b, v): (n.active if BUG == 'put_active' or e == n.epoch else n.frozen if n.frozen is not None else {})[b] = v
    def write(n, b, fail, fua=False):
        d, u = n.d, n.u; early = not fail and not fua and b not in n.guard and d.r.random() < .5
        while b in n.guard: yield
        n.guard.add(b); v = ('w', u.next); u.next += 1; old = n.tag(b); oldc = d.data[b][-1]; u.issued[b].append(v)
        if early: u.acked[b] = u.index(b, v); n.kept[b] = v         # answered; its range is held
        if BUG == 'early_forget': n.kept.pop(b, None)
        q = yield from n.append(b, v); e = n.inflight[q]
        if not fail or d.r.random() < .4: d.data[b].append(v)
        elif d.r.random() < .4: d.data[b].append(('torn', v))
        yield
        if BUG == 'log_after': yield from n.commit(q)
        if not fail:
            n.put(e, b, v); u.torn.discard(b); n.kept.pop(b, None); place = u.index(b, v)
            if not fua or BUG == 'fua_early': u.acked[b] = place
            if fua and BUG == 'fua_early': u.floor[b] = place; n.said[b] = place
        else:                                       # under the range: sync, read back
            d.sync_data(); yield
            c = d.data[b][-1]
            if c == v: n.put(e, b, v); u.torn.discard(b)
            elif c == old or old[0] == 'zero':
                if BUG != 'fail_forgets': n.failed[q] = e
                u.issued[b].remove(v)
            else: n.put(e, b, v); n.failed[q] = e; u.torn.add(b)   # proves nothing: reads fail until the next write
        del n.inflight[q]; n.guard.discard(b)
        if fua and not fail: yield from n.sync([place if c == b else 0 for c in range(NB)], fua=True)
    def zero(n, b):
        u = n.u
        while b in n.guard: yield
        n.guard.add(b); v = ('zero', u.next); u.next += 1; u.issued[b].append(v)
        q = yield from n.append(b, v); e = n.inflight[q]
        yield
        n.put(e, b, v); u.torn.discard(b); u.acked[b] = u.index(b, v); del n.inflight[q]; n.guard.discard(b)
    def flush(n):
        acked, before = list(n.u.acked), dict(n.kept)
        while BUG != 'early_flush' and any(n.kept.get(b) == v for b, v in before.items()): yield
        yield from n.sync(acked)
    def sync(n, promised, fua=False):               # flushes and FUA writes share a sync where they can
        def answered():
            n.u.acked = [max(a, c) for a, c in zip(n.u.acked, promised)]; n.u.floor = [max(a, c) for a, c in zip(n.u.floor, promised)]
            n.said = [max(s, n.u.said(b, n.last_flush)) for b, s in enumerate(n.said)]
        if BUG == 'fua_unsynced' and fua: answered(); return
        if BUG == 'join' and n.flushlock:           # may only join a flush whose snapshot is not yet taken
            while n.flushlock: yield
            answered(); return
        while n.flushlock: yield
        if n.seq == n.last_flush[0] and (BUG == 'nothing' or not n.last_flush[1]): answered(); return   # nothing to do
        n.flushlock = True
        W = (n.seq, frozenset() if BUG == 'flush_all' else frozenset(n.inflight) | frozenset(n.failed))
        if BUG == 'entry_early': n.claim(W)
        yield
        if BUG != 'flush_no_sync': n.d.sync_data()
        yield
        n.flushlock = False; n.last_flush = W
        if BUG != 'entry_early' and not (BUG == 'fua_unrecorded' and fua): n.claim(W)
        answered(); yield
    def claim(n, W):                                # what the log is to be told; the newest only
        most = n.most if BUG != 'cut_varies' else n.d.r.choice((0, 9)); listed = sorted(W[1])
        if len(listed) > most: W = (W[0] if BUG == 'cut_high' else listed[most] - 1, frozenset(listed[:most]))
        n.unlogged = n.last_flush = W
    def worked(n): yield from n.worker(); n.ck = False
    def worker(n):                                  # the checkpoint thread, between checkpoints: an entry that no record carries along gets one of its own
        if n.unlogged and not n.buf and not n.way and not n.full() and BUG != 'stay_unlogged': yield from n.send(n.epoch)
    def checkpoint(n):
        d = n.d
        E = n.epoch; n.frozen, n.active = n.active, {}; n.epoch += 1
        yield
        while BUG != 'no_drain' and E in n.inflight.values(): yield
        while any(w['rec']['epoch'] == E for w in n.way): yield
        pos, link = getattr(n, 'last', {}).get(E, (n.sb['tail'], n.sb['link']))
        if BUG == 'silent_checkpoint': d.sync_data()
        else: yield from n.sync([0] * NB)         # the log is told in the next epoch: it matters where the ended one's superblock is put back
        for b, v in n.frozen.items():
            if BUG == 'silent_checkpoint' or covers(n.last_flush, n.u.number[v]): n.checkpointed[b] = max(n.checkpointed[b], n.u.index(b, v))
        yield
        root = dict(n.sb['root'])
        for b, v in sorted(n.frozen.items()):
            s = 1 - root[b][0] if b in root else 0
            if BUG == 'same_slot' and b in root: s = root[b][0]
            d.slot[b][s].append(v); root[b] = (s, v); yield
        if BUG != 'no_meta_sync': d.sync_meta()
        yield
        sb = dict(epoch=E + 1, root=root, tail=pos, link=link)
        yield from d.write_sb(sb)
        d.prev = n.sb; n.sb = sb; n.root = root; n.tail = pos; n.frozen = None; n.ck = False
        n.failed = {q: e for q, e in n.failed.items() if e != E}; yield

def newest(d):
    s = [x for x in d.sb if x]
    if not s: raise Refuse("no valid superblock")
    if len(s) == 2 and s[0]['epoch'] == s[1]['epoch'] and s[0] != s[1]: raise Refuse("two superblocks of one epoch")
    return max(s, key=lambda x: x['epoch'])

def scan(d, sb):
    pos, link, ents = sb['tail'], sb['link'], []
    while True:                                     # record numbers (pos) never restart
        rec = d.log.get(pos % CAP)
        if not rec or rec['pos'] != pos or rec['prev'] != link:
            later = [x for x in d.log.values() if x['pos'] >= pos]   # a crash may leave one that was sent before this one was durable
            if any(x['pos'] == pos or x['first'] > pos or BUG == 'refuse_stranded' for x in later): raise Refuse("the log holds a record newer than the superblock allows")
            return ents, max([pos] + [x['pos'] + 1 for x in later if BUG != 'no_skip']), link
        ents += rec['entries']; pos += 1; link = rec['id']

def candidates(sb, ents):
    c = [[(0, sb['root'][b][1] if b in sb['root'] else ('zero', 0))] for b in range(NB)]
    F = [x[2] for x in ents if x[1] == 'flush'][-1:]                   # the last one only: what it lists was listed before
    for x in sorted((x for x in ents if x[1] == 'tag'), key=lambda x: x[2]): c[x[3]].append((x[2], x[4]))
    for b in range(NB):
        base = 0
        for i, (q, v) in enumerate(c[b]):
            if v[0] == 'zero' and BUG != 'zero_any': base = i                         # logged zeros are done
            if BUG != 'ignore_flush' and any(covers(W, q) for W in F): base = max(base, i)
        c[b] = c[b][base:]
    return c

def settle(c, content):
    for q, v in reversed(c):
        if v == content: return v
    if c[0][1][0] == 'zero' and BUG != 'zero_newest_only' or c[-1][1][0] == 'zero': return c[-1][1] if c[-1][1][0] == 'zero' else c[0][1]
    return None

def forks(u, b, c, when):                           # somebody puts each of these there
    for x in u.issued[b][:u.logged[b]] + [('garbage', 'x')]:
        w = settle(c, x)
        if w is not None and (w not in u.issued[b] or u.index(b, w) < u.logged[b]): raise Refuse(f"{when}{x} put on block {b} reads as {w}, recorded is {u.logged[b]} of {u.issued[b]}")

def put_back(d, u, sb):                             # the superblock before the last, and an old block
    if not d.prev or d.prev['epoch'] != sb['epoch'] - 1: return
    try: ents = scan(d, d.prev)[0]
    except Refuse: return
    for b, c in enumerate(candidates(d.prev, ents)):
        if b not in u.torn: forks(u, b, c, "superblock put back: ")

def recover(d, u):                                  # a generator too: it can be cut short anywhere
    d.sync_data(); d.sync_meta(); yield None
    sb = newest(d)
    if BUG != 'one_sb':                             # both copies newest again, before anything old is reused
        for i in (0, 1):
            if d.sb[i] != sb: d.sb[i] = None; yield None; d.sb[i] = sb; yield None
    for b, (s, v) in sb['root'].items():
        if d.slot[b][s][-1] != v: raise Refuse(f"page {b}: its slot does not hold what the root says")
    ents, pos, link = scan(d, sb); put_back(d, u, sb)
    c = candidates(sb, ents); root = dict(sb['root'])
    got = []
    for b in range(NB):
        content = d.data[b][-1]; v = settle(c[b], content); vs = [x for _, x in c[b]]
        if v is None:
            if b not in u.torn and not (content[0] == 'torn'): raise Refuse(f"false alarm: block {b} holds {content}, candidates {vs}")
            v = vs[-1]
        elif b not in u.torn:
            if u.index(b, v) < (u.logged if content[0] == 'torn' else u.floor)[b]: raise Refuse(f"stale: block {b} settled as {v}, floor {u.floor[b]} of {u.issued[b]}")
            forks(u, b, c[b], "")
        got.append(v)
    yield None
    for b in range(NB):
        if b not in root or root[b][1] != got[b]:
            s = 1 - root[b][0] if b in root else 0
            d.slot[b][s].append(got[b]); root[b] = (s, got[b]); yield None
    d.sync_meta(); yield None
    new = dict(epoch=sb['epoch'] + 2, root=root, tail=pos, link=('open', d.r.random()))
    yield from (None for _ in d.write_sb(new))
    yield got, new, max([x[2] for x in ents if x[1] == 'tag'], default=0)

def run(seed):
    r = random.Random(seed); d = Disk(r); u = User()
    sb0 = dict(epoch=0, root={}, tail=0, link='format')
    for _ in d.write_sb(sb0): pass
    d.sb = [sb0, sb0]; n = Node(d, u, sb0, 0)
    try:
        for life in range(r.randint(1, 4)):
            for _ in range(r.randint(5, 300)):
                x = r.random()
                if len(n.tasks) < 7:
                    if x < .30: n.tasks.append(n.write(r.randrange(NB), r.random() < FAIL, r.random() < .3))
                    elif x < .38: n.tasks.append(n.zero(r.randrange(NB)))
                    elif x < .48: n.tasks.append(n.flush())
                    elif x < .53 and not n.ck: n.ck = True; n.tasks.append(n.checkpoint())
                    elif x < .58 and not n.ck: n.ck = True; n.tasks.append(n.worked())
                if n.tasks:
                    t = r.choice(n.tasks)
                    try: next(t)
                    except StopIteration: n.tasks.remove(t)
            if r.random() < .15:                    # no crash yet: everything must come to an end
                for k in range(4000):
                    if n.full() and not n.ck: n.ck = True; n.tasks.append(n.checkpoint())
                    if not n.tasks and n.unlogged and not n.ck: n.ck = True; n.tasks.append(n.worked())
                    if not n.tasks: break
                    t = r.choice(n.tasks)
                    try: next(t)
                    except StopIteration: n.tasks.remove(t)
                else: return f"seed {seed}: deadlock: {len(n.tasks)} tasks never end"
            cut = r.random() < .7
            if cut: d.power_cut()
            while True:
                steps = r.randint(1, 12) if r.random() < .5 else 999; out = None
                for i, y in enumerate(recover(d, u)):
                    if y: out = y
                    if i >= steps: out = None; break
                if out: break
                if r.random() < .7: d.power_cut(); cut = True
            got, sb, top = out
            for b in range(NB):
                if not cut and b not in n.kept and b not in u.torn and d.data[b][-1][0] != 'torn' and u.index(b, got[b]) < u.acked[b]: return f"seed {seed}: a kill lost what was answered on block {b}"
                u.issued[b].append(got[b]); u.floor[b] = u.acked[b] = u.logged[b] = len(u.issued[b]) - 1
            kept = {} if cut else n.kept; n = Node(d, u, sb, top)
            n.tasks += [n.write(b, False) for b in kept]            # in the order in which it likes: they don't overlap
    except Refuse as e: return f"seed {seed}: {e}"
    return None

if __name__ == '__main__':
    bad = 0
    for i in range(RUNS):
        m = run(SEED * 1000003 + i)
        if m:
            bad += 1
            if bad <= 3: print(m)
    print(f"{RUNS} runs, {bad} bad" + (f" with bug {BUG}" if BUG else "")); sys.exit(1 if bad else 0)
