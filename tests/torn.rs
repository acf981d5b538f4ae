//! Where the log ends that holds blocks: torn records, payload that looks like records, and payload
//! that can't be read.

use crate::sim::{
    Lab, SimStorage,
    craft::{Next, append},
    disk::{BadRange, Trace},
    format_options,
    image::{LOG_OFFSET, Logged, SUPERBLOCKS},
    key,
    logged::{
        forked, lab, log, log_payload, options, payload, payload_at, payload_of, put_version, read_only, recovered,
        tear,
    },
};
use std::{
    future::Future,
    task::{Context, Waker},
};
use ublk_integrity::{
    Device, OpenOptions,
    create::FormatOptions,
    open::{OpenError, Unknown, UnreadLog, open},
};

#[test]
fn a_torn_record_is_the_end_of_the_log() {
    let mut lab = lab();
    lab.write(7, 2, 1);
    lab.checkpoint();
    log_payload(&lab, 7, 2);
    let torn = log(&lab, payload(&lab, 8, &[2, 2]));
    // The second of its blocks only.
    lab.poke(Device::Meta, payload_at(&torn) + 512, &[0xee; 512]);
    let (mut lab, found) = recovered(lab);
    assert_eq!(found, ([1, 0, 0, 0], 1));
    let report = lab.volume.recovery();
    assert_eq!((report.torn_records, report.torn_was_durable), (1, false));
    assert!(lab.reads_as(7, 2) && lab.reads_as(8, 1) && lab.reads_as(9, 0));
    assert_eq!(lab.superblock().record_number, torn.number + 1, "its number is not given again");
    lab.write(8, 1, 3);
    let mut lab = lab.reopened().unwrap();
    assert!(lab.reads_as(8, 3));
}

/// Its data was sent, so it had been durable.
#[test]
fn a_torn_record_that_was_durable_once_is_told() {
    for (block, version, was_durable) in [(8, 2, true), (8, 1, false), (9, 2, true)] {
        let mut lab = lab();
        lab.write(8, 1, 1);
        lab.checkpoint();
        let torn = log_payload(&lab, block, 2);
        tear(&lab, &torn);
        put_version(&lab, block, version);
        let lab = lab.reopened().unwrap();
        let report = lab.volume.recovery();
        assert_eq!((report.torn_records, report.torn_was_durable), (1, was_durable), "block {block}");
    }
    // The same content was written again: nothing is lost.
    let mut lab = lab();
    lab.write(8, 1, 1);
    lab.checkpoint();
    let torn = log_payload(&lab, 8, 1);
    tear(&lab, &torn);
    let mut lab = lab.reopened().unwrap();
    assert!(!lab.volume.recovery().torn_was_durable && lab.reads_as(8, 1));
}

/// What a torn record says of those before it is true all the same, and it is none that is missing.
#[test]
fn torn_records_behind_the_end() {
    // The first of two under way is lost, the second torn; or both are torn; or the second is whole.
    for (first_torn, second_torn) in [(false, true), (true, true), (true, false)] {
        let lab = lab();
        let first = log_payload(&lab, 7, 2);
        let second = payload(&lab, 8, &[2]);
        let second = append(&mut lab.disk(), 1, &[second]);
        match first_torn {
            true => tear(&lab, &first),
            false => lab.poke(Device::Meta, first.offset, &[0; 512]),
        }
        if second_torn {
            tear(&lab, &second);
        }
        let (mut lab, found) = recovered(lab);
        assert_eq!(found, ([0, 0, 0, 0], 0));
        let torn = u64::from(first_torn) + u64::from(second_torn);
        assert_eq!(lab.volume.recovery().torn_records, torn);
        assert!(lab.reads_as(7, 0) && lab.reads_as(8, 0));
        assert_eq!(lab.superblock().record_number, second.number + 1);
    }
    // The second says that the first was durable.
    for second_torn in [false, true] {
        let lab = lab();
        let first = log_payload(&lab, 7, 2);
        let second = log_payload(&lab, 8, 2);
        tear(&lab, &first);
        if second_torn {
            tear(&lab, &second);
        }
        assert!(matches!(lab.reopened(), Err(OpenError::Tampered { .. })));
    }
}

/// Whoever writes to the volume chooses what lies in the log as payload: headers of any number, and a
/// record of this very log, which says that it is newer than all of them.
#[test]
fn payload_that_looks_like_records() {
    let mut lab = lab();
    lab.write(7, 1, 1);
    let superblock = lab.superblock();
    let next = Next::of(&lab.disk());
    // Under the log's own key, and at no place of its own.
    let newer = Next { number: next.number + 9, position: next.position + (64 << 10), ..next };
    let (bytes, _) = newer.seal(&superblock, 0, &[Logged::Flush { highest: 1, except: vec![] }]);
    assert_eq!(bytes.len(), 512);
    let expected = Next { number: next.number + 1, ..newer };
    let (same_number, _) = expected.seal(&superblock, 0, &[Logged::Flush { highest: 1, except: vec![] }]);
    log(&lab, payload_of(&lab, 20, &[bytes, same_number, vec![0; 512]]));
    let (mut lab, found) = recovered(lab);
    assert_eq!(found.1, 3);
    assert!(lab.reads_as(7, 1));
    // And once they lie in what is no live log any more.
    let mut lab = lab.reopened().unwrap();
    assert!(lab.reads_as(7, 1));
    // At its own place it does count.
    let moved = LOG_OFFSET + newer.position % superblock.log_size;
    let next = Next::of(&lab.disk());
    let newer = Next { number: next.number + 9, position: newer.position, ..next };
    let (bytes, _) = newer.seal(&superblock, 0, &[Logged::Flush { highest: 1, except: vec![] }]);
    lab.poke(Device::Meta, moved, &bytes);
    assert!(matches!(lab.reopened(), Err(OpenError::Tampered { .. })));
}

