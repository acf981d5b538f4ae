"""The key area: two copies on the disk, and what the anchor says of it. A change permits the new one, writes it, then permits it alone."""

from protocol.faults import bug, count

from .disk import Refuse


def newest_area(d):
    whole = [x for x in d.keys if x]
    if not whole:
        raise Refuse("no whole key area")
    return max(whole, key=lambda x: x["gen"])


def permits(held, area):  # is that one by which the volume is opened?
    if bug("keys_unjudged") or held is None or held["keys"] is None:
        return True  # a program that did not ask has written what the anchor holds
    return area["id"] in (held["keys"], held["keys_next"])


def change_keys(d, u, held, tell):
    """One change; `tell(held, new)` has the anchor hold a body: that, or None. Cut short anywhere. Returns what it holds, if anything."""
    found = newest_area(d)
    if not permits(held, found):
        raise Refuse("the key area is not the anchor's")
    new = dict(gen=found["gen"] + 1, id=("keys", d.r.random()))
    u.areas.add(new["id"])  # from here on it may be found

    def done():  # who was removed opens it no more
        u.areas = {new["id"]}

    alone = dict(keys=new["id"], keys_next=None, covers=None, then=done)
    if bug("keys_commit_first"):
        held = yield from tell(held, dict(held, **alone))
        if not held:
            return None
    elif not bug("keys_no_intent"):
        held = yield from tell(held, dict(held, keys=found["id"], keys_next=new["id"], covers=None, then=None))
        if not held:
            return None
    newest = d.keys.index(found)
    for i in (newest, 1 - newest) if bug("keys_newest_first") else (1 - newest, newest):
        d.keys[i] = None
        yield
        d.keys[i] = new
        yield
    if bug("keys_no_commit"):
        done()
    elif not bug("keys_commit_first"):
        held = yield from tell(held, dict(held, **alone))
    count("key_changes")
    return held


def change_unserved(d, u, a):
    """The same while nobody serves the volume."""
    held = a.load(d)
    if a.kind == "counter" and held["gen"] == a.count + 1:
        a.count += 1  # what was begun is ended first
        a.applied(held)
        yield
    yield from change_keys(d, u, held, lambda held, new: a.write(d, held, new))
