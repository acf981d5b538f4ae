//! A pass is paused, slowed, stopped, and goes on another time; it holds up nobody.

use super::*;

#[test]
fn a_rate_is_kept() {
    let format = FormatOptions { size: Some(8 << 20), ..format_options(4096) };
    let mut lab = Lab::new(&format, &open_options(&mut Rng::new(1)));
    for first in (0..2048).step_by(16) {
        lab.write(first, 16, 1);
    }
    for are_rotten in [false, true] {
        // What is read once more, alone, counts as well.
        if are_rotten {
            (0..2048).for_each(|block| lab.poke(Device::Data, lab.block_offset(block), b"rot"));
        }
        let control = ScrubControl::new(Scrub::default(), NonZeroU64::new(256 << 10));
        let begun = lab.disk().now();
        block_on(&lab.io, lab.volume.scrub(&lab.io, &control, |_| {}));
        assert_eq!(control.report().verified_blocks, if are_rotten { 0 } else { 2048 });
        let (took, least) = (lab.disk().now() - begun, if are_rotten { 56 } else { 24 });
        assert!(took >= Duration::from_secs(least), "{took:?}, the last 2 MiB at any time");
    }
}

#[test]
fn a_pass_that_goes_on_no_more_holds_up_nobody() {
    for (steps, paused) in (0..60).flat_map(|steps| [(steps, false), (steps, true)]) {
        let mut lab = lab(0);
        lab.poke(Device::Data, lab.block_offset(5), b"rot");
        let Lab { io, volume, context, .. } = &mut lab;
        let control = ScrubControl::new(Scrub::default(), None);
        let Some(stands) = polled(volume.scrub(io, &control, |_| {}), io, steps) else { break };
        assert!(!paused || control.pause());
        let buf = Buf::new(128 << 10);
        let all = async {
            let mut buf = buf;
            for first in (0..volume.blocks()).step_by(32) {
                let written;
                let range = BlockRange::new(BlockIndex(first), 32);
                (written, buf) = volume.write(io, context, range, buf, Durability::Durable).await;
                written.unwrap();
            }
            volume.zero(io, context, BlockRange::new(BlockIndex(0), volume.blocks()), true).await.unwrap();
        };
        block_on(io, with_checkpoints(volume, io, all));
        block_on(io, volume.checkpoint(io)).unwrap();
        assert!(!paused || control.resume());
        block_on(io, stands);
        let report = control.report();
        assert_eq!(report.state, ScrubState::Ended);
        assert!(bad_blocks(&report).is_subset(&[5].into()) && report.unsettled_blocks == 0, "{report:?}");
    }
}

#[test]
fn a_stopped_pass_ends_wherever_it_is() {
    for (steps, paused) in (0..40).flat_map(|steps| [(steps, false), (steps, true)]) {
        let lab = lab(0);
        let control = ScrubControl::new(Scrub::default(), NonZeroU64::new(1));
        let Some(stands) = polled(lab.volume.scrub(&lab.io, &control, |_| {}), &lab.io, steps) else { break };
        assert!(!paused || control.pause());
        assert!(control.stop());
        block_on(&lab.io, stands);
        assert_eq!(control.state(), ScrubState::Stopped);
    }
}

#[test]
fn a_disk_that_is_slow_to_fail_keeps_no_pass_from_ending() {
    let turns: [fn(&ScrubControl); 3] = [|c| assert!(c.stop()), |c| c.leave(), |c| assert!(c.pause())];
    for (nth, turn) in turns.iter().enumerate() {
        let lab = lab(0);
        let all = lab.block_offset(0)..lab.block_offset(256);
        lab.disk().bad_ranges.push(BadRange::unreadable(Device::Data, all));
        let control = ScrubControl::new(Scrub::default(), None);
        let mut pass = pin!(lab.volume.scrub(&lab.io, &control, |_| {}));
        let mut poll = || pass.as_mut().poll(&mut std::task::Context::from_waker(std::task::Waker::noop()));
        while control.report().unreadable_blocks == 0 {
            assert!(poll().is_pending());
            lab.io.complete_any();
        }
        turn(&control);
        lab.disk().trace = Some(Vec::new());
        let mut ended = false;
        for _ in 0..50 {
            ended = ended || poll().is_ready();
            if lab.io.in_flight() > 0 {
                lab.io.complete_any();
            }
        }
        let reads = lab.disk().trace.take().unwrap().len();
        assert!(reads <= 1 && ended == (nth < 2), "{nth}: {reads} reads more");
        // What it has not looked at is still to come.
        let saved = control.in_superblock();
        let state = [ScrubState::Stopped, ScrubState::Running, ScrubState::Paused][nth];
        assert_eq!((saved.state, saved.cursor), (state, 0));
    }
}

#[test]
fn a_pass_that_is_paused_before_it_begins_does_nothing() {
    let format = FormatOptions { separate_meta: true, ..format_options(4096) };
    let options = OpenOptions { separate_meta: true, ..open_options(&mut Rng::new(1)) };
    let mut lab = Lab::new(&format, &options);
    lab.poke(Device::Data, 20, b"rot");
    let control = ScrubControl::new(Scrub { state: ScrubState::Paused, ..Scrub::default() }, None);
    let trace = lab.traced(|lab| assert!(polled(lab.volume.scrub(&lab.io, &control, |_| {}), &lab.io, 20).is_some()));
    assert!(trace.is_empty(), "{trace:?}");
}

