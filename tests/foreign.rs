//! What a newer program, or another one, has written with the volume's own key: it is named,
//! nothing of it is taken for damage, and nothing is written.

use crate::sim::{
    Lab, Rng, SimStorage, block_on, format_options,
    image::{self, SUPERBLOCK_BYTES, SUPERBLOCKS},
    open_options, reopen,
};
use ublk_integrity::{
    Device, OpenOptions,
    create::{Capacity, FormatOptions},
    open::{self, OpenError, Unknown},
};

const VERSION: usize = 8;
const FLAGS: usize = 12;
const TAG_ALGORITHM: usize = 36;
const DATA_OFFSET: usize = 232;
const SCRUB: usize = 296;
const LABEL: usize = 352;

fn options() -> OpenOptions {
    open_options(&mut Rng::new(4))
}

/// A change of a superblock or identity block.
struct Edit {
    at: usize,
    bytes: Vec<u8>,
}

fn edit(at: usize, bytes: &[u8]) -> Edit {
    Edit { at, bytes: bytes.to_vec() }
}
fn version(version: u32) -> Edit {
    edit(VERSION, &version.to_le_bytes())
}
fn flags(flags: u32) -> Edit {
    edit(FLAGS, &flags.to_le_bytes())
}

fn poke_signed(lab: &mut Lab, device: Device, at: u64, edits: &[Edit]) {
    let mut block = lab.peek(device, at, SUPERBLOCK_BYTES);
    edits.iter().for_each(|e| block[e.at..e.at + e.bytes.len()].copy_from_slice(&e.bytes));
    image::sign_block(&mut block);
    lab.poke(device, at, &block);
}

/// Opens what is there; nothing may be written on the way to a refusal.
fn refused(lab: &Lab, options: &OpenOptions) -> OpenError {
    let fork = SimStorage::new(lab.disk().fork(1));
    let writes = fork.disk().writes;
    let Err(error) = reopen(&fork, options) else { panic!("opened") };
    assert_eq!(fork.disk().writes, writes, "{error}: nothing is written");
    for device in [Device::Meta, Device::Data] {
        let of = |io: &SimStorage| io.disk().peek(device, 0, 2 << 20);
        assert!(of(&fork) == of(&lab.io), "{error}: nothing has changed");
    }
    error
}

/// With these changes in one copy or both, the volume is foreign for this reason, and `dump` says so.
fn is_foreign(edits: &[Edit], reason: Unknown) {
    let [a, b] = SUPERBLOCKS;
    for copies in [&[a][..], &[b], &[a, b]] {
        // Both copies are alike, and of two that are not either may be the newer one.
        for newer in [false, true] {
            let mut lab = Lab::new(&format_options(512), &options());
            lab.write(3, 1, 1);
            for at in copies {
                let epoch = image::Superblock::newest(&lab.disk()).epoch + u64::from(newer);
                poke_signed(&mut lab, Device::Meta, *at, &[edit(64, &epoch.to_le_bytes())]);
                poke_signed(&mut lab, Device::Meta, *at, edits);
            }
            let error = refused(&lab, &options());
            assert!(matches!(error, OpenError::Unknown(u) if u == reason), "{reason}: {error}");
            let dump = block_on(&lab.io, open::dump(&lab.io)).unwrap();
            assert_eq!(dump.unknown, Some(reason.to_string()));
            assert_eq!(dump.volume.is_some(), copies.len() == 1, "{reason}");
            for copy in dump.copies {
                let foreign = copies.contains(&copy.offset);
                assert_eq!(copy.state, if foreign { "unknown" } else { "checksum valid" }, "{reason}");
                assert_eq!(copy.unknown.is_some(), foreign, "{reason}");
            }
        }
    }
}

#[test]
fn unknown_versions_and_tag_algorithms() {
    for number in [0, 3, 4, u32::MAX] {
        is_foreign(&[version(number)], Unknown::Version(number));
        assert_eq!(Unknown::Version(3).to_string(), "format version 3 is not known to this program");
    }
    for code in [0, 4, 7, u16::MAX] {
        for number in [1, 2] {
            is_foreign(&[version(number), edit(TAG_ALGORITHM, &code.to_le_bytes())], Unknown::TagAlgorithm(code));
        }
        assert_eq!(Unknown::TagAlgorithm(7).to_string(), "tag algorithm 7 is not known to this program");
    }
}

