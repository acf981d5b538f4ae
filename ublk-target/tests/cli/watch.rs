//! `status`, `metrics` and what else asks the daemons, with doubles of these: processes that listen where daemons would, in a
//! mount namespace with a run folder of its own.

use crate::harness::*;
use nix::{
    pty::{OpenptyResult, Winsize, openpty},
    sys::{
        signal::{Signal, kill},
        termios::{LocalFlags, tcgetattr},
    },
    unistd::Pid,
};
use serde_json::{Value, json};
use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::unix::{
        fs::PermissionsExt,
        net::{UnixListener, UnixStream},
        process::ExitStatusExt,
    },
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// A folder that stands for the one below /run.
pub(crate) struct Machine {
    pub(crate) f: Folder,
}

impl Machine {
    /// One with no devices; `None` where that can't be had.
    pub(crate) fn new() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: needs root for a mount namespace");
            return None;
        }
        let f = Folder::new();
        fs::create_dir(f.path("run")).unwrap();
        Some(Self { f })
    }

    /// A device whose daemon, which is this process, answers with `more` besides what its state file has.
    pub(crate) fn add(&self, id: u32, name: &str, more: &Value) {
        let uuid = format!("00000000-0000-4000-8000-{id:012}");
        let mut status = json!({
            "id": id, "pid": std::process::id(), "name": name, "uuid": uuid, "size": 1 << 20, "block_size": 4096,
            "data": "/dev/vda", "meta": null, "key": "stdin", "queues": 1, "depth": 128, "cache": 1 << 20, "max_io": 1 << 19,
            "prefetch": true, "on_mismatch": "fail", "discard": true, "read_only": false, "verbose": false, "recovery": true,
        });
        fs::write(self.f.path(&format!("run/{id}.json")), status.to_string()).unwrap();
        status["device"] = format!("/dev/ublkb{id}").into();
        status["recovery"] = json!({});
        for (field, value) in more.as_object().unwrap() {
            status[field] = value.clone();
        }
        let listener = UnixListener::bind(self.f.path(&format!("run/{id}.sock"))).unwrap();
        thread::spawn(move || {
            for client in listener.incoming() {
                let mut client = BufReader::new(client.unwrap());
                let mut asked = String::new();
                while client.read_line(&mut asked).is_ok_and(|count| count > 0) {
                    let request: Value = serde_json::from_str(&asked).unwrap();
                    if request["verb"] == "clear" {
                        status["cleared"] = request["findings"].clone();
                    }
                    // As one that is busy, where writes are counted.
                    if let Some(writes) = status["writes"].as_u64() {
                        status["writes"] = (writes + 1000).into();
                    }
                    let _ = writeln!(client.get_mut(), "{status}");
                    asked.clear();
                }
            }
        });
    }

    /// The program, which sees these devices alone.
    pub(crate) fn command(&self, args: &str) -> Command {
        let script = r#"mkdir -p /run/ublk-integrity && mount --bind run /run/ublk-integrity && exec "$0" "$@""#;
        let mut command = Command::new("unshare");
        command.args(["-m", "sh", "-c", script, env!("CARGO_BIN_EXE_ublk-integrity")]);
        command.args(args.split_whitespace()).current_dir(self.f.dir.path()).stdin(Stdio::null());
        command
    }

    pub(crate) fn run(&self, args: &str) -> Run {
        Run::of(self.command(args).output().unwrap())
    }
}

/// Ended with the test.
struct Background(Child);

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn text(run: &Run) -> String {
    String::from_utf8(run.out.clone()).unwrap()
}

