//! Metadata that has rotted is mended, wherever the power fails, and nothing is worse for it.

use super::*;

#[test]
fn pages_are_read_from_the_medium_and_mended_from_memory() {
    let mut lab = lab(1 << 20);
    assert!(lab.reads_as(130, 2));
    let tree_page = page_at(&lab, 1, 0);
    let tag_page = tag_page_1(&lab);
    let old = lab.peek(Device::Meta, tag_page.offset, 4096);
    for page in [tree_page, tag_page] {
        lab.poke(Device::Meta, page.offset, &[0xee; 4096]);
    }
    let report = pass(&lab.volume, &lab.io);
    assert_eq!(pages(&report, true), [(1, 0), (0, 1)]);
    assert!(report.is_clean() && report.verified_blocks == 25, "{report:?}");
    is_whole_after(&mut lab, &tag_page, &old);
}

#[test]
fn nothing_is_mended_before_it_is_written() {
    let lab = lab(0);
    lab.checkpoint();
    lab.poke(Device::Meta, 80, b"rot");
    lab.poke(Device::Meta, tag_page_1(&lab).offset, &[1; 512]);
    let control = ScrubControl::new(Scrub::default(), None);
    let Lab { io, volume, .. } = &lab;
    let stands = polled(volume.scrub(io, &control, |_| {}), io, 100).expect("it waits for a checkpoint");
    let report = control.report();
    assert_eq!((report.waiting_metadata, report.mended_metadata, report.cursor), (2, 0, volume.blocks()));
    assert!(!report.is_clean());
    // After a crash it is to look there again; none of this counts as bad for good.
    assert_eq!((control.in_superblock().cursor, control.in_superblock().bad_blocks), (128, 0));
    lab.checkpoint();
    block_on(io, stands);
    let report = control.report();
    assert!(report.is_clean() && report.mended_metadata == 2, "{report:?}");
    assert!(report.bad_metadata.iter().all(|bad| bad.remedy == Remedy::Mended));
    assert!(pass_alone(volume, io).bad_metadata.is_empty());
    // What can't be mended is not forgotten.
    let Lab { io, volume, .. } = &lab;
    lab.poke(Device::Meta, 80, b"rot");
    lab.disk().faults.meta_unwritable = true;
    let control = ScrubControl::new(Scrub::default(), None);
    let checkpoint = async {
        io.sleep(Duration::from_secs(100)).await.unwrap();
        volume.checkpoint(io).await.unwrap_err();
    };
    block_on(io, join(volume.scrub(io, &control, |_| {}), checkpoint));
    assert_eq!((control.report().unmended_metadata, control.in_superblock().bad_blocks), (1, 1));
}

#[test]
fn what_a_pass_has_to_mend_when_it_leaves_the_last_checkpoint_writes() {
    let format = FormatOptions { label: "old".parse().unwrap(), ..format_options(4096) };
    let mut lab = Lab::new(&format, &OpenOptions { cache_bytes: 0, ..open_options(&mut Rng::new(1)) });
    lab.write(130, 4, 2);
    lab.checkpoint();
    lab.poke(Device::Meta, tag_page_1(&lab).offset, &[1; 512]);
    let control = ScrubControl::new(Scrub { pass: 3, ..Scrub::default() }, None);
    let stands = polled(lab.volume.scrub(&lab.io, &control, |_| {}), &lab.io, 50).expect("it waits for a checkpoint");
    control.leave();
    block_on(&lab.io, stands);
    block_on(&lab.io, lab.volume.close(&lab.io)).unwrap();
    let mut lab = lab.reopened().unwrap();
    let said = Scrub { pass: 3, cursor: 128, state: ScrubState::Running, ..Scrub::default() };
    assert_eq!(lab.volume.last_scrub(), Some(said));
    assert!(lab.reads_as(130, 2) && pass(&lab.volume, &lab.io).bad_metadata.is_empty());
}

/// The page is as it was, in its other slot.
fn is_whole_after(lab: &mut Lab, before: &Page, old: &[u8]) {
    lab.checkpoint();
    let now = tag_page_1(lab);
    assert_ne!(now.slot, before.slot);
    let new = lab.peek(Device::Meta, now.offset, 4096);
    assert!((0..4096).all(|i| new[i] == old[i] || i / 32 == 72), "but for block 200");
    is_whole(lab);
}

