//! Scrub: it finds what has rotted, says nothing false beside any load, and is in nobody's way.

mod beside_checkpoints;
mod finding;
mod healing;
mod load;
mod mending;
mod steering;

use crate::sim::{
    Disk, Executor, Lab, Rng, SimStorage, block_on, elsewhere,
    exec::{Step, join},
    faults::{BadRange, Trace},
    format_options, formatted,
    image::{Page, Superblock},
    lab::with_checkpoints,
    open_options,
    oracle::fill_all,
    reopen, tag_algorithm,
    world::MAX_REQUEST,
};
use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
    future::{Future, poll_fn},
    num::NonZeroU64,
    pin::pin,
    rc::Rc,
    task::Poll,
    time::Duration,
};
use ublk_integrity::{
    Access, BadReason, BlockIndex, BlockRange, Buf, ByteOffset, Device, Durability, Errno, OpenOptions, PageName,
    RequestContext, Storage, Volume,
    create::FormatOptions,
    heal::{HealError, Healed},
    scrub::{BadMetadata, MetadataPart, Remedy, Scrub, ScrubControl, ScrubFinding, ScrubReport, ScrubState},
};

/// One pass to its end; what it has told is what it reports.
fn pass(volume: &Volume, io: &SimStorage) -> ScrubReport {
    let (control, mut told) = (ScrubControl::new(Scrub::default(), None), Vec::new());
    let scrub = async { volume.scrub(io, &control, |finding| told.push(finding)).await };
    let waiting = |report: &ScrubReport| report.bad_metadata.iter().filter(|bad| bad.remedy == Remedy::Waits).count();
    // One comes when the pass waits for it: until then all is as it was.
    let checkpoint = async {
        let mut looks = 0;
        while control.state() == ScrubState::Running {
            let before = waiting(&control.report());
            io.sleep(Duration::from_millis(100)).await.unwrap();
            looks = if before > 0 && waiting(&control.report()) == before { looks + 1 } else { 0 };
            if looks == 50 {
                volume.checkpoint(io).await.unwrap();
            }
        }
    };
    block_on(io, join(scrub, checkpoint));
    let report = control.report();
    assert_eq!((report.state, report.cursor, report.blocks), (ScrubState::Ended, volume.blocks(), volume.blocks()));
    assert_eq!((report.held_at, report.waiting_metadata), (None, 0));
    let blocks = report.bad_runs.iter().map(|run| ScrubFinding::Blocks(*run));
    let all: Vec<_> = blocks.chain(report.bad_metadata.iter().map(|bad| ScrubFinding::Metadata(*bad))).collect();
    let waits = |finding: &&ScrubFinding| matches!(finding, ScrubFinding::Metadata(bad) if bad.remedy == Remedy::Waits);
    let settled = told.len() - told.iter().filter(waits).count();
    assert!(all.len() == settled && all.iter().all(|finding| told.contains(finding)), "{told:?}: {report:?}");
    report
}

/// The same where no checkpoint comes, for which it would wait.
fn pass_alone(volume: &Volume, io: &SimStorage) -> ScrubReport {
    let control = ScrubControl::new(Scrub::default(), None);
    let waits = polled(volume.scrub(io, &control, |_| {}), io, 400);
    let report = control.report();
    assert_eq!(report.cursor, volume.blocks());
    assert_eq!(waits.is_some(), report.waiting_metadata > 0);
    report
}

/// A pass to its end, beside checkpoints, and whether it came there.
fn goes_on(volume: &Volume, io: &SimStorage, control: &ScrubControl, pass: impl Future<Output = ()>) -> ScrubReport {
    let checkpoints = async {
        while control.state() == ScrubState::Running {
            io.sleep(Duration::from_secs(1)).await.unwrap();
            volume.checkpoint(io).await.unwrap();
        }
    };
    block_on(io, join(pass, checkpoints));
    control.report()
}

/// Polls a pass by hand until it has come so far, or to its end.
fn polled<'a>(
    pass: impl Future<Output = ()> + 'a,
    io: &'a SimStorage,
    steps: u64,
) -> Option<std::pin::Pin<Box<dyn Future<Output = ()> + 'a>>> {
    let mut pass: std::pin::Pin<Box<dyn Future<Output = ()> + 'a>> = Box::pin(pass);
    for _ in 0..steps {
        if pass.as_mut().poll(&mut std::task::Context::from_waker(std::task::Waker::noop())).is_ready() {
            return None;
        }
        if io.in_flight() > 0 {
            io.complete_any();
        }
    }
    Some(pass)
}

fn bad_blocks(report: &ScrubReport) -> BTreeSet<u64> {
    assert_eq!(report.unlisted_runs, 0);
    report.bad_runs.iter().flat_map(|run| run.range.blocks()).map(|block| block.0).collect()
}

/// A volume of which a few blocks are written: some in the tree, one pending.
fn lab(cache: u64) -> Lab {
    let options = OpenOptions { cache_bytes: cache, ..open_options(&mut Rng::new(1)) };
    let mut lab = Lab::new(&format_options(4096), &options);
    lab.write(3, 20, 1);
    lab.write(130, 4, 2);
    lab.checkpoint();
    lab.write(200, 1, 3);
    lab
}

/// The page of a level that is current.
fn page_at(lab: &Lab, level: u8, index: u64) -> Page {
    *lab.superblock().pages(&lab.disk()).iter().find(|page| (page.level, page.index) == (level, index)).unwrap()
}

fn tag_page_1(lab: &Lab) -> Page {
    page_at(lab, 0, 1)
}

/// The pages that are found, all of which are mended or none.
fn pages(report: &ScrubReport, mended: bool) -> Vec<(u8, u64)> {
    assert!(report.bad_metadata.iter().all(|bad| (bad.remedy == Remedy::Mended) == mended), "{report:?}");
    assert_eq!(report.bad_pieces(), if mended { 0 } else { report.bad_metadata.len() as u64 });
    let name = |bad: &BadMetadata| match bad.part {
        MetadataPart::TreePage { name } => (name.level, name.index),
        other => panic!("{other:?}"),
    };
    report.bad_metadata.iter().map(name).collect()
}

/// All that was written can be read, and the medium is as it should be, though only after a checkpoint.
fn is_whole(lab: &mut Lab) {
    lab.checkpoint();
    assert!(pass(&lab.volume, &lab.io).bad_metadata.is_empty());
    assert!((3..23).all(|block| lab.reads_as(block, 1)) && (130..134).all(|block| lab.reads_as(block, 2)));
    assert!(lab.reads_as(200, 3) && lab.reads_as(50, 0));
}
