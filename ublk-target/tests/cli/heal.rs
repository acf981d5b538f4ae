//! `check --repair-from`: blocks that have rotted are healed from copies.

use crate::{copies::content, harness::*};
use std::{fs, os::unix::fs::FileExt};

const CHECK: &str = "check --data disk --key-file key";

/// A volume with content, its image and a copy of its device, and two blocks of it that have rotted.
fn rotten() -> (Folder, u64) {
    let f = Folder::with_volume();
    fs::write(f.path("in"), content(8 << 20)).unwrap();
    f.run("import --data disk --key-file key in").expect(DONE);
    f.run("export --data disk --key-file key image").expect(DONE);
    fs::copy(f.path("disk"), f.path("raw")).unwrap();
    let payload = f.payload_offset("disk", 8 << 20);
    for block in [3, 100] {
        f.flip_bit("disk", payload + block * 4096 + 7);
    }
    f.run(CHECK).expect(INTEGRITY).prints("2 bad");
    (f, payload)
}

#[test]
fn blocks_are_healed_from_an_image_or_a_copy_of_the_device() {
    for replica in ["image", "raw"] {
        let (f, _) = rotten();
        let healed = f.run(&format!("{CHECK} --repair-from {replica}")).expect(DONE);
        healed.prints("healed: blocks 3 from").prints("healed: blocks 100 from").prints(" 0 bad");
        f.run(CHECK).expect(DONE);
        f.run("export --data disk --key-file key out").expect(DONE);
        assert!(fs::read(f.path("out")).unwrap() == content(8 << 20));
    }
}

#[test]
fn what_no_copy_has_stays_bad_and_is_named() {
    let (f, _) = rotten();
    // The image has rotted, too, in one of them.
    f.flip_bit("image", 100 * 4096 + 9);
    let left = f.run(&format!("{CHECK} --repair-from image --json")).expect(INTEGRITY).json();
    assert_eq!((left["healing"]["healed"].as_u64(), left["bad_blocks"].as_u64()), (Some(1), Some(1)));
    assert_eq!(left["bad_runs"][0]["range"]["first"], 100);
    let said = f.run(&format!("{CHECK} --repair-from image")).expect(INTEGRITY).says("1 of 2048 blocks are bad");
    said.prints("not healed: no copy of blocks 100 holds what was written last");
    // Another has it.
    f.run(&format!("{CHECK} --repair-from image --repair-from raw")).expect(DONE);
}

#[test]
fn an_older_copy_heals_nothing_that_was_written_since() {
    let (f, payload) = rotten();
    let mut newer = content(8 << 20);
    newer[3 * 4096..4 * 4096].fill(0x55);
    fs::write(f.path("newer"), &newer).unwrap();
    f.run("import --data disk --key-file key --force newer").expect(DONE);
    f.flip_bit("disk", payload + 3 * 4096);
    let disk = || fs::read(f.path("disk")).unwrap()[payload as usize..][..8 << 20].to_vec();
    let before = disk();
    f.run(&format!("{CHECK} --repair-from image")).expect(INTEGRITY).prints("not healed: no copy of blocks 3 ");
    assert!(disk() == before, "nothing is written that the tag does not prove");
}

#[test]
fn replicas_that_can_not_be_used_are_refused_before_anything_is_done() {
    let (f, _) = rotten();
    let before = fs::read(f.path("disk")).unwrap();
    f.run(&format!("{CHECK} --repair-from nowhere")).expect(DEVICE).says("nowhere");
    f.run(&format!("{CHECK} --repair-from disk")).expect(ARGUMENTS).says("is the volume itself");
    f.run(&format!("{CHECK} --repair-from .")).expect(ARGUMENTS).says("neither a file nor a block device");
    for verb in ["--status", "--pause", "--stop", "--resume"] {
        f.run(&format!("scrub -n 1048575 {verb} --repair-from image")).expect(ARGUMENTS);
    }
    f.run("scrub -n 1048575 --heal-only").expect(ARGUMENTS);
    assert!(fs::read(f.path("disk")).unwrap() == before);
    // Too short for one of the blocks: that is none that it has.
    let image = fs::OpenOptions::new().write(true).open(f.path("image")).unwrap();
    image.set_len(50 * 4096).unwrap();
    image.write_all_at(&[0], 0).unwrap();
    f.run(&format!("{CHECK} --repair-from image")).expect(INTEGRITY).prints("healed: blocks 3 from");
}