#[test]
fn tag_pages_are_made_anew_from_the_blocks() {
    for (from, rot) in
        [(9, vec![1; 1]), (64, vec![7; 32 * 6]), (0, vec![0; 512]), (512, vec![3; 1024]), (0, vec![0xff; 4096])]
    {
        let mut lab = lab(0);
        // Of a page that is gone as a whole only what is in place can be told.
        if rot.len() == 4096 {
            lab.checkpoint();
        }
        let page = tag_page_1(&lab);
        let old = lab.peek(Device::Meta, page.offset, 4096);
        lab.poke(Device::Meta, page.offset + from, &rot);
        assert!(lab.read(130).is_err(), "{from}");
        // It is as if it had never been gone, wherever the power fails.
        let settled = lab.disk().writes;
        lab.disk().trace = Some(Vec::new());
        let report = pass(&lab.volume, &lab.io);
        assert_eq!(pages(&report, true), [(0, 1)], "{from}");
        assert!(report.is_clean() && report.verified_blocks == 25, "{report:?}");
        is_whole(&mut lab);
        let trace = lab.disk().trace.take().unwrap();
        let current = |event: &Trace| matches!(event, Trace::WriteStart { offset, .. } if *offset == page.offset);
        assert!(lab.disk().writes > settled && !trace.iter().any(|(_, event)| current(event)), "over what is current");
        let now = tag_page_1(&lab);
        let new = lab.peek(Device::Meta, now.offset, 4096);
        assert!((0..4096).all(|i| new[i] == old[i] || i / 32 == 72), "but for block 200");
    }
}

#[test]
fn a_stopped_pass_tells_what_became_of_what_it_has_found() {
    for (is_mended, leaves) in [(true, false), (false, false), (true, true)] {
        let lab = lab(0);
        lab.checkpoint();
        let page = tag_page_1(&lab);
        lab.poke(Device::Meta, page.offset, &[1; 512]);
        if !is_mended {
            let slot = lab.superblock().slot_offset(0, 1, page.slot ^ 1);
            lab.disk().bad_ranges.push(BadRange::unwritable(Device::Meta, slot..slot + 4096, Errno::EIO));
        }
        let control = ScrubControl::new(Scrub::default(), None);
        let stands = polled(lab.volume.scrub(&lab.io, &control, |_| {}), &lab.io, 200).expect("it waits");
        assert!(control.stop());
        if leaves {
            control.leave();
            block_on(&lab.io, stands);
            assert_eq!((control.state(), control.report().waiting_metadata), (ScrubState::Stopped, 1));
            continue;
        }
        lab.checkpoint();
        block_on(&lab.io, stands);
        let report = control.report();
        assert_eq!((report.state, report.waiting_metadata), (ScrubState::Stopped, 0));
        assert_eq!((report.mended_metadata, report.unmended_metadata), if is_mended { (1, 0) } else { (0, 1) });
    }
}

#[test]
fn a_page_that_waits_for_the_checkpoint_survives_any_crash() {
    for writes in 0.. {
        let lab = lab(0);
        lab.checkpoint();
        let page = tag_page_1(&lab);
        lab.poke(Device::Meta, page.offset, &[1; 512]);
        assert_eq!(pages(&pass_alone(&lab.volume, &lab.io), false), [(0, 1)]);
        let until = lab.disk().writes + writes;
        let ended = {
            let mut checkpoint = pin!(lab.volume.checkpoint(&lab.io));
            let mut ended = false;
            while !ended && lab.disk().writes < until {
                let mut context = std::task::Context::from_waker(std::task::Waker::noop());
                ended = checkpoint.as_mut().poll(&mut context).is_ready();
                if !ended && lab.io.in_flight() > 0 {
                    lab.io.complete_any();
                }
            }
            ended
        };
        lab.disk().power_cut();
        let mut lab = lab.reopened().unwrap();
        let report = pass(&lab.volume, &lab.io);
        assert!(report.is_clean(), "{writes}: {report:?}");
        is_whole(&mut lab);
        if ended {
            assert!(writes > 3, "nothing was written");
            return;
        }
    }
}

#[test]
fn what_nothing_proves_stays_bad_and_is_no_worse_for_it() {
    let mut lab = lab(0);
    let (page, at) = (tag_page_1(&lab), lab.block_offset(131));
    let (tags, block) = (lab.peek(Device::Meta, page.offset, 512), lab.peek(Device::Data, at, 4096));
    lab.poke(Device::Meta, page.offset, &[0xee; 512]);
    lab.poke(Device::Data, at, b"rot");
    let report = pass(&lab.volume, &lab.io);
    assert_eq!(pages(&report, false), [(0, 1)]);
    let name = PageName { level: 0, index: 1 };
    assert!(report.bad_runs.iter().all(|run| run.reason == BadReason::BadPage { page: name }));
    // What is pending needs no page.
    assert_eq!(bad_blocks(&report), (128..256).filter(|block| *block != 200).collect());
    assert_eq!((report.verified_blocks, report.is_clean()), (21, false));
    // Nothing was made of it: back on the medium it is good.
    lab.poke(Device::Meta, page.offset, &tags);
    lab.poke(Device::Data, at, &block);
    is_whole(&mut lab);
}

