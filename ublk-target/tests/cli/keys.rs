//! Key slots: who opens a volume, and what is said to those who can't.

use crate::harness::*;
use serde_json::Value;
use std::fs;

/// A volume of 8 MiB in "disk" whose slot 0 is opened by "key", and slot 1 by the passphrase in
/// "word".
fn with_slots() -> Folder {
    let f = Folder::new();
    fs::write(f.path("word"), "a passphrase\n").unwrap();
    f.run("format --data disk --create --size 8M --key-file key --key-slots").expect(DONE);
    f.run("key add --data disk --key-file key --new-passphrase-file word --label rescue").expect(DONE).prints("slot 1");
    f
}

fn slots(f: &Folder) -> Value {
    f.run("key list --data disk --json").expect(DONE).json()["slots"].clone()
}

#[test]
fn a_volume_is_opened_by_each_of_its_slots_and_by_nothing_else() {
    let f = with_slots();
    f.run("check --data disk --key-file key").expect(DONE);
    f.run("check --data disk --passphrase-file word").expect(DONE);
    f.run_with_input("check --data disk --passphrase-file -", b"a passphrase").expect(DONE);
    f.run_with_input("check --data disk --passphrase-file -", b"another").expect(KEY).says("no key slot of volume");
    f.run("keygen other").expect(DONE);
    f.run("check --data disk --key-file other").expect(KEY).says("no key slot of volume").says("disk");
    f.run("dump --data disk").expect(DONE).prints("key area");
    // What opens a slot does not open the volume itself.
    let raw = f.run("dump --data disk --json").expect(DONE).json();
    assert_eq!(raw["copies"][0]["features"], serde_json::json!(["key_area"]));
    let list = slots(&f);
    assert_eq!((&list[0]["kind"], &list[0]["slot"]), (&"key_file".into(), &0.into()));
    assert_eq!((&list[1]["kind"], &list[1]["label"]), (&"passphrase".into(), &"rescue".into()));
    assert!(list[1]["memory_kib"].as_u64().unwrap() >= 64 << 10, "a guess costs something");
    f.run("key list --data disk")
        .expect(DONE)
        .prints("slot 1        passphrase (argon2id, 256 MiB")
        .prints("\"rescue\"");
}

#[test]
fn a_guess_costs_what_was_asked_for() {
    let f = with_slots();
    f.run("keygen more").expect(DONE);
    let cheap = "--pbkdf-memory 8M --pbkdf-force-iterations 2";
    f.run(&format!("key change --data disk --passphrase-file word --new-passphrase-file word {cheap}")).expect(DONE);
    f.run("key list --data disk").expect(DONE).prints("passphrase (argon2id, 8 MiB, 2 passes");
    f.run("check --data disk --passphrase-file word").expect(DONE);
    for bad in ["--pbkdf-memory 4M", "--pbkdf-memory 2G", "--pbkdf-force-iterations 0", "--pbkdf-force-iterations 17"] {
        let option = bad.split(' ').next().unwrap();
        f.run(&format!("key add --data disk --key-file key --new-key-file more {bad}")).expect(ARGUMENTS).says(option);
    }
    f.run(&format!("format --data other --create --size 8M --passphrase-file word {cheap}")).expect(DONE);
    f.run("key list --data other").expect(DONE).prints("8 MiB, 2 passes");
}

#[test]
fn a_slot_is_changed_and_removed() {
    let f = with_slots();
    fs::write(f.path("new-word"), "something else").unwrap();
    f.run("key change --data disk --passphrase-file word --new-passphrase-file new-word").expect(DONE).prints("slot 1");
    f.run("check --data disk --passphrase-file word").expect(KEY);
    f.run("check --data disk --passphrase-file new-word").expect(DONE);
    f.run("key remove --data disk --key-file key --slot 0").expect(ARGUMENTS).says("slot 0").says("another slot");
    f.run("key remove --data disk --key-file key --slot 4").expect(ARGUMENTS).says("key slot 4");
    f.run("key remove --data disk --passphrase-file new-word --slot 0").expect(DONE);
    f.run("check --data disk --key-file key").expect(KEY);
    f.run("check --data disk --passphrase-file new-word").expect(DONE);
    assert_eq!(slots(&f).as_array().unwrap().len(), 1);
}

