"""The faults that can be planted. What is planted and counted is kept where the other model keeps it: protocol/faults.py."""

BUGS = dict(
    # what the anchor is told, and when
    anch_early="the anchor gets the point of a record that is not durable yet",
    ack_early="a flush is answered before the anchor holds what covers it",
    no_entry="the record with the flush entry is not waited for",
    late_ok="an anchor that does not answer is taken to have done it",
    no_cas="the anchor takes a write whatever it holds by then",
    no_fence="a write that finds somebody else's body is taken for done",
    one_slot="both bodies of a file or counter are written to one slot",
    # opens
    no_intent="the superblock is written before the anchor knows its id",
    commit_first="the anchor holds the new id before the superblock does",
    no_commit="requests are served before the anchor holds the new id alone",
    keep_next="the id before stays permitted when an open has been done",
    taken_once="an open whose intent finds another body in its place does not judge once more",
    intent_keeps="an intent keeps the id of before, though the disk has that of an open cut short",
    # the judgement
    open_unchecked="no disk is judged",
    number_only="a disk is judged by the record's number alone",
    number_and_link="a disk is judged by number and link, not by the open's id",
    end_exact="a log that is longer than the point is refused",
    refuse_newer="a superblock that has moved on past the point is refused",
    zero_next="no open under way means that the id of a fresh format is permitted",
    absent_ok="a counter without a body permits whatever the disk says",
    # the counter
    inc_first="the counter is incremented before the body is written",
    lag1="the counter may be one ahead of the body",
    no_forward="a body that was prepared is not rolled forward before the next",
    one_bump="an open increments the counter once",
    any_era="a counter takes the bodies of the one that was there before it",
    # the key area
    keys_unjudged="the key area is not asked for",
    keys_no_intent="a key area is written before the anchor permits it",
    keys_commit_first="the anchor permits the new key area alone before that is written",
    keys_no_commit="a change of the key area is done while the anchor permits the one of before",
    keys_open_narrows="an open has the anchor permit the key area alone that it has read",
    keys_unsettled="a change goes on from copies of the key area that differ",
    keys_unsynced="a change goes on from a key area that may not be durable",
    keys_dropped="a point is told without the key area",
)
# Those that concern one kind of anchor: the others' runs can't find them.
ONLY = {name: "counter" for name in ("absent_ok", "inc_first", "lag1", "no_forward", "one_bump", "any_era")} | {"taken_once": "store"}
# Those that take several tampered disks in a row: runs of many short lives, with more of them.
HOSTILE = ("number_and_link", "no_forward", "one_bump")
# Not here: a change of the key area that was cut short and is ended by one body. It takes the adversary an open at the very
# moment, and a disk of another; tests/anchored/key_area/cut_short.rs goes that way. Nor an id without the link (`no_link`). It
# was never found: the link catches in addition one life that runs twice, a virtual machine that is resumed from a snapshot,
# which this model has not.