#[test]
fn superblock_copies_identity_block_and_log_are_mended() {
    let format = FormatOptions { separate_meta: true, ..format_options(4096) };
    let options = OpenOptions { separate_meta: true, ..open_options(&mut Rng::new(1)) };
    // Of the identity block what its checksum covers, and its MAC.
    for (copy, rots_at) in [(0, 20), (1 << 19, 500)] {
        let mut lab = Lab::new(&format, &options);
        lab.write(3, 1, 1);
        assert!(pass(&lab.volume, &lab.io).bad_metadata.is_empty());
        let identity = lab.peek(Device::Data, 0, 512);
        lab.poke(Device::Meta, copy + 80, b"rot");
        lab.poke(Device::Data, rots_at, b"rot");
        let log = lab.records()[0].offset;
        lab.disk().bad_ranges.push(BadRange::unreadable(Device::Meta, log..log + 512));
        let report = pass(&lab.volume, &lab.io);
        let parts: Vec<_> = report.bad_metadata.iter().map(|bad| bad.part).collect();
        assert_eq!(parts[..2], [MetadataPart::Superblock { offset: ByteOffset(copy) }, MetadataPart::Identity]);
        assert!(matches!(parts[2..], [MetadataPart::Log { .. }]), "{parts:?}");
        assert!(report.is_clean() && report.mended_metadata == 3, "{report:?}");
        assert_eq!(lab.peek(Device::Data, 0, 512), identity);
        // Also where nothing is written meanwhile.
        lab.checkpoint();
        assert!(pass(&lab.volume, &lab.io).bad_metadata.is_empty());
        lab.poke(Device::Meta, copy + 80, b"rot");
        assert_eq!(pass(&lab.volume, &lab.io).mended_metadata, 1);
        lab.checkpoint();
        assert!(pass(&lab.volume, &lab.io).bad_metadata.is_empty());
    }
}

#[test]
fn the_identity_block_is_not_written_over_for_a_read_that_fails_once() {
    let format = FormatOptions { separate_meta: true, ..format_options(4096) };
    let options = OpenOptions { separate_meta: true, ..open_options(&mut Rng::new(1)) };
    let mut failed = 0;
    for fails_until in 1..6 {
        let lab = Lab::new(&format, &options);
        lab.disk().bad_ranges.push(BadRange::unreadable(Device::Data, 0..4096));
        lab.disk().trace = Some(Vec::new());
        let control = ScrubControl::new(Scrub::default(), None);
        let stands = polled(lab.volume.scrub(&lab.io, &control, |_| {}), &lab.io, fails_until).expect("it goes on");
        lab.disk().bad_ranges.clear();
        block_on(&lab.io, stands);
        let trace = lab.disk().trace.take().unwrap();
        let identity = |event: &Trace| matches!(event, Trace::Read { device: Device::Data, offset: 0, .. });
        failed += trace.iter().filter(|(_, event)| identity(event)).count() - 1;
        assert!(!trace.iter().any(|(_, event)| matches!(event, Trace::WriteStart { .. })));
        assert!(control.report().is_clean(), "{:?}", control.report());
    }
    assert!(failed > 0, "none has failed");
}

#[test]
fn nothing_is_mended_where_nothing_may_be_written() {
    let lab = lab(1 << 20);
    lab.checkpoint();
    let (superblock, page) = (lab.peek(Device::Meta, 0, 512), tag_page_1(&lab));
    let io = lab.io.clone();
    let options = OpenOptions { access: Access::ReadOnly, ..lab.options.clone() };
    drop(lab);
    io.disk().poke(Device::Meta, 80, b"rot");
    io.disk().poke(Device::Meta, page.offset, b"rot");
    let (volume, writes) = (reopen(&io, &options).unwrap(), io.disk().writes);
    let report = pass(&volume, &io);
    assert_eq!((report.bad_pieces(), report.mended_metadata, io.disk().writes), (2, 0, writes));
    assert_ne!(io.disk().peek(Device::Meta, 0, 512), superblock);
    // It is known what the page is, so nothing is wrong with its blocks.
    assert_eq!((bad_blocks(&report), report.verified_blocks), ([].into(), 25));
}
