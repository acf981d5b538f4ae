"""The key area: two copies on the disk, and what the anchor says of it. A change permits the new one, writes it, then permits it alone.

The anchor drops an area only while both copies hold, durably, one that it goes on to permit."""

from protocol.faults import bug, count

from .disk import Refuse


def read(d):
    """The copies as they are read: now and then one can't be, for a moment; not where the adversary has put back
    one of them, or both as they were in the middle of a change."""
    copies = [x[-1] for x in d.keys]
    if all(copies) and not d.mixed and d.r.random() < 0.05:
        copies[d.r.randrange(2)] = None
        count("unreadable_areas")
    return copies


def newest_area(copies):
    whole = [x for x in copies if x]
    if not whole:
        raise Refuse("no whole key area")
    return max(whole, key=lambda x: x["gen"])


def permits(held, area):  # is that one by which the volume is opened?
    if bug("keys_unjudged") or held is None or held["keys"] is None:
        return True  # a program that did not ask has written what the anchor holds
    return area["id"] in (held["keys"], held["keys_next"])


def write_copy(d, i, area):  # durable once it is answered
    d.keys[i].append(None)
    yield
    d.keys[i].append(area)
    yield
    d.keys[i] = [area]
    yield


def settle(d, copies, found):
    """What was cut short is ended: the copy that counts is durable, then both are as that."""
    if not bug("keys_unsynced"):
        d.sync_keys()
        yield
    for i in (0, 1):
        if copies[i] != found and not bug("keys_unsettled"):
            yield from write_copy(d, i, found)
    d.mixed = False


def change_keys(d, u, held, tell):
    """One change; `tell(held, new)` has the anchor hold a body: that, or None. Cut short anywhere. Returns what it holds, if anything."""
    copies = read(d)
    found = newest_area(copies)
    if not permits(held, found):
        raise Refuse("the key area is not the anchor's")
    yield from settle(d, copies, found)
    new = dict(gen=found["gen"] + 1, id=("keys", d.r.random()))
    if d.r.random() < 0.2:  # what there was to do has been done by the change that was cut short
        new = found
        count("key_settles")
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
    for i in (0, 1) if new is not found else ():
        yield from write_copy(d, i, new)
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