#[test]
fn unknown_features() {
    for bit in 1..32 {
        is_foreign(&[flags(1 << bit)], Unknown::Feature(bit));
    }
    for bit in 9..32 {
        is_foreign(&[version(2), flags(1 << bit | 0x80)], Unknown::Feature(bit));
    }
    assert_eq!(Unknown::Feature(9).to_string(), "format feature 9 is not known to this program");
}

#[test]
fn reserved_bytes_in_use_and_fields_that_no_version_allows() {
    let reserved = |at| Unknown::Reserved { of: "superblock", at };
    for at in (60..64).chain((232..448).step_by(5)).chain([447]) {
        is_foreign(&[edit(at, &[1])], reserved(at));
    }
    for at in [60, 63, 384, 447] {
        is_foreign(&[version(2), edit(at, &[0x80])], reserved(at));
    }
    let field = |field| Unknown::Field { of: "superblock", field };
    for number in [1, 2] {
        is_foreign(&[version(number), edit(32, &3000_u32.to_le_bytes())], field("block size"));
        is_foreign(&[version(number), edit(38, &[16])], field("tag size"));
        is_foreign(&[version(number), edit(40, &[0xff; 8])], field("number of blocks"));
        is_foreign(&[version(number), edit(48, &[1])], field("log size"));
        is_foreign(&[version(number), edit(56, &[1])], field("record padding"));
        is_foreign(&[version(number), edit(72 + 40, &[9])], field("root"));
    }
    is_foreign(&[edit(136, &[8])], field("log position"));
    is_foreign(&[edit(144, &[0xff; 8])], field("epoch, log position or record number"));
    // The second page area is version 2's.
    is_foreign(&[edit(72 + 40, &[3])], field("root"));
    let second = |edits: &[Edit], name| {
        let all: Vec<_> = [version(2)].into_iter().chain(edits.iter().map(|e| edit(e.at, &e.bytes))).collect();
        is_foreign(&all, field(name));
    };
    second(&[edit(DATA_OFFSET, &[0, 0x40])], "place of a region, where places are computed,");
    second(&[flags(1 << 3)], "page area");
    let place = |at, value: u64| edit(at, &value.to_le_bytes());
    // The log, and pages for 2048 blocks, as they are computed, but the blocks where the log is.
    let places = |data| [flags(1 << 3), place(232, data), place(240, 1 << 20), place(256, 0x110000), place(264, 2048)];
    second(&places(1 << 20), "layout of regions");
    second(&places((2 << 20) + 512), "data offset");
    second(&[flags(1 << 4)], "head offset");
    second(&[flags(1 << 8)], "header copy");
    second(&[flags(3 << 5)], "pair of features adopting and releasing");
    second(&[edit(288, &[1])], "count of adopted blocks");
    second(&[edit(SCRUB + 40, &[5])], "scrub state");
    second(&[edit(340, &[3])], "assumed atomic size");
    second(&[edit(LABEL, b"a\x1b[2J")], "label");
    second(&[edit(LABEL, b"a\0b")], "label");
    second(&[edit(LABEL, &[0xff])], "label");
}

#[test]
fn a_feature_that_is_not_served_is_shown_and_named() {
    // With those that are served beside it.
    for (bits, shown, unserved) in [
        (1 << 6 | 1 << 7, "releasing, sync log", "releasing"),
        (1 << 1 | 1 << 5, "anchored, adopting", "adopting"),
        (1 << 2 | 1 << 6, "key area, releasing", "releasing"),
    ] {
        let mut lab = Lab::new(&format_options(512), &options());
        lab.write(3, 1, 1);
        let edits = [version(2), flags(bits), edit(LABEL, "größer".as_bytes()), edit(340, &[0, 0x10])];
        SUPERBLOCKS.iter().for_each(|at| poke_signed(&mut lab, Device::Meta, *at, &edits));
        let error = refused(&lab, &options());
        assert!(matches!(&error, OpenError::NotServed { features } if features == unserved), "{error}");
        let dump = block_on(&lab.io, open::dump(&lab.io)).unwrap();
        let fields = dump.version2.unwrap();
        assert_eq!((fields.label.to_string().as_str(), fields.assumed_atomic_bytes), ("größer", Some(4096)));
        assert_eq!(dump.volume.unwrap().size, 1 << 20);
        let features: Vec<_> = dump.copies[0].features.iter().map(ToString::to_string).collect();
        assert_eq!(features.join(", "), shown);
        assert_eq!((dump.copies[1].version, dump.unknown), (Some(2), None));
    }
}

