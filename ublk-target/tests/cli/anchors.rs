//! Anchors: an older copy of all of the disk is refused, and what the verbs do about that.

use crate::harness::*;
use serde_json::Value;
use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::net::{UnixListener, UnixStream},
    sync::{Arc, Mutex},
    thread,
};

/// A folder with a volume of 8 MiB in "disk" whose anchor is in "anchor", full of "in".
fn anchored() -> Folder {
    let f = Folder::new();
    run(&f, "format --data disk --create --size 8M --key-file key ANCHOR").expect(DONE);
    fs::write(f.path("in"), vec![0x5a; 8 << 20]).unwrap();
    run(&f, "import --data disk --key-file key ANCHOR in").expect(DONE);
    f
}

/// Where ANCHOR stands the volume's own is named, OTHER is a place beside it. All is on one disk here.
fn run(f: &Folder, args: &str) -> Run {
    let place = |name: &str| format!("file:{}", f.path(name).display());
    let anchor = format!("--anchor {} --anchor-same-disk --anchor-wait 0", place("anchor"));
    f.run(&args.replace("ANCHOR", &anchor).replace("OTHER", &place("other")))
}

fn shown(f: &Folder) -> Value {
    run(f, "anchor show --data disk --key-file key ANCHOR --json").expect(DONE).json()
}

#[test]
fn a_disk_that_is_put_back_is_refused() {
    let f = anchored();
    run(&f, "check --data disk --key-file key ANCHOR").expect(DONE);
    let older = fs::read(f.path("disk")).unwrap();
    fs::write(f.path("in"), vec![0xa5; 8 << 20]).unwrap();
    run(&f, "import --data disk --key-file key ANCHOR --force in").expect(DONE);
    let newest = fs::read(f.path("disk")).unwrap();
    let (anchor, held) = (fs::read(f.path("anchor")).unwrap(), shown(&f));
    fs::write(f.path("disk"), older).unwrap();
    for verb in ["check", "export", "import --force"] {
        let file = if verb == "check" {
            ""
        } else if verb == "export" {
            "out"
        } else {
            "in"
        };
        let said = run(&f, &format!("{verb} --data disk --key-file key ANCHOR {file}")).expect(INTEGRITY);
        said.says("disk holds an older or another state").says("anchor reset --accept-rollback");
    }
    assert_eq!(fs::read(f.path("anchor")).unwrap(), anchor, "nothing of it was written");
    // Without it the disk is readable, for rescue, and for nothing else.
    run(&f, "check --data disk --key-file key").expect(ARGUMENTS).says("--anchor").says("--without-anchor");
    run(&f, "import --data disk --key-file key --force in").expect(ARGUMENTS).says("has an anchor");
    run(&f, "export --data disk --key-file key --without-anchor out").expect(DONE);
    assert!(fs::read(f.path("out")).unwrap() == vec![0x5a; 8 << 20]);
    // The newest is accepted as before.
    fs::write(f.path("disk"), newest).unwrap();
    run(&f, "check --data disk --key-file key ANCHOR").expect(DONE);
    assert_eq!(shown(&f), held);
}

#[test]
fn an_older_state_is_accepted_on_purpose_and_that_stays_visible() {
    let f = anchored();
    let older = fs::read(f.path("disk")).unwrap();
    fs::write(f.path("in"), vec![0xa5; 8 << 20]).unwrap();
    run(&f, "import --data disk --key-file key ANCHOR --force in").expect(DONE);
    let newest = fs::read(f.path("disk")).unwrap();
    fs::write(f.path("disk"), older).unwrap();
    let uuid = f.run("dump --data disk --json").expect(DONE).json()["volume"]["uuid"].as_str().unwrap().to_owned();
    let other = "00000000-0000-4000-8000-000000000000";
    run(&f, &format!("anchor reset --data disk --key-file key ANCHOR --uuid {uuid}")).expect(ARGUMENTS);
    let wrong = run(&f, &format!("anchor reset --data disk --key-file key ANCHOR --accept-rollback --uuid {other}"));
    wrong.expect(DEVICE).says(&uuid).says(other);
    let done = run(&f, &format!("anchor reset --data disk --key-file key ANCHOR --accept-rollback --uuid {uuid}"));
    assert!(done.code == DONE && done.err.contains("the anchor was written"), "{}", done.err);
    assert_eq!(shown(&f)["resets"], 1);
    run(&f, "export --data disk --key-file key ANCHOR out").expect(DONE);
    assert!(fs::read(f.path("out")).unwrap() == vec![0x5a; 8 << 20]);
    // What was the newest is an abandoned branch now.
    fs::write(f.path("disk"), newest).unwrap();
    run(&f, "check --data disk --key-file key ANCHOR").expect(INTEGRITY);
}