#[test]
fn status_shows_all_devices_and_what_is_not_ok() {
    let Some(machine) = Machine::new() else { return };
    assert_eq!(text(&machine.run("status -x").expect(DONE)), "no devices\n");
    assert!(machine.run("status").expect(DONE).out.is_empty());
    machine.add(4000, "home", &json!({ "reads": 7 }));
    assert_eq!(text(&machine.run("status -x").expect(DONE)), "all devices are ok\n");
    machine.add(4001, "srv", &json!({ "mismatches": 2 }));
    let run = machine.run("status -x").expect(INTEGRITY).says("1 of 2 devices not ok");
    assert_eq!(text(&run), "/dev/ublkb4001 (srv): degraded: 2 mismatches\n");
    assert!(machine.run("status -x home").expect(DONE).err.is_empty());
    machine.run("status -x -n srv").expect(INTEGRITY);
    let all = text(&machine.run("status").expect(DONE));
    let health: Vec<_> = all.lines().filter(|line| line.starts_with("health")).collect();
    assert_eq!(health, ["health    ok", "health    degraded: 2 mismatches"], "{all}");
    let all = machine.run("status --json").expect(DONE).json();
    assert_eq!((&all[0]["health"]["word"], &all[1]["health"]["why"]), (&json!("ok"), &json!("2 mismatches")));
    let one = machine.run("status --json srv").expect(DONE).json();
    assert_eq!(one["health"]["word"], "degraded");
    machine.add(4002, "old", &json!({ "latched": "a sync failed", "mismatches": 1 }));
    let run = machine.run("status -x").expect(DEVICE).says("2 of 3 devices");
    assert!(text(&run).contains("/dev/ublkb4002 (old): failed: read-only since a failure: a sync failed\n"));
}

#[test]
fn a_daemon_that_does_not_answer_holds_no_other_up() {
    let Some(machine) = Machine::new() else { return };
    machine.add(4000, "home", &json!({}));
    machine.add(4001, "srv", &json!({}));
    let path = machine.f.path("run/4001.sock");
    fs::remove_file(&path).unwrap();
    let _never_accepts = UnixListener::bind(&path).unwrap();
    let run = machine.run("status -x").expect(BUSY);
    assert!(text(&run).starts_with("/dev/ublkb4001 (srv): failed: its daemon (pid "), "{}", text(&run));
    let metrics = text(&machine.run("metrics").expect(DONE));
    for (line, value) in
        [("_up{device=\"ublkb4001\"", 1), ("_answers{device=\"ublkb4001\"", 0), ("_answers{device=\"ublkb4000\"", 1)]
    {
        let found = metrics.lines().find(|l| l.contains(line)).unwrap_or_else(|| panic!("no {line}"));
        assert!(found.ends_with(&format!(" {value}")), "{found}");
    }
}

#[test]
fn status_goes_on_looking() {
    let Some(machine) = Machine::new() else { return };
    machine.add(4000, "home", &json!({ "pages_lost": 1 }));
    for args in ["status --watch=0.1", "status -x --watch=0.1", "status home --watch=0.1"] {
        let child = machine.command(args).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut child = Background(child);
        let lines = BufReader::new(child.0.stdout.take().unwrap()).lines();
        assert_eq!(lines.filter(|line| line.as_ref().unwrap().contains("1 pages lost")).take(3).count(), 3, "{args}");
    }
}

#[test]
fn what_was_found_is_cleared_and_what_stays_is_said() {
    let Some(machine) = Machine::new() else { return };
    assert!(machine.run("clear --all").expect(DONE).out.is_empty());
    machine.add(4000, "home", &json!({ "mismatches": 2, "recovery": { "torn_was_durable": true } }));
    machine.run("status -x").expect(INTEGRITY);
    machine.run("clear").expect(ARGUMENTS).says("--all");
    let run = machine.run("clear home").expect(DONE);
    assert_eq!(text(&run), "/dev/ublkb4000: cleared 2 mismatches, 1 damaged log records that were durable once\n");
    assert_eq!(text(&machine.run("status -x").expect(DONE)), "all devices are ok\n");
    assert_eq!(machine.run("status --json home").expect(DONE).json()["mismatches"], 2, "counters go on");
    assert_eq!(text(&machine.run("clear home").expect(DONE)), "/dev/ublkb4000: there is nothing to clear\n");
    // What says how things are.
    machine.add(4001, "srv", &json!({ "failed_writes": 1, "undecided_blocks": 3 }));
    let run = machine.run("clear srv").expect(INTEGRITY);
    assert_eq!(text(&run), "/dev/ublkb4001: cleared 1 failed writes\n");
    run.says("/dev/ublkb4001 stays degraded: 3 undecided blocks: that can't be cleared");
    machine.add(4002, "old", &json!({ "latched": "a sync failed" }));
    let run =
        machine.run("clear --all").expect(DEVICE).says("4001 stays degraded").says("4002 stays failed: read-only");
    assert_eq!(text(&run).lines().count(), 3);
    fs::remove_file(machine.f.path("run/4000.sock")).unwrap();
    let _never_accepts = UnixListener::bind(machine.f.path("run/4000.sock")).unwrap();
    machine.run("clear home").expect(BUSY).says("/dev/ublkb4000: nothing is cleared: failed: its daemon");
}