#[test]
fn a_pass_that_goes_on_comes_back_to_what_was_being_written() {
    let mut options = open_options(&mut Rng::new(1));
    (options.sync_log, options.write_back_slots) = (true, 4);
    let format = FormatOptions { log_size: Some(512 << 10), ..format_options(4096) };
    let mut lab = Lab::new(&format, &options);
    lab.write(3, 20, 1);
    lab.write(130, 4, 2);
    lab.checkpoint();
    lab.poke(Device::Data, lab.block_offset(5), b"rot");
    let control = ScrubControl::new(Scrub::default(), None);
    let saved = {
        let Lab { io, volume, context, .. } = &mut lab;
        // Somebody is about to write it, all the while.
        let one = BlockRange::new(BlockIndex(5), 1);
        let _admitted = volume.admit(context, one, Durability::MayBeLost).expect("there are slots");
        let mut pass = pin!(volume.scrub(io, &control, |_| {}));
        let mut poll = || pass.as_mut().poll(&mut std::task::Context::from_waker(std::task::Waker::noop()));
        while control.report().cursor < volume.blocks() {
            assert!(poll().is_pending());
            io.complete_any();
        }
        control.in_superblock()
    };
    assert_eq!((saved.state, saved.cursor), (ScrubState::Running, 5));
    let lab = lab.reopened().unwrap();
    let control = ScrubControl::new(saved, None);
    block_on(&lab.io, lab.volume.scrub(&lab.io, &control, |_| {}));
    assert_eq!((bad_blocks(&control.report()), control.report().held_at), ([5].into(), None));
    assert_eq!(control.in_superblock().cursor, lab.volume.blocks());
}

#[test]
fn a_pass_goes_on_where_the_superblock_says() {
    let format = FormatOptions { label: "old".parse().unwrap(), ..format_options(4096) };
    let mut lab = Lab::new(&format, &open_options(&mut Rng::new(1)));
    (3..203).step_by(20).for_each(|first| lab.write(first, 20, 1));
    for block in [5, 140] {
        lab.poke(Device::Data, lab.block_offset(block), b"rot");
    }
    // One that has come half the way, and is paused there.
    let begun = Scrub { pass: 7, begun_seconds: 1000, cursor: 128, bad_blocks: 1, ..Scrub::default() };
    let control = ScrubControl::new(begun, None);
    assert!(control.pause());
    let Lab { io, volume, .. } = &mut lab;
    let stands = polled(volume.scrub(io, &control, |_| {}), io, 100).expect("it is paused");
    assert_eq!(volume.last_scrub(), Some(Scrub::default()));
    // An epoch that changes nothing but that is checkpointed, too; and only once.
    let epoch = |lab: &Lab| lab.superblock().epoch;
    drop(stands);
    lab.checkpoint();
    lab.checkpoint();
    let before = epoch(&lab);
    lab.checkpoint();
    assert_eq!(epoch(&lab), before);
    let paused = Scrub { state: ScrubState::Paused, ..begun };
    assert_eq!(lab.volume.last_scrub(), Some(paused));
    let lab = lab.reopened().unwrap();
    assert_eq!(lab.volume.last_scrub(), Some(paused));
    let control = ScrubControl::new(paused, None);
    assert_eq!(control.state(), ScrubState::Paused);
    assert!(control.resume());
    block_on(&lab.io, lab.volume.scrub(&lab.io, &control, |_| {}));
    let report = control.report();
    assert_eq!((bad_blocks(&report), report.bad_blocks, report.resumed_at), ([140].into(), 2, 128));
    control.ended_at(2000);
    lab.volume.note_scrub(control.in_superblock());
    // An orderly end says it, too.
    block_on(&lab.io, lab.volume.close(&lab.io)).unwrap();
    let lab = lab.reopened().unwrap();
    let ended = Scrub { state: ScrubState::Ended, cursor: 256, bad_blocks: 2, ended_seconds: 2000, ..begun };
    assert_eq!(lab.volume.last_scrub(), Some(ended));
    assert_eq!(lab.volume.recovery().records, 0);
}

#[test]
fn a_volume_of_version_1_stays_one() {
    let lab = lab(0);
    assert!(pass(&lab.volume, &lab.io).is_clean());
    lab.checkpoint();
    assert_eq!(lab.volume.last_scrub(), None);
    // With a sync log it is of version 2 while it is open: it says how far the pass was, but not for good.
    let format = FormatOptions { log_size: Some(512 << 10), ..format_options(4096) };
    let lab = Lab::new(&format, &OpenOptions { sync_log: true, ..open_options(&mut Rng::new(1)) });
    let version = |lab: &Lab| lab.peek(Device::Meta, 8, 1)[0];
    assert!(pass(&lab.volume, &lab.io).is_clean() && version(&lab) == 2);
    lab.checkpoint();
    assert_eq!(lab.volume.last_scrub().map(|scrub| scrub.state), Some(ScrubState::Ended));
    block_on(&lab.io, lab.volume.close(&lab.io)).unwrap();
    assert_eq!(version(&lab), 1);
}
