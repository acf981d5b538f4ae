//! The agent beside a real etcd of one member on this machine.

mod server;
#[path = "../../../tests/support.rs"]
mod support;
mod tls;

use server::Etcd;
use std::{
    fs,
    process::Command,
    thread,
    time::{Duration, Instant},
};
use support::{LIMIT, UUID, refused, until_answered, wait_for};
use ublk_anchor_protocol::{Body, Client, Error, Replaced, message::Shape};

const AGENT: &str = env!("CARGO_BIN_EXE_ublk-anchor-etcd");

fn body(number: u64) -> Body {
    let mut body = Body([0; Body::BYTES]);
    body.0[..8].copy_from_slice(&number.to_le_bytes());
    body
}

#[test]
fn a_body_is_kept_and_two_agents_of_one_cluster_fence_each_other() {
    let Some(mut etcd) = Etcd::start() else { return };
    let (mut first, mut one) = etcd.agent("one", &[]);
    let (_second, mut two) = etcd.agent("two", &[]);
    assert_eq!(one.shape(), Ok(Shape::Store));
    assert_eq!(until_answered(|| one.load()), None);
    assert_eq!(one.replace(1, &body(2)), Ok(Replaced::Absent));
    assert_eq!(one.init_store(1, &body(1)), Ok(Replaced::Done));
    assert_eq!(two.init_store(1, &body(9)), Ok(Replaced::Conflict));
    assert_eq!(one.replace(1, &body(2)), Ok(Replaced::Done));
    // Each remembers what it has seen, and the other one has changed it.
    assert_eq!(two.load(), Ok(Some((2, body(2)))));
    assert_eq!(two.replace(2, &body(3)), Ok(Replaced::Done));
    assert_eq!(one.replace(2, &body(9)), Ok(Replaced::Conflict));
    assert_eq!(one.replace(4, &body(9)), Ok(Replaced::Conflict));
    assert_eq!(one.load(), Ok(Some((3, body(3)))));
    assert_eq!(one.replace(3, &body(4)), Ok(Replaced::Done));
    // What is acknowledged is there after all have been killed.
    first.kill();
    etcd.restart();
    let (_first, mut one) = etcd.agent("one", &[]);
    assert_eq!(until_answered(|| one.load()), Some((4, body(4))));
    assert_eq!(until_answered(|| two.load()), Some((4, body(4))));
    // A body that was retired, and another one of the same generation in its place, is not the one that was seen.
    assert_eq!(one.retire(3), Ok(Replaced::Conflict));
    assert_eq!(one.retire(4), Ok(Replaced::Done));
    assert_eq!(one.init_store(4, &body(7)), Ok(Replaced::Done));
    assert_eq!(two.replace(4, &body(9)), Ok(Replaced::Conflict));
    assert_eq!(two.load(), Ok(Some((4, body(7)))));
    assert_eq!(two.retire(4), Ok(Replaced::Done));
    assert_eq!((one.retire(4), one.load()), (Ok(Replaced::Absent), Ok(None)));
    // In its own words.
    let mut other = Client::new(&etcd.path("two"), ublk_anchor_protocol::Uuid([1; 16]), None, LIMIT).unwrap();
    assert_eq!(other.init_store(1, &body(1)), Ok(Replaced::Done));
    let (_third, mut elsewhere) = etcd.agent("three", &["--prefix", "/elsewhere/"]);
    assert_eq!(elsewhere.load(), Ok(None));
}

/// Replaces generation `at`, and does what the protocol says where the outcome is not known: it was
/// sent so many times already.
fn replace_surely(client: &mut Client, at: u64, mut sent: u32) {
    let next = body(at + 1);
    loop {
        if sent > 0 {
            match until_answered(|| client.load()) {
                Some(found) if found == (at + 1, next) => return,
                Some(found) if found == (at, body(at)) => {}
                other => panic!("{other:?} instead of generation {at} or the next one"),
            }
        }
        match client.replace(at, &next) {
            Ok(Replaced::Done) => return,
            // One of two that were sent.
            Ok(Replaced::Conflict) if sent > 0 => {}
            Ok(other) => panic!("{other:?} of generation {at}, sent {sent} times before"),
            Err(Error::Away(_)) => continue,
            Err(Error::Unknown(_)) => {}
            Err(e @ Error::Refused(_)) => panic!("{e}"),
        }
        sent += 1;
    }
}

/// Puts a first body there, however long that takes.
fn begin(client: &mut Client) {
    while until_answered(|| client.load()).is_none() {
        let _ = client.init_store(0, &body(0));
    }
    assert_eq!(until_answered(|| client.load()), Some((0, body(0))));
}