#[test]
fn a_table_of_all_devices_goes_to_a_pipe() {
    let Some(machine) = Machine::new() else { return };
    assert_eq!(text(&machine.run("top --once -d 0.1").expect(DONE)), "no devices\n");
    machine.add(4000, "home", &json!({ "writes": 0 }));
    machine.add(4001, "srv", &json!({ "mismatches": 2 }));
    let table = text(&machine.run("top --once -d 0.2").expect(DONE));
    let lines: Vec<_> = table.lines().collect();
    assert!(lines.len() == 4 && lines[0].starts_with("DEVICE") && lines[0].ends_with("NAME"), "{table}");
    // A thousand for each look, and a look each 0.2 s or more.
    let cells: Vec<_> = lines[1].split_whitespace().collect();
    assert_eq!((cells[0], cells[1], *cells.last().unwrap()), ("ublkb4000", "ok", "home"), "{table}");
    assert!(cells[3].ends_with('k') || cells[3].parse::<f64>().is_ok_and(|rate| rate > 0.0), "{table}");
    assert_eq!(lines[3], "ublkb4001 is degraded: 2 mismatches");
    let one = text(&machine.run("top --once -d 0.1 srv").expect(DONE));
    assert!(one.lines().count() == 3 && !one.contains("home"), "{one}");
    let child = machine.command("top -d 0.1").stdout(Stdio::piped()).spawn().unwrap();
    let mut child = Background(child);
    let lines = BufReader::new(child.0.stdout.take().unwrap()).lines();
    let found = lines.map(Result::unwrap).filter(|line| line.contains("ublkb4001 is")).take(3);
    assert!(found.inspect(|line| assert!(!line.contains('\x1b'), "{line:?}")).count() == 3);
    machine.run("top -d 0").expect(ARGUMENTS).says("0.1 to 3600");
    machine.run("top --once -n 4999").expect(DEVICE).says("4999");
}

/// What `top` writes to a terminal of its own, as it comes.
struct Terminal {
    child: Background,
    master: fs::File,
    slave: fs::File,
    said: String,
}

impl Terminal {
    fn of(machine: &Machine, args: &str) -> Self {
        let size = Winsize { ws_row: 10, ws_col: 30, ws_xpixel: 0, ws_ypixel: 0 };
        let OpenptyResult { master, slave } = openpty(Some(&size), None).unwrap();
        let (master, slave) = (fs::File::from(master), fs::File::from(slave));
        let (stdin, stdout) = (slave.try_clone().unwrap(), slave.try_clone().unwrap());
        let child = machine.command(args).env("TERM", "xterm").stdin(stdin).stdout(stdout).spawn().unwrap();
        Self { child: Background(child), master, slave, said: String::new() }
    }

    fn says(&mut self, what: &str) {
        let (mut bytes, begun) = ([0; 4096], Instant::now());
        while !self.said.contains(what) {
            assert!(begun.elapsed() < Duration::from_secs(60), "it has never said {what:?}: {:?}", self.said);
            let count = self.master.read(&mut bytes).unwrap();
            self.said += std::str::from_utf8(&bytes[..count]).unwrap();
        }
        self.said = self.said.split_once(what).unwrap().1.into();
    }

