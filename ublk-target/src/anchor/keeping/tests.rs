use super::*;
use crate::{
    anchor::FileAnchor,
    offline::{Offline, Opening, scratch},
    ublk::Shared,
};
use std::{path::Path, thread, time::Duration};
use ublk_integrity::{
    Access, BlockIndex, BlockRange, Buf, Credential, Durability, Latched, WriteError,
    anchor::{AnchorPurpose, KeyAreaMark, KeyAreaStep},
};

/// A volume that is served with an anchor, and a tick each 20 ms.
struct Served {
    _file: tempfile::NamedTempFile,
    folder: tempfile::TempDir,
    offline: Offline,
    key: Credential,
    volume: Arc<Volume>,
    keeping: Keeping,
}

impl Served {
    fn new(grace_seconds: u64, lost: Lost) -> Self {
        Self::with(grace_seconds, lost, false)
    }

    fn with(grace_seconds: u64, lost: Lost, holds_flushes: bool) -> Self {
        let (file, offline, key) = scratch();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("anchor");
        let chosen = AnyAnchor::File(FileAnchor::make(&path, Duration::from_secs(20)).unwrap().0);
        let how = Opening { purpose: AnchorPurpose::Begin, ..Opening::new(Access::ReadWrite, None) };
        let (volume, keeper) = offline.open_anchored(&key, how, Some(&chosen)).unwrap();
        let (volume, keeper) = (Arc::new(volume), keeper.unwrap());
        let settings = AnchorSettings {
            place: format!("file:{}", path.display()).parse().unwrap(),
            wait_seconds: 0,
            timeout_seconds: 1,
            every_milliseconds: Some(20),
            grace_seconds: Some(grace_seconds),
            lost,
            holds_flushes,
            same_disk: true,
            wear_ok: false,
        };
        let (backings, files) = offline.handles();
        let log = Shared::of_test(Arc::clone(&volume), files).log;
        let pace = settings.pace(false).unwrap();
        let kept = Kept { anchor: chosen, keeper, settings, pace };
        let keeping = Keeping::start(&volume, backings, &log, kept).unwrap();
        Self { _file: file, folder, offline, key, volume, keeping }
    }

    fn path(&self) -> std::path::PathBuf {
        self.folder.path().join("anchor")
    }

    fn write(&self) {
        let (one, mut context) = (BlockRange::new(BlockIndex(3), 1), self.volume.context(0));
        let io = self.offline.io();
        let write = self.volume.write(&io, &mut context, one, Buf::new(4096), Durability::MayBeLost);
        self.offline.run(write).unwrap().0.unwrap();
    }

    fn flush(&self) -> Result<(), WriteError> {
        let (io, mut context) = (self.offline.io(), self.volume.context(0));
        self.offline.run(self.volume.flush(&io, &mut context)).unwrap()
    }

    fn shown(&self) -> serde_json::Value {
        serde_json::to_value(self.keeping.report().shown(&self.volume)).unwrap()
    }

    /// Waits until `status` says so.
    fn until(&self, is_so: impl Fn(&serde_json::Value) -> bool) -> serde_json::Value {
        for _ in 0..3000 {
            let shown = self.shown();
            if is_so(&shown) {
                return shown;
            }
            thread::sleep(Duration::from_millis(10));
        }
        panic!("in vain waited for: {}", self.shown());
    }
}

fn with_size(path: &Path, bytes: u64) {
    std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(bytes).unwrap();
}

#[test]
fn what_is_written_is_covered_and_an_orderly_end_to_the_last_record() {
    let served = Served::new(60, Lost::Readonly);
    let before = served.until(|shown| shown["state"] == "ok")["generation"].as_u64().unwrap();
    served.write();
    served.until(|shown| shown["generation"].as_u64() > Some(before) && shown["lag_records"] == 0);
    served.write();
    let Served { keeping, volume, offline, key, folder, _file } = served;
    let last = keeping.end();
    offline.run(volume.close(&offline.io())).unwrap().unwrap();
    let end = volume.next_record().0;
    last.tell();
    drop(volume);
    let chosen = AnyAnchor::File(FileAnchor::open(&folder.path().join("anchor"), Duration::from_secs(20)).unwrap());
    let how = Opening::new(Access::ReadOnly, None);
    let (_, keeper) = offline.open_anchored(&key, how, Some(&chosen)).unwrap();
    assert_eq!(keeper.unwrap().status().record, end);
}

