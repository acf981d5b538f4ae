"""The faults that can be planted, and what is counted of the runs."""

import os

BUGS = dict(
    # records and epochs
    log_after="data is sent before its tags are durable",
    own_durable="a record counts as durable before the one sealed before it is",
    late_buf="a number is given before its entry gathers",
    mixed="a record holds entries of two epochs",
    overrun="the log does not wait for space",
    put_active="tags are published in the epoch that is current, not in that of their number",
    refuse_stranded="recovery refuses a record that a crash has left without its predecessor",
    no_skip="the next record takes the number of such a record",
    torn_whole="a record whose blocks are torn counts as whole",
    torn_refused="a record whose blocks are torn counts as one that the log must not hold",
    # flushes and what the log is told
    flush_no_sync="no flush syncs",
    sync_skipped="a flush does not sync though there is unsynced data",
    nothing="a flush does nothing where no number was given since the last one",
    join="a flush takes a sync for its own whose snapshot was taken before it",
    early_flush="a flush does not wait for admitted writes",
    pay_early="a flush does not wait for the records of writes that are carried",
    flush_all="a flush entry leaves out what is in flight and not carried",
    entry_early="a flush entry is logged before the sync has ended",
    drop_entry="a flush entry that finds no room is dropped",
    stay_unlogged="a flush entry waits for a record for ever",
    not_followed="the last record that carries blocks is not followed by another",
    followed_early="a record that was sealed before that one was durable counts as such",
    cut_high="a list that is cut short claims the numbers that were cut off",
    cut_varies="a list is not always cut at the same length",
    old_snapshot="a sync's older snapshot replaces that of a flush without a sync",
    ignore_flush="recovery ignores flush entries",
    # FUA
    fua_unrecorded="the sync of a FUA write makes no flush entry",
    fua_unsynced="a FUA write that is not carried is answered unsynced",
    fua_early="a FUA write that is not carried is answered before the sync",
    pay_fua_early="a FUA write that is carried is answered before its record is durable",
    # writes that are carried
    inplace_early="carried data is sent to its place before its record is durable",
    unlocked="a carried write unlocks its range before it is in place",
    pass_early="later writes pass one that is carried and not yet safe",
    no_turn_carried="carried data is sent before earlier writes are in place",
    no_turn="data that is not carried is sent before earlier writes are in place",
    zeros_pass="zeros pass a parked write",
    super_unsafe="a write is superseded by one that is not safe yet",
    super_partial="a write is superseded by one that covers a part of it",
    super_tags="a write is superseded by one that is not carried",
    place_unpublished="a carried write that is in place publishes no tags",
    read_medium="a read of a parked block does not wait for it",
    kept_appended="a carried write is no longer kept once it has gathered",
    kept_passed="a later write passes one that is carried and still kept",
    kept_answered="an admitted write is not kept",
    queue_passes="an admitted write begins before those that it was admitted behind",
    heir_of_part="a write that waits is not written where a later one covers a part of it",
    heir_over_read="a write that waits is not written though a read waits for it",
    heir_unawaited="a flush does not wait for what is written in the place of a write that was answered before it",
    heir_keeps="a write that is not written because of a later one is still kept",
    kept_unordered="what was kept is put in place in any order",
    fail_unlatched="a carried write that fails counts as in place",
    fail_admitted="an admitted write that fails does not latch, and is no longer kept",
    fail_forgets="the number of a write that has failed is claimed by later flushes",
    # checkpoints
    no_drain="a checkpoint does not wait for the numbers of its epoch",
    ck_parked="a checkpoint does not wait for parked writes",
    ck_need="a checkpoint syncs by the flush's rule",
    ck_mute="a checkpoint that has nothing to sync tells the log nothing",
    silent_checkpoint="the sync of a checkpoint makes no flush entry",
    same_slot="a page is written over the slot that is current",
    touch_in_place="a page that has rotted is written over the slot that is current",
    no_meta_sync="the superblock does not wait for the pages",
    one_sb="one copy of the superblock is written",
    # healing
    heal_unheld="a block is healed without its range",
    heal_stale="a block is healed by the tag that it had before its range was taken",
    heal_unsynced="a healed block is not synced",
    # growing
    identity_first="a volume that grows says so on the data device before it does in the superblock",
    identity_exact="an open refuses the data device of a volume that grew when a crash came in between",
    grown_in_one="the superblock of a volume that grew is written to one copy",
    # recovery
    zero_newest_only="unwritten blocks are alarms",
    zero_any="logged zeros leave older candidates",
    pay_not_base="a carried block leaves older candidates",
    pay_preferred="a carried block is taken though newer data is on the medium",
    pay_unwritten="recovery does not write carried blocks",
    pay_unsynced="recovery does not sync what it has written",
    no_shadow="recovery knows no version older than a carried block",
    pay_restored="a carried block is taken where no version explains what is on the medium",
    log_cut="the log counts as ended where it can't be read",
    no_skip_bad="numbers are not skipped beside a part of the log that can't be read",
    decided="a block that can't be read counts as its newest candidate",
)
PLANTED = None
FAIL, RDERR, LOGERR, HOLD = (float(os.environ.get(*x)) for x in (("FAIL", .05), ("RDERR", .1), ("LOGERR", .1), ("HOLD", .6)))
COUNTS = {}


def plant(name):
    global PLANTED
    PLANTED = name


def bug(*names):
    """Whether one of these is planted."""
    return PLANTED in names


def planted():
    return PLANTED is not None


def count(what, by=1):
    COUNTS[what] = COUNTS.get(what, 0) + by