    fn is_raw(&self) -> bool {
        !tcgetattr(&self.slave).unwrap().local_flags.contains(LocalFlags::ICANON)
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.0.id() as i32), signal).unwrap();
    }
}

#[test]
fn a_terminal_shows_a_live_table_and_is_as_before_afterwards() {
    let Some(machine) = Machine::new() else { return };
    machine.add(4000, "home", &json!({}));
    machine.add(4001, "srv", &json!({ "mismatches": 2 }));
    for end in [None, Some(Signal::SIGINT)] {
        let mut top = Terminal::of(&machine, "top -d 0.3");
        assert!(!top.is_raw());
        top.says("\x1b[?1049h\x1b[?25l");
        // No longer than the window is wide.
        top.says("ublkb4001 is degraded: 2 misma\x1b[K");
        assert!(top.is_raw());
        let status = Command::new("stty").args(["cols", "12"]).stdin(top.slave.try_clone().unwrap()).status().unwrap();
        assert!(status.success());
        top.signal(Signal::SIGWINCH);
        top.says("ublkb4001 is\x1b[K");
        match end {
            None => top.master.write_all(b"xq").unwrap(),
            Some(signal) => top.signal(signal),
        }
        let ended = top.child.0.wait().unwrap();
        assert_eq!((ended.code(), ended.signal()), end.map_or((Some(0), None), |signal| (None, Some(signal as i32))));
        top.says("\x1b[?25h\x1b[?1049l");
        assert!(!top.is_raw());
    }
}

#[test]
fn metrics_go_to_a_file_and_to_those_who_ask() {
    let Some(machine) = Machine::new() else { return };
    machine.add(4000, "home", &json!({ "reads": 7 }));
    let reads = "ublk_integrity_reads_total{device=\"ublkb4000\",volume=\"00000000-0000-4000-8000-000000004000\",name=\"home\"} 7\n";
    let printed = text(&machine.run("metrics").expect(DONE));
    assert!(printed.contains(reads) && printed.ends_with("# EOF\n"), "{printed}");

    machine.run("metrics --textfile x.prom").expect(DONE);
    let file = fs::read_to_string(machine.f.path("x.prom")).unwrap();
    assert!(file.contains(reads) && !file.contains("EOF") && !file.contains("stateset"), "{file}");
    let mode = |name: &str| fs::metadata(machine.f.path(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode("x.prom"), 0o644, "another user reads it");
    fs::set_permissions(machine.f.path("x.prom"), fs::Permissions::from_mode(0o640)).unwrap();
    fs::write(machine.f.path("x.prom"), "old").unwrap();
    machine.run("metrics --textfile x.prom").expect(DONE);
    assert_eq!((fs::read_to_string(machine.f.path("x.prom")).unwrap(), mode("x.prom")), (file, 0o640));
    assert_eq!(fs::read_dir(machine.f.dir.path()).unwrap().count(), 3, "key, run and the file");
    machine.run("metrics --textfile nowhere/x.prom").expect(DEVICE).says("nowhere/x.prom");

    let _server = Background(machine.command("metrics --listen unix:sock").spawn().unwrap());
    let got = get(&machine.f.path("sock"));
    assert!(got.starts_with("HTTP/1.1 200 OK\r\n") && got.contains(reads), "{got}");
    machine.run("metrics --listen unix:sock").expect(BUSY).says("unix:sock");
    machine.add(4001, "srv", &json!({}));
    assert!(get(&machine.f.path("sock")).contains("ublk_integrity_devices 2\n"), "asked for anew each time");
}

fn get(socket: &Path) -> String {
    let begun = Instant::now();
    let mut client = loop {
        match UnixStream::connect(socket) {
            Ok(client) => break client,
            Err(e) => assert!(begun.elapsed() < Duration::from_secs(60), "nobody listens: {e}"),
        }
        thread::sleep(Duration::from_millis(10));
    };
    client.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut got = String::new();
    client.read_to_string(&mut got).unwrap();
    got
}
