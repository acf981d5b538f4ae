//! `resize` of volumes in files.

use crate::harness::*;
use std::fs;

const MIB: u64 = 1 << 20;

/// Makes a file longer, by a hole.
fn lengthen(f: &Folder, name: &str, by: u64) {
    let file = fs::OpenOptions::new().write(true).open(f.path(name)).unwrap();
    file.set_len(file.metadata().unwrap().len() + by).unwrap();
}

fn says(run: Run) -> String {
    String::from_utf8(run.expect(DONE).out).unwrap()
}

fn volume(f: &Folder, devices: &str) -> (u64, u64) {
    let volume = f.run(&format!("dump {devices} --json")).expect(DONE).json()["volume"].clone();
    (volume["size"].as_u64().unwrap(), volume["max_size"].as_u64().unwrap())
}

#[test]
fn a_volume_grows_with_its_file_and_keeps_what_it_holds() {
    let f = Folder::new();
    f.run("format --data disk --create --size 8M --max-size 64M --key-file key").expect(DONE);
    assert_eq!(volume(&f, "--data disk"), (8 * MIB, 64 * MIB));
    assert!(says(f.run("dump --data disk")).contains("can grow to   64.00 MiB"));
    let content = vec![7; 8 << 20];
    fs::write(f.path("in"), &content).unwrap();
    f.run("import --data disk --key-file key in").expect(DONE);
    lengthen(&f, "disk", 8 * MIB + 100);
    assert_eq!(says(f.run("resize --data disk --key-file key")), "disk: 8.00 MiB → 16.00 MiB (16777216 bytes)\n");
    assert_eq!(says(f.run("resize --data disk --key-file key")), "disk: 16.00 MiB (16777216 bytes) as before\n");
    f.run("check --data disk --key-file key").expect(DONE);
    f.run("export --data disk --key-file key out").expect(DONE);
    let out = fs::read(f.path("out")).unwrap();
    assert_eq!(out.len() as u64, 16 * MIB);
    assert!(out.starts_with(&content) && out[content.len()..].iter().all(|byte| *byte == 0));
    // And what is new takes content, too.
    fs::write(f.path("in"), vec![9; 16 << 20]).unwrap();
    f.run("import --data disk --key-file key --force in").expect(DONE);
    f.run("check --data disk --key-file key").expect(DONE);
    lengthen(&f, "disk", 100 * MIB);
    let grown = f.run("resize --data disk --key-file key --size 20M --json").expect(DONE).json();
    assert_eq!((&grown["schema"], &grown["path"]), (&1.into(), &"disk".into()), "{grown}");
    assert_eq!((&grown["size_before"], &grown["size"]), (&(16 * MIB).into(), &(20 * MIB).into()), "{grown}");
    assert!(grown["waited_seconds"].is_null(), "nobody served it: {grown}");
    let refused = f.run("resize --data disk --key-file key --size 4M --json").expect(ARGUMENTS).json();
    assert_eq!(refused["error"]["exit"], ARGUMENTS, "{refused}");
    f.run("resize --data disk --key-file key").expect(DONE);
    assert_eq!(volume(&f, "--data disk"), (64 * MIB, 64 * MIB), "its metadata has no room for more");
}

#[test]
fn metadata_of_its_own_has_as_much_room_as_its_device() {
    let f = Folder::new();
    let devices = "--data d --meta m";
    f.run(&format!("format {devices} --create --size 8M --key-file key")).expect(DONE);
    assert_eq!(volume(&f, "--data d --meta m"), (8 * MIB, 8 * MIB), "files are made as large as must be");
    let version =
        |f: &Folder| f.run("dump --data d --meta m --json").expect(DONE).json()["copies"][0]["version"].clone();
    assert_eq!(version(&f), 1);
    lengthen(&f, "d", 8 * MIB);
    f.run(&format!("resize {devices} --key-file key")).expect(ARGUMENTS).says("page areas hold 8388608");
    lengthen(&f, "m", 32 * MIB);
    f.run(&format!("format {devices} --size 8M --key-file key --force")).expect(DONE);
    assert_eq!((volume(&f, devices), version(&f)), ((8 * MIB, 128 * MIB), 2.into()), "16 times its size");
    f.run(&format!("resize {devices} --key-file key")).expect(DONE);
    assert_eq!(volume(&f, devices).0, 16 * MIB);
    f.run(&format!("check {devices} --key-file key")).expect(DONE);
    f.run(&format!("format {devices} --size 8M --max-size 8M --key-file key --force")).expect(DONE);
    assert_eq!((volume(&f, devices), version(&f)), ((8 * MIB, 8 * MIB), 1.into()), "as older programs know it");
}

#[test]
fn a_wrong_volume_does_not_grow() {
    let f = Folder::new();
    f.run("format --data disk --create --size 8M --max-size 64M --key-file key").expect(DONE);
    f.run("keygen other").expect(DONE);
    lengthen(&f, "disk", 8 * MIB);
    let before = fs::read(f.path("disk")).unwrap();
    f.run("resize --data disk --key-file other").expect(KEY);
    f.run("resize --data disk --key-file key --uuid 00000000-0000-4000-8000-000000000000").expect(DEVICE);
    assert!(fs::read(f.path("disk")).unwrap() == before, "nothing is written");
}