#[test]
fn a_second_page_area_is_not_served() {
    let mut lab = Lab::new(&FormatOptions { capacity: Capacity::Bytes(2 << 20), ..format_options(512) }, &options());
    let area = |at: u64| edit(272, &[at.to_le_bytes(), 4096_u64.to_le_bytes()].concat());
    let behind = lab.block_offset(0) + (1 << 20);
    SUPERBLOCKS.iter().for_each(|at| poke_signed(&mut lab, Device::Meta, *at, &[area(behind)]));
    let error = refused(&lab, &options());
    assert!(matches!(&error, OpenError::NotServed { features } if features == "a second page area"), "{error}");
}

#[test]
fn a_log_entry_of_an_unknown_kind_is_not_the_end_of_its_record() {
    let mut lab = Lab::new(&format_options(512), &options());
    lab.write(3, 1, 1);
    let record = &lab.records()[0];
    let good = lab.peek(Device::Meta, record.offset, 512);
    let with = |lab: &mut Lab, at: usize, value: u32| {
        let mut bytes = good.clone();
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        image::sign_record(&lab.superblock(), &mut bytes);
        lab.with_poked(Device::Meta, record.offset, &bytes, |lab| refused(lab, &options()))
    };
    for kind in [0, 4, 5, 6, u32::MAX] {
        let error = with(&mut lab, 72, kind);
        assert!(matches!(error, OpenError::Unknown(Unknown::EntryKind(k)) if k == kind), "{error}");
    }
    // More tags than the record has bytes for; and more entries than it holds.
    for (at, value) in [(76, 2), (36, 2)] {
        let error = with(&mut lab, at, value);
        assert!(matches!(error, OpenError::Unknown(Unknown::Field { of: "log record", .. })), "{error}");
    }
    // The block behind the last, and one so far behind that no place can be computed.
    for (at, value) in [(80, 2048), (84, 1 << 23)] {
        let error = with(&mut lab, at, value);
        let reason = Unknown::Field { of: "log record", field: "range of blocks" };
        assert!(matches!(error, OpenError::Unknown(u) if u == reason), "{error}");
    }
}

#[test]
fn an_identity_block_of_another_version() {
    let format = FormatOptions { separate_meta: true, ..format_options(512) };
    let opening = OpenOptions { separate_meta: true, ..options() };
    let reserved = Unknown::Reserved { of: "identity block", at: 447 };
    let role = Unknown::Field { of: "identity block", field: "role" };
    let cases = [(VERSION, 2, Unknown::IdentityVersion(2)), (FLAGS, 2, role), (447, 1, reserved)];
    for (at, value, reason) in cases {
        let mut lab = Lab::new(&format, &opening);
        poke_signed(&mut lab, Device::Data, 0, &[edit(at, &[value])]);
        let error = refused(&lab, &opening);
        assert!(matches!(error, OpenError::Unknown(u) if u == reason), "{error}");
        // Without its metadata beside it.
        SUPERBLOCKS.iter().for_each(|at| lab.poke(Device::Meta, *at, &[0; 4096]));
        let error = refused(&lab, &opening);
        assert!(matches!(error, OpenError::Unknown(u) if u == reason), "{error}");
        let dump = block_on(&lab.io, open::dump(&lab.io)).unwrap();
        assert_eq!((dump.unknown, dump.identity), (Some(reason.to_string()), None));
    }
}

/// Version 1 is what is written, whatever is known.
#[test]
fn format_writes_version_1() {
    let lab = Lab::new(&format_options(512), &options());
    for at in SUPERBLOCKS {
        let block = lab.peek(Device::Meta, at, SUPERBLOCK_BYTES);
        assert_eq!(block[VERSION..FLAGS], 1_u32.to_le_bytes());
        assert!(block[232..448].iter().all(|byte| *byte == 0));
    }
}
