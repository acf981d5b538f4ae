//! The same of log records.

use super::*;

#[test]
fn every_bit_of_a_log_record_and_every_swap_of_two() {
    let (mut lab, _) = aged(&deep(), &PLACES);
    let (block, newer) = (PLACES[0], PLACES[1]);
    lab.write(block, 1, 4);
    lab.flush();
    lab.write(newer, 1, 5);
    let records = lab.records();
    let first = &records[0];
    let good = lab.peek(Device::Meta, first.offset, 512);
    // Header, one entry with a tag, MAC: the rest of the sector is padding and says nothing.
    for bit in 0..(72 + 24 + 32 + 32) * 8 {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        let opened = lab.with_poked(Device::Meta, first.offset, &bad, |lab| open_and_read(lab));
        assert!(matches!(opened, Err(OpenError::Tampered { .. })), "bit {bit}: {opened:?}");
    }
    for (i, a) in records.iter().enumerate() {
        for b in records.iter().skip(i + 1) {
            let (x, y) = (lab.peek(Device::Meta, a.offset, 512), lab.peek(Device::Meta, b.offset, 512));
            // A record counts at its own place only. With the last two exchanged the log has lost its
            // end, which it can't tell; but what they said is missing where it is read.
            let is_end = i + 2 == records.len();
            lab.with_poked(Device::Meta, a.offset, &y, |lab| {
                lab.with_poked(Device::Meta, b.offset, &x, |lab| match is_end {
                    true => assert!(detected(
                        &mut Lab::open(SimStorage::new(lab.disk().fork(7)), &options()).unwrap(),
                        newer
                    )),
                    false => assert!(open_and_read(lab).is_err()),
                });
                assert!(open_and_read(lab).is_err(), "record {} twice", b.number);
            });
        }
    }
}

#[test]
fn every_old_log_record() {
    let (mut lab, _) = aged(&deep(), &PLACES);
    // Around the ring and a little further; a record of one tag takes a sector.
    let sectors = lab.superblock().log_size / 512;
    (0..sectors).for_each(|i| lab.write(PLACES[0], 1, i));
    let ring = lab.peek(Device::Meta, image::LOG_OFFSET, sectors as usize * 512);
    lab.checkpoint();
    (0..10).for_each(|_| lab.write(PLACES[0], 1, 3));
    let records = lab.records();
    let (last, middle) = records.split_last().unwrap();
    assert_eq!(middle.len(), 9);
    let old = |r: &image::Record| &ring[(r.offset - image::LOG_OFFSET) as usize..][..512];
    for r in middle {
        assert_eq!(old(r)[..8], *b"UBLKILOG", "an old record lay there");
        lab.with_poked(Device::Meta, r.offset, old(r), |lab| assert!(open_and_read(lab).is_err()));
    }
    // A log cut short is like a crash before its last record: the block's content is
    // still one that it had.
    lab.with_poked(Device::Meta, last.offset, old(last), |lab| open_and_read(lab).unwrap());
}

#[test]
fn a_log_record_of_another_life() {
    // Two daemons open copies of one disk and log a record each, with the same number in the same
    // place.
    let lab = Lab::new(&format_options(512), &options());
    let twin = SimStorage::new(lab.disk().fork(1));
    let mut twin = Lab::open(twin, &OpenOptions { open_id: [5; 32], ..options() }).unwrap();
    let mut lab = lab.reopened().unwrap();
    lab.write(7, 1, 1);
    twin.write(8, 1, 2);
    let (record, other) = (&lab.records()[0], &twin.records()[0]);
    assert_eq!((record.number, record.offset, record.epoch), (other.number, other.offset, other.epoch));
    let foreign = twin.peek(Device::Meta, other.offset, 512);
    lab.poke(Device::Meta, record.offset, &foreign);
    lab.poke(Device::Data, lab.block_offset(8), &twin.peek(Device::Data, twin.block_offset(8), 512));
    if let Ok(mut lab) = lab.reopened() {
        assert!(lab.reads_as(8, 0), "block 8 was never written in this life");
    }
}