/// What stops or kills etcd or the agent between a request and its answer leaves the body of before
/// or the new one, and a request that is sent again is done once.
#[test]
fn a_replace_is_done_once_whatever_stops_in_the_middle() {
    let Some(mut etcd) = Etcd::start() else { return };
    let (mut agent, mut client) = etcd.impatient_agent("agent");
    begin(&mut client);
    let mut at = 0;
    for round in 0..12 {
        for _ in 0..5 {
            replace_surely(&mut client, at, 0);
            at += 1;
        }
        match round % 4 {
            0 => etcd.process.stop(),
            1 => agent.stop(),
            2 => etcd.process.kill(),
            _ => agent.kill(),
        }
        let since = Instant::now();
        let answer = client.replace(at, &body(at + 1));
        let took = since.elapsed();
        assert!(answer.is_err() && took < Duration::from_secs(10), "round {round}: {answer:?} after {took:?}");
        // An agent answers in time where etcd does not.
        assert_eq!(matches!(answer, Err(Error::Unknown(_))), round % 4 < 3, "round {round}: {answer:?}");
        match round % 4 {
            0 => etcd.process.go_on(),
            1 => agent.go_on(),
            2 => etcd.restart(),
            _ => (agent, client) = etcd.impatient_agent("agent"),
        }
        replace_surely(&mut client, at, 1);
        at += 1;
    }
    assert_eq!(client.load(), Ok(Some((at, body(at)))));
}

/// A writer that goes on beside one who stops and kills.
#[test]
fn a_writer_goes_on_while_etcd_is_killed_at_random_moments() {
    let Some(mut etcd) = Etcd::start() else { return };
    let (_agent, mut client) = etcd.impatient_agent("agent");
    begin(&mut client);
    let writer = thread::spawn(move || {
        let since = Instant::now();
        let mut at = 0;
        while since.elapsed() < Duration::from_secs(8) {
            replace_surely(&mut client, at, 0);
            at += 1;
        }
        (at, client)
    });
    for moment in [37, 411, 113, 29, 250] {
        thread::sleep(Duration::from_millis(moment));
        etcd.restart();
        thread::sleep(Duration::from_millis(300));
        etcd.process.stop();
        thread::sleep(Duration::from_millis(moment));
        etcd.process.go_on();
    }
    let (at, mut client) = writer.join().unwrap();
    assert_eq!(until_answered(|| client.load()), Some((at, body(at))));
    assert!(at > 20, "it has gone on: {at}");
}

#[test]
fn what_is_no_body_and_a_cluster_that_was_put_back_are_refused() {
    let Some(mut etcd) = Etcd::start() else { return };
    let (_agent, mut client) = etcd.agent("agent", &[]);
    until_answered(|| client.load());
    assert_eq!(client.init_store(1, &body(1)), Ok(Replaced::Done));
    // A backup: everything as it is now.
    etcd.process.kill();
    let (data, backup) = (etcd.path("data"), etcd.path("backup"));
    assert!(Command::new("cp").arg("-a").args([&data, &backup]).status().unwrap().success());
    etcd.restart();
    assert_eq!(until_answered(|| client.load()), Some((1, body(1))));
    for at in 1..4 {
        replace_surely(&mut client, at, 0);
    }
    etcd.process.kill();
    fs::remove_dir_all(&data).unwrap();
    fs::rename(&backup, &data).unwrap();
    etcd.restart();
    let mut answer = client.load();
    wait_for("etcd answers again", || {
        answer = client.load();
        !matches!(answer, Err(Error::Away(_)))
    });
    assert!(matches!(answer, Err(Error::Refused(why)) if why.as_str().contains("put back")), "{answer:?}");
    // Somebody else's value under our key. An agent that has just begun knows nothing of before.
    let (_other, mut fresh) = etcd.agent("fresh", &["--prefix", "/other/"]);
    assert_eq!(until_answered(|| fresh.load()), None);
    put(etcd.ports[0], &format!("/other/{UUID}"), "1 zz");
    assert!(matches!(fresh.load(), Err(Error::Refused(why)) if why.as_str().contains("is no body")));
    assert!(matches!(fresh.init_store(1, &body(1)), Err(Error::Refused(_))), "it is not overwritten");
}