#[test]
fn an_anchor_begins_moves_and_ends() {
    let f = Folder::with_volume();
    run(&f, "check --data disk --key-file key ANCHOR").expect(DEVICE).says("file:").says("No such file");
    run(&f, "anchor init --data disk --key-file key ANCHOR").expect(DONE).prints("file:");
    run(&f, "anchor init --data disk --key-file key ANCHOR").expect(BUSY).says("holds a state already");
    f.run("dump --data disk").expect(DONE).prints("anchored");
    let generation = shown(&f)["generation"].as_u64().unwrap();
    run(&f, "anchor move --data disk --key-file key ANCHOR --to OTHER").expect(DONE).prints("other");
    run(&f, "check --data disk --key-file key ANCHOR").expect(DEVICE).says("moved away");
    assert!(shown(&f)["state"] == "moved_away" && shown(&f)["generation"].as_u64().unwrap() > generation);
    let with_other =
        |verb: &str| run(&f, &format!("{verb} --data disk --key-file key --anchor OTHER --anchor-same-disk"));
    with_other("check").expect(DONE);
    let anchored = fs::read(f.path("disk")).unwrap();
    with_other("anchor remove").expect(DONE);
    f.run("check --data disk --key-file key").expect(DONE);
    with_other("check").expect(DEVICE).says("moved away or ended");
    let version = f.run("dump --data disk --json").expect(DONE).json()["copies"][0]["version"].clone();
    assert_eq!(version, 1, "an older program opens it again");
    // A volume of before is not one without an anchor.
    fs::write(f.path("disk"), anchored).unwrap();
    f.run("check --data disk --key-file key").expect(ARGUMENTS).says("--anchor");
}

#[test]
fn an_anchor_that_protects_from_nothing_or_is_none_is_refused() {
    let f = Folder::with_volume();
    let place = format!("file:{}", f.path("anchor").display());
    let same = f.run(&format!("anchor init --data disk --key-file key --anchor {place}")).expect(ARGUMENTS);
    same.says(&place).says("on the disk of").says("--anchor-same-disk");
    assert!(!f.path("anchor").exists(), "nothing is left of it");
    f.run("anchor init --data disk --key-file key").expect(ARGUMENTS).says("--anchor");
    f.run("anchor init --data disk --key-file key --anchor tpm:0").expect(ARGUMENTS).says("file:PATH");
    fs::write(f.path("anchor"), "text").unwrap();
    run(&f, "anchor init --data disk --key-file key ANCHOR").expect(ARGUMENTS).says("is no anchor");
    assert_eq!(fs::read(f.path("anchor")).unwrap(), b"text");
    // Nor is a volume made whose anchor is another's.
    fs::remove_file(f.path("anchor")).unwrap();
    run(&f, "anchor init --data disk --key-file key ANCHOR").expect(DONE);
    run(&f, "format --data new --create --size 8M --key-file key ANCHOR").expect(BUSY).says("holds something");
    assert!(!f.path("new").exists());
    f.run("keygen other-key").expect(DONE);
    f.run("format --data new --create --size 8M --key-file other-key").expect(DONE);
    run(&f, "check --data new --key-file other-key ANCHOR").expect(DEVICE).says("that of volume");
}