#[test]
fn an_anchor_that_is_away_for_too_long_makes_the_volume_read_only() {
    let served = Served::new(1, Lost::Readonly);
    with_size(&served.path(), 0);
    served.write();
    let away = served.until(|shown| shown["state"] == "away");
    assert!(away["why"].as_str().unwrap().contains("anchor"), "{away}");
    assert_eq!(served.volume.latched(), None, "there is time");
    served.until(|shown| shown["state"] == "lost");
    assert!(served.volume.latched().is_some());
}

#[test]
fn or_it_goes_on_and_says_that_it_is_stale_until_it_is_back() {
    let served = Served::new(0, Lost::Continue);
    let whole = std::fs::read(served.path()).unwrap();
    with_size(&served.path(), 0);
    served.write();
    served.until(|shown| shown["state"] == "stale");
    assert_eq!(served.volume.latched(), None);
    std::fs::write(served.path(), whole).unwrap();
    served.until(|shown| shown["state"] == "ok");
}

#[test]
fn a_flush_waits_for_the_anchor_and_fails_where_that_does_not_answer() {
    let served = Served::with(3600, Lost::Continue, true);
    served.write();
    served.flush().unwrap();
    served.until(|shown| shown["lag_records"] == 0 && shown["mode"] == "flush" && shown["generation"] != 1);
    served.flush().unwrap();
    with_size(&served.path(), 0);
    served.write();
    assert!(matches!(served.flush(), Err(WriteError::Latched(Latched::Anchor(AnchorLoss::Away)))));
    served.until(|shown| shown["state"] == "lost");
}

fn mark(byte: u8) -> KeyAreaMark {
    KeyAreaMark { generation: byte.into(), digest: [byte; 32] }
}

/// What the thread answers.
fn asks(served: &Served, found: u8, step: KeyAreaStep) -> Result<u64, Failure> {
    let (answer, answered) = mpsc::channel();
    let answer = Box::new(move |done| answer.send(done).unwrap());
    served.keeping.report().ask(Ask { found: mark(found), step, answer });
    answered.recv_timeout(Duration::from_secs(60)).unwrap()
}

#[test]
fn key_areas_are_told_between_two_ticks_and_old_ones_are_not() {
    let served = Served::new(60, Lost::Readonly);
    served.write();
    let before = asks(&served, 3, KeyAreaStep::Begin(mark(4))).unwrap();
    served.write();
    assert_eq!(asks(&served, 3, KeyAreaStep::Judge).unwrap(), asks(&served, 4, KeyAreaStep::Judge).unwrap());
    assert!(asks(&served, 4, KeyAreaStep::End).unwrap() > before);
    let old = asks(&served, 3, KeyAreaStep::Judge).unwrap_err();
    assert!(old.exit == Exit::Integrity && old.message.contains("key area"), "{}", old.message);
    assert_eq!(served.volume.latched(), None, "it goes on");
    let now = served.shown()["generation"].as_u64().unwrap();
    served.write();
    served.until(|shown| shown["generation"].as_u64() > Some(now) && shown["lag_records"] == 0);
    // What the anchor holds says so.
    let Served { keeping, volume, offline, key, folder, _file } = served;
    let (last, report) = (keeping.report(), keeping.end());
    offline.run(volume.close(&offline.io())).unwrap().unwrap();
    report.tell();
    let (answer, answered) = mpsc::channel();
    let answer = Box::new(move |done| answer.send(done).unwrap());
    last.ask(Ask { found: mark(4), step: KeyAreaStep::End, answer });
    assert!(answered.recv().unwrap().is_err_and(|why: Failure| why.exit == Exit::Busy), "nobody answers any more");
    drop(volume);
    let path = folder.path().join("anchor");
    let chosen = AnyAnchor::File(FileAnchor::open(&path, Duration::from_secs(20)).unwrap());
    let refused = offline.open_anchored(&key, Opening::new(Access::ReadOnly, None), Some(&chosen));
    assert!(refused.is_err_and(|why| why.message.contains("of generation 4 when")), "its key is from no key area");
}