#[test]
fn slots_of_an_anchored_volume_are_changed_with_its_anchor_and_old_ones_open_nothing() {
    let f = Folder::new();
    fs::write(f.path("word"), "a passphrase\n").unwrap();
    let anchor = format!("--anchor file:{} --anchor-same-disk", f.path("anchor").display());
    let run = |args: &str| f.run(&args.replace("DISK", &format!("--data disk {anchor}")));
    run("format DISK --create --size 8M --key-file key --key-slots").expect(DONE);
    let cheap = "--pbkdf-memory 8M --pbkdf-force-iterations 1";
    run(&format!("key add DISK --key-file key --new-passphrase-file word {cheap}")).expect(DONE).prints("slot 1");
    run("anchor show DISK --key-file key").expect(DONE).prints("key area      of generation 2");
    let before = fs::read(f.path("disk")).unwrap();
    let without = f.run("key remove --data disk --passphrase-file word --slot 0").expect(ARGUMENTS);
    without.says("disk").says("has an anchor").says("--anchor");
    assert!(fs::read(f.path("disk")).unwrap() == before, "nothing was written");
    run("key remove DISK --passphrase-file word --slot 0").expect(DONE).prints("slot 0        empty");
    run("check DISK --key-file key").expect(KEY);
    run("check DISK --passphrase-file word").expect(DONE);
    // The old key area on the newest disk.
    let newest = fs::read(f.path("disk")).unwrap();
    let mut mixed = newest.clone();
    for copy in [64 << 10..96 << 10, 576 << 10..608 << 10] {
        mixed[copy.clone()].copy_from_slice(&before[copy]);
    }
    fs::write(f.path("disk"), &mixed).unwrap();
    for opener in ["--key-file key", "--passphrase-file word"] {
        let refused = run(&format!("check DISK {opener}")).expect(INTEGRITY);
        refused.says("disk").says("generation 2").says("generation 3").says("anchor reset");
        run(&format!("export DISK {opener} out")).expect(INTEGRITY);
    }
    f.run("keygen more").expect(DONE);
    run("key add DISK --key-file key --new-key-file more").expect(INTEGRITY).says("no slot was changed");
    assert!(fs::read(f.path("disk")).unwrap() == mixed, "nothing was written");
    fs::write(f.path("disk"), &newest).unwrap();
    run("check DISK --passphrase-file word").expect(DONE);
    // It is away: nothing is changed. Then it is taken for what lies there.
    fs::rename(f.path("anchor"), f.path("away")).unwrap();
    run("key add DISK --anchor-wait 0 --passphrase-file word --new-key-file more").expect(DEVICE).says("No such file");
    assert!(fs::read(f.path("disk")).unwrap() == newest, "nothing was written");
    fs::rename(f.path("away"), f.path("anchor")).unwrap();
    fs::write(f.path("disk"), &mixed).unwrap();
    let uuid = f.run("dump --data disk --json").expect(DONE).json()["volume"]["uuid"].as_str().unwrap().to_owned();
    // It says on standard error what the anchor said.
    assert_eq!(run(&format!("anchor reset DISK --key-file key --accept-rollback --uuid {uuid}")).code, DONE);
    run("check DISK --key-file key").expect(DONE);
}

#[test]
fn a_passphrase_alone_makes_a_volume_with_slots_and_content_stays() {
    let f = Folder::new();
    fs::write(f.path("word"), "a passphrase").unwrap();
    fs::write(f.path("in"), vec![0x5a; 8 << 20]).unwrap();
    f.run("format --data disk --create --size 8M --passphrase-file word").expect(DONE);
    f.run("import --data disk --passphrase-file word in").expect(DONE);
    f.run("key add --data disk --passphrase-file word --new-key-file key").expect(DONE);
    f.run("key remove --data disk --key-file key --slot 0").expect(DONE);
    f.run("export --data disk --key-file key out").expect(DONE);
    assert!(fs::read(f.path("in")).unwrap() == fs::read(f.path("out")).unwrap());
}

#[test]
fn a_volume_without_slots_says_so() {
    let f = Folder::with_volume();
    fs::write(f.path("word"), "a passphrase").unwrap();
    f.run("check --data disk --passphrase-file word").expect(KEY).says("disk").says("has no key slots");
    f.run("key list --data disk").expect(DEVICE).says("disk").says("format --key-slots");
    f.run("key add --data disk --key-file key --new-passphrase-file word").expect(DEVICE).says("format --key-slots");
}

#[test]
fn a_passphrase_that_can_not_be_one_is_refused() {
    let f = with_slots();
    fs::write(f.path("empty"), "\n").unwrap();
    fs::write(f.path("long"), [b'x'; 600]).unwrap();
    f.run("check --data disk --passphrase-file empty").expect(KEY).says("empty").says("0 bytes");
    f.run("check --data disk --passphrase-file long").expect(KEY).says("long").says("from 1 to 512");
    f.run("check --data disk --passphrase-file nowhere").expect(KEY).says("nowhere");
    f.run("check --data disk --key-file key --passphrase-file word").expect(ARGUMENTS);
    f.run("key add --data disk --key-file key").expect(ARGUMENTS).says("--new-key-file");
    f.run_with_input("key add --data disk --key-file - --new-passphrase-file -", b"x")
        .expect(ARGUMENTS)
        .says("one pipe");
}

#[test]
fn a_damaged_copy_is_told_and_mended() {
    let f = with_slots();
    f.flip_bit("disk", (64 << 10) + 900);
    f.run("key list --data disk").expect(DONE).prints("the next change writes both");
    let check = f.run("check --data disk --key-file key");
    assert_eq!(check.code, DONE);
    check.says("disk: one of the two copies of the key area");
    f.run("key remove --data disk --key-file key --slot 1").expect(DONE);
    assert_eq!(f.run("key list --data disk --json").expect(DONE).json()["copies_agree"], true);
    f.flip_bit("disk", (64 << 10) + 900);
    f.flip_bit("disk", (576 << 10) + 900);
    f.run("check --data disk --key-file key").expect(DEVICE).says("disk").says("both copies of the key area");
}
