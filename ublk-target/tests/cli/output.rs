//! Output that goes nowhere, and runs that are interrupted.

use crate::{copies::content, harness::*};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    fs,
    os::unix::{fs::FileExt, process::ExitStatusExt},
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

/// A volume with a bad block.
fn with_bad_block() -> Folder {
    let f = Folder::with_volume();
    fs::write(f.path("in"), content(8 << 20)).unwrap();
    f.run("import --data disk --key-file key in").expect(DONE);
    f.flip_bit("disk", f.payload_offset("disk", 8 << 20) + 5 * 4096);
    f
}

/// As a command whose output nobody can have: on a full disk, and in a pipe without reader.
fn unread(f: &Folder, args: &str) -> [Run; 2] {
    let full = || fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let closed = || nix::unistd::pipe().unwrap().1;
    [Stdio::from(full()), Stdio::from(closed())].map(|out| {
        Run::of(f.command(args).stdout(out).stderr(Stdio::piped()).spawn().unwrap().wait_with_output().unwrap())
    })
}

#[test]
fn output_that_cannot_be_written_is_one_line_and_exit_8() {
    let f = Folder::with_volume();
    let commands = [
        "dump --data disk",
        "dump --data disk --json",
        "check --data disk --key-file key",
        "check --data disk --key-file key --json",
        "export --data disk --key-file key -",
        "format --data disk --key-file key --force",
        "benchmark --time 0.01",
        "keygen -",
        "--help",
        "format --help",
        "--version",
    ];
    for args in commands {
        for run in unread(&f, args) {
            run.expect(OUTPUT).says("standard output");
        }
    }
}

#[test]
fn check_keeps_its_verdict() {
    let f = with_bad_block();
    for run in unread(&f, "check --data disk --key-file key") {
        run.expect(INTEGRITY).says("1 of 2048 blocks are bad").says("standard output");
    }
    fs::write(f.path("noise"), b"UBLKINTG").unwrap();
    fs::OpenOptions::new().write(true).open(f.path("noise")).unwrap().set_len(1 << 20).unwrap();
    for run in unread(&f, "dump --data noise") {
        run.expect(DEVICE).says("no readable").says("standard output");
    }
}

#[test]
fn errors_that_nobody_can_read_change_no_exit_code() {
    let f = with_bad_block();
    for (args, code) in
        [("check --data disk --key-file key", INTEGRITY), ("nonsense", ARGUMENTS), ("dump --data x", DEVICE)]
    {
        let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        assert_eq!(f.command(args).stdout(Stdio::null()).stderr(full).status().unwrap().code(), Some(code), "{args}");
    }
}

/// A volume that takes a while to read.
fn large() -> Folder {
    let f = Folder::new();
    f.run("format --data disk --create --size 512M --key-file key").expect(DONE);
    let zero = fs::File::create(f.path("in")).unwrap();
    let piece = content(32 << 20);
    (0..16).for_each(|i| zero.write_all_at(&piece, i * (32 << 20)).unwrap());
    f.run("import --data disk --key-file key in").expect(DONE);
    fs::remove_file(f.path("in")).unwrap();
    f
}

fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !is_so() {
        assert!(begin.elapsed() < Duration::from_secs(60), "{what}");
        sleep(Duration::from_millis(1));
    }
}

fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id() as i32), signal).unwrap();
}

/// Processor time that it has had, in hundredths of a second.
fn ticks(child: &Child) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap_or_default();
    // After the name, which may hold anything: fields 14 and 15 of all.
    let fields = stat.rsplit(") ").next().unwrap_or_default().split(' ');
    fields.skip(11).take(2).filter_map(|ticks| ticks.parse::<u64>().ok()).sum()
}

/// Whether its thread that waits for signals is there.
fn is_watching(child: &Child) -> bool {
    let tasks = fs::read_dir(format!("/proc/{}/task", child.id())).into_iter().flatten().flatten();
    tasks
        .map(|task| fs::read_to_string(task.path().join("comm")))
        .any(|name| name.is_ok_and(|name| name.trim() == "signals"))
}

#[test]
fn an_interrupted_check_tells_what_it_has_found() {
    let f = large();
    for (bad, code) in [(false, INTERRUPTED), (true, INTEGRITY)] {
        if bad {
            f.flip_bit("disk", f.payload_offset("disk", 512 << 20) + 4096);
        }
        let mut command = f.command("check --data disk --key-file key --json");
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // The first blocks are read by then.
        wait_for("no thread for signals", || is_watching(&child));
        wait_for("nothing done", || ticks(&child) >= 5);
        signal(&child, Signal::SIGINT);
        let run = Run::of(child.wait_with_output().unwrap()).expect(code).says("interrupted after");
        let report = run.json();
        assert_eq!((&report["finished"], &report["block_size"]), (&false.into(), &4096.into()));
        assert_eq!(report["bad_blocks"], u64::from(bad));
        let checked = report["checked_blocks"].as_u64().unwrap();
        assert!(0 < checked && checked < 131_072, "{checked}");
    }
}