#[test]
fn where_the_anchor_is_away_no_key_area_is_told_and_where_it_is_lost_nobody_answers() {
    let served = Served::new(3600, Lost::Readonly);
    let whole = std::fs::read(served.path()).unwrap();
    with_size(&served.path(), 0);
    assert_eq!(asks(&served, 3, KeyAreaStep::Begin(mark(4))).unwrap_err().exit, Exit::Device);
    std::fs::write(served.path(), whole).unwrap();
    asks(&served, 3, KeyAreaStep::Begin(mark(4))).unwrap();
    std::fs::write(served.path(), [0; 8192]).unwrap();
    served.write();
    served.until(|shown| shown["state"] == "lost");
    let lost = asks(&served, 4, KeyAreaStep::End).unwrap_err();
    assert!(lost.message.contains("read-only"), "{}", lost.message);
}

/// It has nothing to tell, and its orderly end would write the superblocks.
#[test]
fn who_has_lost_the_volume_and_is_idle_notices_before_it_ends() {
    let served = Served::new(60, Lost::Readonly);
    served.until(|shown| shown["state"] == "ok");
    std::fs::write(served.path(), [0; 8192]).unwrap();
    let Served { keeping, volume, offline, _file, folder: _folder, .. } = served;
    let before = std::fs::read(_file.path()).unwrap();
    let last = keeping.end();
    assert!(volume.latched().is_some_and(|why| why.to_string().contains("somebody else")));
    assert!(offline.run(volume.close(&offline.io())).unwrap().is_err());
    last.tell();
    assert!(std::fs::read(_file.path()).unwrap() == before, "something was written");
}

/// It may have been lost to another host, whose superblocks would be written over.
#[test]
fn who_can_ask_nobody_at_the_end_leaves_the_superblocks_alone() {
    let served = Served::new(3600, Lost::Continue);
    served.until(|shown| shown["state"] == "ok");
    let whole = std::fs::read(served.path()).unwrap();
    with_size(&served.path(), 0);
    served.write();
    served.until(|shown| shown["state"] == "away");
    let Served { keeping, volume, offline, key, folder, _file } = served;
    let before = std::fs::read(_file.path()).unwrap();
    let last = keeping.end();
    assert_eq!(volume.latched(), Some(Latched::Anchor(AnchorLoss::Away)));
    assert!(offline.run(volume.close(&offline.io())).unwrap().is_err());
    last.tell();
    assert!(std::fs::read(_file.path()).unwrap() == before, "something was written");
    drop(volume);
    // Once it is there again nothing is missing.
    let path = folder.path().join("anchor");
    std::fs::write(&path, whole).unwrap();
    let chosen = AnyAnchor::File(FileAnchor::open(&path, Duration::from_secs(20)).unwrap());
    let (volume, _) = offline.open_anchored(&key, Opening::new(Access::ReadWrite, None), Some(&chosen)).unwrap();
    assert!(volume.recovery().records > 0, "{:?}", volume.recovery());
}

#[test]
fn who_has_taken_the_anchor_ends_it_here() {
    let served = Served::new(60, Lost::Readonly);
    let mut bytes = std::fs::read(served.path()).unwrap();
    bytes[..4096].fill(0);
    bytes[4096..].fill(0);
    std::fs::write(served.path(), bytes).unwrap();
    served.write();
    served.until(|shown| shown["state"] == "lost");
    assert!(served.volume.latched().is_some_and(|why| why.to_string().contains("somebody else")));
}