/// Puts a value past the agent, by etcd's gateway for JSON, which wants base64.
fn put(port: u16, key: &str, value: &str) {
    let shell = format!(
        "key=$(printf %s '{key}' | base64 -w0) value=$(printf %s '{value}' | base64 -w0)
         body=\"{{\\\"key\\\":\\\"$key\\\",\\\"value\\\":\\\"$value\\\"}}\"
         exec 3<>/dev/tcp/127.0.0.1/{port}
         printf 'POST /v3/kv/put HTTP/1.0\\r\\nContent-Length: %s\\r\\n\\r\\n%s' \"${{#body}}\" \"$body\" >&3
         head -n 1 <&3 | grep -q ' 200 '"
    );
    assert!(Command::new("bash").args(["-c", &shell]).status().unwrap().success());
}

/// The program itself, with its anchor in etcd: an older copy of the disk is refused.
#[test]
fn the_program_refuses_an_older_disk() {
    let Some(program) = std::env::var_os("UBLK_INTEGRITY") else {
        println!("skipped: UBLK_INTEGRITY names no ublk-integrity; scripts/test anchor-agents does");
        return;
    };
    let help = Command::new(&program).args(["format", "--help"]).output().unwrap();
    if !String::from_utf8_lossy(&help.stdout).contains("--anchor") {
        println!("skipped: this ublk-integrity has no anchors");
        return;
    }
    let Some(mut etcd) = Etcd::start() else { return };
    let (_agent, mut client) = etcd.agent("agent", &[]);
    until_answered(|| client.load());
    let dir = etcd.dir.path().to_owned();
    let run = |command: &str| {
        let anchor =
            format!("--data disk --key-file key --anchor unix:{} --anchor-wait 1", dir.join("agent").display());
        let command = command.replace("ANCHORED", &anchor);
        let ended = Command::new(&program).args(command.split(' ')).current_dir(&dir).output().unwrap();
        (ended.status.code(), String::from_utf8(ended.stderr).unwrap())
    };
    let (disk, older, newest) = (dir.join("disk"), dir.join("older"), dir.join("newest"));
    let import = |fill: u8, more: &str| {
        fs::write(dir.join("in"), vec![fill; 8 << 20]).unwrap();
        assert_eq!(run(&format!("import ANCHORED {more}in")), (Some(0), String::new()));
    };
    assert_eq!(run("keygen key"), (Some(0), String::new()));
    assert_eq!(run("format --create --size 8M ANCHORED"), (Some(0), String::new()));
    import(1, "");
    fs::copy(&disk, &older).unwrap();
    import(2, "--force ");
    fs::copy(&disk, &newest).unwrap();
    fs::copy(&older, &disk).unwrap();
    let (code, said) = run("check ANCHORED");
    assert!(code == Some(6) && said.contains("older"), "{code:?}: {said}");
    fs::copy(&newest, &disk).unwrap();
    assert_eq!(run("check ANCHORED").0, Some(0));
    // Where etcd does not answer nothing is believed, and where it is back all is.
    etcd.process.kill();
    let (code, said) = run("check ANCHORED");
    assert!(code == Some(4), "{code:?}: {said}");
    etcd.restart();
    until_answered(|| client.load());
    assert_eq!(run("check ANCHORED").0, Some(0));
}

#[test]
fn bad_arguments_are_told_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let taken = dir.path().join("taken");
    fs::write(&taken, "").unwrap();
    let taken = taken.to_str().unwrap();
    for (code, arguments, word) in [
        (1, &["--endpoint", "http://localhost"][..], "--socket"),
        (1, &["--socket", "s"], "--endpoint"),
        (1, &["--socket", "s", "--endpoint", "http://192.0.2.1"], "192.0.2.1"),
        (1, &["--socket", "s", "--endpoint", "localhost"], "localhost"),
        (1, &["--socket", "s", "--endpoint", "https://localhost", "--timeout", "0"], "--timeout 0"),
        (1, &["--socket", "s", "--endpoint", "https://localhost", "--timeout", "x"], "x"),
        (1, &["--socket", "s", "--endpoint", "https://localhost", "--cert", "c"], "--key"),
        (1, &["--socket", "s", "--endpoint", "https://localhost", "--ca", "/nowhere"], "/nowhere"),
        (1, &["--sockets", "s"], "--sockets"),
        (4, &["--socket", "s", "--endpoint", "https://name.invalid"], "name.invalid"),
        (4, &["--socket", "/nowhere/s", "--endpoint", "http://localhost"], "/nowhere/s"),
        (5, &["--socket", taken, "--endpoint", "http://localhost"], taken),
    ] {
        let (exit, said) = refused(AGENT, arguments);
        assert!(
            exit == code && said.starts_with("ublk-anchor-etcd: ") && said.contains(word),
            "{arguments:?}: {exit}, {said}"
        );
    }
}