#[test]
fn what_is_started_with_signals_ignored_goes_on() {
    let f = large();
    let program = f.command("check --data disk --key-file key");
    // As nohup does, and a shell without job control for what it starts with "&".
    let mut ignorant = Command::new("sh");
    ignorant.args(["-c", r#"trap "" HUP QUIT; exec "$0" "$@""#]).arg(program.get_program()).args(program.get_args());
    ignorant.current_dir(f.dir.path()).stdin(Stdio::null());
    let child = ignorant.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait_for("no thread for signals", || is_watching(&child));
    for by in [Signal::SIGHUP, Signal::SIGQUIT] {
        signal(&child, by);
    }
    Run::of(child.wait_with_output().unwrap()).expect(DONE);
}

#[test]
fn an_interrupted_export_leaves_nothing() {
    let f = large();
    fs::write(f.path("old"), "there before").unwrap();
    let names = || {
        let mut names: Vec<_> = fs::read_dir(f.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let before = names();
    for (out, by) in [("out", Signal::SIGINT), ("old --force", Signal::SIGTERM)] {
        let child =
            f.command(&format!("export --data disk --key-file key {out}")).stderr(Stdio::piped()).spawn().unwrap();
        wait_for("no temporary file", || names().len() > before.len());
        signal(&child, by);
        assert_eq!(child.wait_with_output().unwrap().status.signal(), Some(by as i32));
        assert_eq!(names(), before);
        assert_eq!(fs::read(f.path("old")).unwrap(), b"there before");
    }
    // To a pipe nothing is to be taken away.
    let child = f.command("export --data disk --key-file key -").stdout(Stdio::piped()).spawn().unwrap();
    sleep(Duration::from_millis(300));
    signal(&child, Signal::SIGTERM);
    assert_eq!(child.wait_with_output().unwrap().status.signal(), Some(Signal::SIGTERM as i32));
}

#[test]
fn a_key_typed_at_a_terminal_is_not_shown() {
    use std::io::{Read, Write};
    let f = Folder::new();
    let typed = "a key of more than thirty-two letters";
    fs::write(f.path("typed"), typed).unwrap();
    f.run("format --data disk --create --size 8M --key-file typed").expect(DONE);
    let terminal = nix::pty::openpty(None, None).unwrap();
    let (mut ours, theirs) = (fs::File::from(terminal.master), fs::File::from(terminal.slave));
    let echoes =
        || nix::sys::termios::tcgetattr(&theirs).unwrap().local_flags.contains(nix::sys::termios::LocalFlags::ECHO);
    let ask = || {
        let mut command = f.command("check --data disk --key-file -");
        command.stdin(theirs.try_clone().unwrap()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().unwrap();
        wait_for("it still echoes", || !echoes());
        child
    };
    let child = ask();
    ours.write_all(format!("{typed}\n").as_bytes()).unwrap();
    let run = Run::of(child.wait_with_output().unwrap());
    assert_eq!((run.code, run.err.lines().count()), (DONE, 1), "{}", run.err);
    assert!(echoes());
    // Somebody who thinks better of it has a terminal that echoes, too.
    let child = ask();
    signal(&child, Signal::SIGINT);
    assert_eq!(child.wait_with_output().unwrap().status.signal(), Some(Signal::SIGINT as i32));
    assert!(echoes());
    drop((f, theirs));
    // Nothing was shown but the end of the line, if at all.
    let mut shown = Vec::new();
    let _ = ours.read_to_end(&mut shown);
    assert!(!String::from_utf8_lossy(&shown).contains("key"), "{shown:?}");
}

#[test]
fn a_key_goes_to_standard_output_but_no_terminal() {
    let f = Folder::new();
    let [one, other] = [(); 2].map(|()| f.run("keygen -").expect(DONE).out);
    assert!(one.len() == 32 && other.len() == 32 && one != other && !f.path("-").exists());
    let terminal = nix::pty::openpty(None, None).unwrap();
    Run::of(f.command("keygen -").stdout(terminal.slave).output().unwrap()).expect(ARGUMENTS).says("terminal");
}