#[test]
fn what_is_damaged_is_not_begun_anew_unasked() {
    let f = anchored();
    let mut bytes = fs::read(f.path("anchor")).unwrap();
    (bytes[300], bytes[4396]) = (bytes[300] ^ 1, bytes[4396] ^ 1);
    fs::write(f.path("anchor"), bytes).unwrap();
    run(&f, "check --data disk --key-file key ANCHOR").expect(INTEGRITY).says("damaged or forged").says("anchor reset");
    run(&f, "anchor init --data disk --key-file key ANCHOR").expect(INTEGRITY).says("damaged or forged");
    fs::write(f.path("anchor"), vec![0; 8192]).unwrap();
    run(&f, "check --data disk --key-file key ANCHOR").expect(DEVICE).says("holds nothing");
    let uuid = f.run("dump --data disk --json").expect(DONE).json()["volume"]["uuid"].as_str().unwrap().to_owned();
    run(&f, &format!("anchor reset --data disk --key-file key ANCHOR --accept-rollback --uuid {uuid}")).expect(DONE);
    run(&f, "check --data disk --key-file key ANCHOR").expect(DONE);
}

#[test]
fn volumes_of_passphrases_and_two_devices_have_anchors_too() {
    let f = Folder::new();
    fs::write(f.path("word"), "a passphrase").unwrap();
    fs::write(f.path("in"), vec![0x5a; 8 << 20]).unwrap();
    run(&f, "format --data disk --meta meta --create --size 8M --passphrase-file word ANCHOR").expect(DONE);
    let older = fs::read(f.path("meta")).unwrap();
    run(&f, "import --data disk --meta meta --passphrase-file word ANCHOR in").expect(DONE);
    run(&f, "resize --data disk --meta meta --passphrase-file word ANCHOR").expect(DONE);
    run(&f, "check --data disk --meta meta --passphrase-file word ANCHOR").expect(DONE);
    fs::write(f.path("meta"), older).unwrap();
    run(&f, "check --data disk --meta meta --passphrase-file word ANCHOR").expect(INTEGRITY).says("meta");
}

/// An agent of counters, for one volume. What its counter is at; `None`: there is none.
fn counting(f: &Folder) -> Arc<Mutex<Option<u64>>> {
    let value: Arc<Mutex<Option<u64>>> = Arc::default();
    let (listener, kept) = (UnixListener::bind(f.path("agent")).unwrap(), Arc::clone(&value));
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let kept = Arc::clone(&kept);
            thread::spawn(move || answer(stream, &kept));
        }
    });
    value
}

fn answer(mut stream: UnixStream, value: &Mutex<Option<u64>>) {
    let mut is_known = false;
    for line in BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok) {
        let mut value = value.lock().unwrap();
        let words: Vec<&str> = line.split(' ').collect();
        let said = match (words[0], *value) {
            ("hello", _) => "ok counter auth".to_owned(),
            ("auth", _) => {
                is_known = words[1].len() == 64;
                "ok".to_owned()
            }
            _ if !is_known => "refused say auth first".to_owned(),
            ("read", Some(now)) => format!("ok {now}"),
            ("init", None) => format!("ok {}", value.insert(207)),
            ("increment", Some(now)) if words[1] == now.to_string() => format!("ok {}", value.insert(now + 1)),
            ("read" | "increment", None) => "absent".to_owned(),
            ("init" | "increment", Some(_)) => "conflict".to_owned(),
            _ => "refused".to_owned(),
        };
        drop(value);
        if writeln!(stream, "{said}").is_err() {
            return;
        }
    }
}

