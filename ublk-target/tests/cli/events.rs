//! `events` and `monitor`, with files of events as daemons leave them.

use crate::{harness::*, watch::Machine};
use serde_json::{Value, json};
use std::{
    fs::{self, OpenOptions},
    io::{BufRead, BufReader, Write},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Child, Stdio},
    thread,
    time::{Duration, Instant},
};

fn tell(machine: &Machine, second: u32, class: &str, message: &str) {
    let event = json!({
        "schema": 1, "time": format!("2026-01-01T00:00:{second:02}Z"), "class": class, "severity": "err", "volume": "v",
        "name": "home", "data": "/dev/vda", "pid": 7, "message": message, "count": 3, "first_block": 5, "blocks": 2, "errno": 84,
    });
    let mut file = OpenOptions::new().append(true).create(true).open(machine.f.path("run/v.events")).unwrap();
    writeln!(file, "{event}").unwrap();
}

/// A program that may be run for events, as a script.
fn program(path: &Path, script: &str) {
    fs::write(path, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < Duration::from_secs(60), "in vain waited for {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn events_are_shown_and_followed() {
    let Some(machine) = Machine::new() else { return };
    assert!(machine.run("events").expect(DONE).out.is_empty());
    tell(&machine, 2, "mismatch", "block 5");
    tell(&machine, 1, "latched", "a sync failed");
    let lines = String::from_utf8(machine.run("events").expect(DONE).out).unwrap();
    assert_eq!(
        lines,
        "2026-01-01T00:00:01Z err     latched: a sync failed\n2026-01-01T00:00:02Z err     mismatch: block 5\n"
    );
    let run = machine.run("events --json --class mismatch").expect(DONE);
    assert_eq!((run.json()["first_block"].as_u64(), run.json()["count"].as_u64()), (Some(5), Some(3)));
    let refused = machine.run("events --class mismatch --class mismach").expect(ARGUMENTS).says("'mismach'");
    refused.says("mismatch").says("daemon-died").says("--help");
    let mut child = machine.command("events -f").stdout(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(child.stdout.take().unwrap()).lines();
    assert_eq!(said.by_ref().take(2).count(), 2);
    tell(&machine, 3, "stopping", "later");
    assert!(said.next().unwrap().unwrap().ends_with("stopping: later"));
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn the_monitor_runs_a_program_for_each_event_that_comes() {
    let Some(machine) = Machine::new() else { return };
    tell(&machine, 1, "latched", "before it was started");
    let out = machine.f.path("out");
    let script = "cat >>out\necho \"$UBLK_EVENT_CLASS $UBLK_EVENT_NAME $UBLK_EVENT_FIRST_BLOCK $UBLK_EVENT_MESSAGE\" >>words\n[ \"$UBLK_EVENT_CLASS\" != bad-page ]";
    program(&machine.f.path("hook"), script);
    machine.run("monitor --command ./hook --test").expect(DONE);
    let event: Value = serde_json::from_slice(&fs::read(&out).unwrap()).unwrap();
    assert_eq!((&event["class"], &event["severity"]), (&json!("test"), &json!("notice")));
    let words = || fs::read_to_string(machine.f.path("words")).unwrap_or_default();
    let start = || machine.command("monitor --command ./hook").stderr(Stdio::piped()).spawn().unwrap();
    let end = |child: &mut Child| {
        child.kill().unwrap();
        child.wait().unwrap();
    };
    let mut child = start();
    // What was told before it was started, at boot for one, is passed on, too.
    wait_for("what came before", || words().contains("latched home 5 before it was started\n"));
    tell(&machine, 2, "mismatch", "5 of \"them\"");
    wait_for("an event", || words().contains("mismatch home 5 5 of \"them\"\n"));
    // One that is ended and started again begins with what came meanwhile.
    wait_for("its position", || {
        let kept = fs::read_dir(machine.f.path("run")).unwrap().flatten().find(|entry| {
            let name = entry.file_name().into_string().unwrap();
            name.starts_with("monitor-") && name.ends_with("-hook.position")
        });
        let size = fs::metadata(machine.f.path("run/v.events")).unwrap().len();
        kept.is_some_and(|kept| fs::read_to_string(kept.path()).unwrap().contains(&format!("\"offset\":{size}")))
    });
    end(&mut child);
    tell(&machine, 3, "stopping", "while there was none");
    let mut child = start();
    wait_for("what came meanwhile", || words().contains("stopping home 5 while there was none\n"));
    assert_eq!(words().matches("mismatch").count() + words().matches("latched").count(), 2, "{}", words());
    // One that fails is told, and the next goes on.
    tell(&machine, 1, "bad-page", "x");
    tell(&machine, 2, "write-failed", "y");
    wait_for("what comes after a failure", || words().contains("write-failed"));
    let mut line = String::new();
    BufReader::new(child.stderr.take().unwrap()).read_line(&mut line).unwrap();
    assert!(line.contains("hook for event bad-page has failed"), "{line}");
    end(&mut child);
}

#[test]
fn the_monitor_runs_nothing_that_others_can_change() {
    let f = Folder::new();
    program(&f.path("hook"), "exit 3");
    f.run("monitor --command ./hook --test").expect(DEVICE).says("hook for event test has failed");
    for (mode, code, says) in
        [(0o777, KEY, "others can change it"), (0o775, KEY, "chmod go-w"), (0o644, ARGUMENTS, "is no program")]
    {
        fs::set_permissions(f.path("hook"), fs::Permissions::from_mode(mode)).unwrap();
        f.run("monitor --command ./hook --test").expect(code).says(says).says("./hook");
    }
    f.run("monitor --command ./nowhere --test").expect(DEVICE).says("./nowhere");
    f.run("monitor --command . --test").expect(ARGUMENTS).says("is no program");
    f.run("monitor").expect(ARGUMENTS).says("--command");
}

#[test]
fn the_example_mails() {
    let f = Folder::new();
    program(&f.path("sendmail"), "cat >mail");
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../contrib/monitor/mail-event");
    let mut command = f.command("monitor --test --command");
    let run = Run::of(command.arg(&example).env("SENDMAIL", "./sendmail").env("MAILADDR", "ops").output().unwrap());
    // Whose the sources are is not ours to say.
    if run.code == KEY {
        println!("skipped: {}", run.err);
        return;
    }
    run.expect(DONE);
    let mail = fs::read_to_string(f.path("mail")).unwrap();
    assert!(mail.starts_with("To: ops\nSubject: ") && mail.contains("this is a test of the monitor"), "{mail}");
}