/// Where the chain goes on it must be read, payload too; a rescue leaves the record out.
#[test]
fn payload_that_cant_be_read_is_not_the_end_of_the_log() {
    let mut lab = lab();
    lab.write(7, 2, 1);
    lab.checkpoint();
    let record = log_payload(&lab, 7, 2);
    let at = payload_at(&record);
    lab.disk().bad_ranges = vec![BadRange::unreadable(Device::Meta, at..at + 512)];
    for options in [options(), read_only()] {
        assert!(matches!(forked(&lab, &options), Err(OpenError::LogUnreadable(_))));
    }
    let rescue = OpenOptions { unread_log: UnreadLog::ServeOlder, ..read_only() };
    let mut rescued = forked(&lab, &rescue).unwrap();
    assert_eq!(rescued.volume.recovery().torn_records, 0);
    assert!(rescued.reads_as(7, 1) && rescued.volume.latched().is_some());
    lab.disk().bad_ranges.clear();
    assert!(lab.reopened().unwrap().reads_as(7, 2));
}

/// A transfer that brings a wrong bit of payload once does not tear its record.
#[test]
fn payload_that_comes_wrong_once() {
    let lab = lab();
    let record = log_payload(&lab, 7, 2);
    lab.disk().garbled_once = Some(payload_at(&record) + 100);
    let (mut lab, found) = recovered(lab);
    assert_eq!((found, lab.reads_as(7, 2)), (([1, 0, 0, 0], 1), true));
}

/// Polls an open, and does something once it has read the log for the first time.
fn open_while(lab: &Lab, options: &OpenOptions, after_log: impl FnOnce(&SimStorage)) -> Result<(), OpenError> {
    let io = SimStorage::new(lab.disk().fork(1));
    io.disk().trace = Some(Vec::new());
    let (key, mut after_log) = (key(), Some(after_log));
    let mut opening = std::pin::pin!(open(&io, &key, options));
    let read_log =
        |t: &(u64, Trace)| matches!(t.1, Trace::Read { device: Device::Meta, offset, .. } if offset >= LOG_OFFSET);
    loop {
        if let std::task::Poll::Ready(opened) = opening.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            assert!(after_log.is_none());
            return opened.map(|_| ());
        }
        assert!(io.in_flight() > 0);
        io.complete_any();
        let has_read = io.disk().trace.as_ref().unwrap().iter().any(read_log);
        if has_read {
            after_log.take().into_iter().for_each(|f| f(&io));
        }
    }
}

/// It is read once more when it is put in place: what proves nothing then is no decision to be
/// written down.
#[test]
fn payload_that_is_gone_when_it_is_wanted() {
    let lab = lab();
    let record = log_payload(&lab, 7, 2);
    let at = payload_at(&record);
    let before = SUPERBLOCKS.map(|at| lab.peek(Device::Meta, at, 512));
    let unchanged = |io: &SimStorage| SUPERBLOCKS.map(|at| io.disk().peek(Device::Meta, at, 512)) == before;
    let mut seen = None;
    let result = open_while(&lab, &options(), |io| {
        io.disk().poke(Device::Meta, at, &[0xee; 512]);
        seen = Some(io.clone());
    });
    assert!(matches!(result, Err(OpenError::LogUnreadable(_))), "{result:?}");
    assert!(unchanged(&seen.unwrap()));
    let mut seen = None;
    let result = open_while(&lab, &options(), |io| {
        io.disk().bad_ranges = vec![BadRange::unreadable(Device::Meta, at..at + 512)];
        seen = Some(io.clone());
    });
    assert!(matches!(result, Err(OpenError::LogUnreadable(_))), "{result:?}");
    assert!(unchanged(&seen.unwrap()));
}

/// A volume whose superblock says nothing of a sync log has none.
#[test]
fn payload_in_a_log_of_version_1_is_foreign() {
    let format = FormatOptions { separate_meta: true, log_size: Some(1 << 20), ..format_options(512) };
    let lab = Lab::new(&format, &OpenOptions { sync_log: false, ..options() });
    log_payload(&lab, 7, 2);
    let error = lab.reopened().err().unwrap();
    assert!(matches!(error, OpenError::Unknown(Unknown::EntryKind(4))), "{error}");
}