#[test]
fn a_counter_is_an_anchor_whose_bodies_lie_on_the_disk() {
    let f = Folder::new();
    let counter = counting(&f);
    let run = |args: &str| {
        let agent = format!("--anchor unix:{} --anchor-wait 0", f.path("agent").display());
        f.run(&args.replace("COUNTER", &agent))
    };
    run("format --data disk --create --size 8M --key-file key COUNTER").expect(DONE);
    // One to begin with, so that nothing which was prepared counts, and one for the body.
    assert_eq!(*counter.lock().unwrap(), Some(209));
    fs::write(f.path("in"), vec![0x5a; 8 << 20]).unwrap();
    let older = fs::read(f.path("disk")).unwrap();
    run("import --data disk --key-file key COUNTER in").expect(DONE);
    assert_eq!(*counter.lock().unwrap(), Some(212), "an open counts twice, its orderly end once");
    let newest = fs::read(f.path("disk")).unwrap();
    let shown = run("anchor show --data disk --key-file key COUNTER --json").expect(DONE).json();
    assert_eq!((&shown["generation"], &shown["state"]), (&212.into(), &"serving".into()));
    // All of it put back, and all of it but the bodies.
    let mut mixed = older.clone();
    mixed[256 << 10..264 << 10].copy_from_slice(&newest[256 << 10..264 << 10]);
    fs::write(f.path("disk"), &older).unwrap();
    let said = run("check --data disk --key-file key COUNTER").expect(INTEGRITY);
    said.says("the counter is at 212").says("generation 209").says("anchor reset --accept-rollback");
    run("anchor init --data disk --key-file key COUNTER").expect(BUSY).says("has an anchor already");
    fs::write(f.path("disk"), &mixed).unwrap();
    run("export --data disk --key-file key COUNTER out")
        .expect(INTEGRITY)
        .says("was the next when the anchor was written");
    assert_eq!(*counter.lock().unwrap(), Some(212), "who is refused counts nothing");
    // Both bodies gone.
    let mut gone = newest.clone();
    gone[256 << 10..264 << 10].fill(0);
    fs::write(f.path("disk"), &gone).unwrap();
    run("check --data disk --key-file key COUNTER").expect(INTEGRITY).says("no body of it is there");
    let uuid = f.run("dump --data disk --json").expect(DONE).json()["volume"]["uuid"].as_str().unwrap().to_owned();
    run(&format!("anchor reset --data disk --key-file key COUNTER --accept-rollback --uuid {uuid}")).expect(DONE);
    run("check --data disk --key-file key COUNTER").expect(DONE);
    fs::write(f.path("disk"), &newest).unwrap();
    run("check --data disk --key-file key COUNTER").expect(INTEGRITY);
    fs::write(f.path("disk"), &gone).unwrap();
    run(&format!("anchor reset --data disk --key-file key COUNTER --accept-rollback --uuid {uuid}")).expect(DONE);
    // To a file, and back.
    let file = format!("file:{}", f.path("anchor").display());
    let moved = f.run(&format!(
        "anchor move --data disk --key-file key --anchor unix:{} --anchor-same-disk --to {file}",
        f.path("agent").display()
    ));
    moved.expect(DONE).prints("anchor");
    run("check --data disk --key-file key COUNTER").expect(DEVICE).says("moved away");
    let with_file =
        |verb: &str| f.run(&format!("{verb} --data disk --key-file key --anchor {file} --anchor-same-disk"));
    with_file("check").expect(DONE);
    with_file(&format!("anchor move --to unix:{}", f.path("agent").display())).expect(DONE);
    with_file("check").expect(DEVICE).says("moved away");
    run("check --data disk --key-file key COUNTER").expect(DONE);
    // A counter that is gone, as that of a TPM that was cleared.
    let kept = counter.lock().unwrap().take();
    run("check --data disk --key-file key COUNTER").expect(DEVICE).says("holds nothing");
    *counter.lock().unwrap() = kept;
    // This agent takes none away.
    let removed = run("anchor remove --data disk --key-file key COUNTER");
    assert!(removed.code == DONE && removed.err.contains("the counter stays"), "{}", removed.err);
    f.run("check --data disk --key-file key").expect(DONE);
    run("anchor init --data disk --key-file key COUNTER").expect(DONE);
    run("export --data disk --key-file key COUNTER out").expect(DONE);
    assert!(fs::read(f.path("out")).unwrap() == vec![0x5a; 8 << 20]);
}
