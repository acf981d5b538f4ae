"""The anchor: a two-slot file, a store with compare-and-swap, or a bare counter whose body lies on the disk."""

from protocol.faults import bug

from .disk import Refuse


class Anchor:  # trusted; what it holds: {gen, id, next, pos, link}
    def __init__(a, r, kind, u):
        a.r, a.kind, a.u = r, kind, u
        a.file = [None, None]
        a.store = None
        a.count = 0
        a.era = 0  # which counter it is
        a.late = []
        a.out = False

    def applied(a, b):  # from here on it is promised
        if b["covers"]:
            a.u.anch = [max(x, y) for x, y in zip(a.u.anch, b["covers"])]
        if b["then"]:
            b["then"]()

    def load(a, d):
        if a.out:
            raise Away()
        if a.kind == "store":
            return a.store
        if a.kind == "file" and not any(a.file):
            raise Refuse("both slots of the anchor are torn")
        if a.kind == "file":
            return max((x for x in a.file if x), key=lambda x: x["gen"])
        ok = (a.count, a.count + 1) if not bug("lag1") else (a.count - 1, a.count, a.count + 1)
        have = [x for x in d.body if x and x["gen"] in ok and (a.ours(x) or bug("any_era"))]
        if not have:
            if bug("absent_ok") and not any(d.body):
                return None
            raise Refuse("no anchor body of the counter's value")
        return max(have, key=lambda x: x["gen"])

    def ours(a, b):  # not of a counter that was there before
        return b["era"] == a.era

    def other_counter(a, d):  # in the place of this one, for what the disk holds; it begins lower, perhaps
        held = a.load(d)
        if held["gen"] == a.count + 1:
            a.applied(held)
        a.era += 1
        a.count = a.r.randrange(a.count + 1) + 1
        for _ in a.write(d, dict(held, gen=a.count), dict(held, covers=None, then=None)):
            pass

    def land(a, exp, b):  # compare-and-swap
        if a.store["gen"] != exp and not bug("no_cas"):
            return False
        a.store = b
        a.applied(b)
        return True

    def write(a, d, old, new):  # generator; True: it holds; False: somebody else's is there, or it is away
        new = dict(new, gen=old["gen"] + 1, by=d, era=a.era)
        yield
        if a.out:
            return None
        if a.kind == "store":
            while True:
                x = a.r.random()
                if x < 0.12:  # no answer: it may still arrive, at any time
                    a.late.append((old["gen"], new))
                    yield
                    if a.out:
                        return None
                    if bug("late_ok"):
                        return new
                    if a.store is new:
                        return new
                    if a.store["gen"] != old["gen"]:
                        return None if not bug("no_fence") else new
                    continue
                ok = a.land(old["gen"], new) or a.store is new
                yield  # ours may have arrived late
                return new if ok or bug("no_fence") else None
        if a.kind == "file":  # the older of two slots; it tears
            if max([x["gen"] for x in a.file if x], default=0) != old["gen"] and not bug("no_fence"):
                return None  # compared under the file's lock
            i = min((0, 1), key=lambda i: a.file[i]["gen"] if a.file[i] else -1)
            if bug("one_slot"):
                i = 0
            a.file[i] = None
            yield
            a.file[i] = new
            a.applied(new)
            yield
            return new
        if bug("inc_first"):
            a.count += 1
            yield
        i = min((0, 1), key=lambda i: d.body[i]["gen"] if d.body[i] and a.ours(d.body[i]) else -1) if not bug("one_slot") else 0
        d.body[i] = None
        yield
        d.body[i] = new
        yield
        if not bug("inc_first"):
            a.count += 1
        a.applied(new)
        yield
        return new if a.count == new["gen"] or bug("no_forward", "inc_first", "lag1") else None


class Away(Exception):
    pass
