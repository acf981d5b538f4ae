//! A client, and agents that are late, silent or none.

use crate::{TIMEOUT, body, uuid};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixListener,
    path::Path,
    thread,
    time::{Duration, Instant},
};
use ublk_anchor_protocol::{Client, Error, Replaced, Text};

/// What listens there, and says `answers` to each connection in turn, a moment after each line.
fn impostor(path: &Path, answers: Vec<&'static str>, moment: Duration) {
    let listener = UnixListener::bind(path).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (stream, answers) = (stream.unwrap(), answers.clone());
            thread::spawn(move || {
                let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
                for answer in answers {
                    let Some(Ok(_)) = lines.next() else { return };
                    thread::sleep(moment);
                    let _ = (&stream).write_all(answer.as_bytes());
                }
                // What it says no more it is not asked for either.
                thread::sleep(TIMEOUT);
            });
        }
    });
}

#[test]
fn a_client_waits_no_longer_than_it_says_and_takes_no_late_answer_for_another() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("agent");
    // Long enough for a busy machine to answer in.
    let timeout = Duration::from_secs(1);
    let mut client = Client::new(&path, uuid(), None, timeout).unwrap();
    assert!(matches!(client.load(), Err(Error::Away(_))), "nobody listens");

    // It says hello at once, and the rest too late.
    impostor(&path, vec!["ok store\n", "", "ok\n"], Duration::ZERO);
    let since = Instant::now();
    assert_eq!(client.replace(1, &body(1)), Err(Error::Unknown(Text::of("no answer in time"))));
    assert!(since.elapsed() >= timeout && since.elapsed() < timeout * 5);
    // The same agent would now answer the line after that with `ok`; a new connection begins anew.
    assert_eq!(client.retire(1), Err(Error::Unknown(Text::of("no answer in time"))));
    assert!(matches!(client.load(), Err(Error::Away(_))), "to load changes nothing");

    for (name, answers) in [
        ("none", vec!["220 mail ready\n"]),
        ("other", vec!["ok store\n", "ok 7\n"]),
        ("long", vec!["ok store\n", "ok ok\nok\n"]),
        ("gone", vec!["ok store\n"]),
    ] {
        let path = dir.path().join(name);
        impostor(&path, answers, Duration::ZERO);
        let mut client = Client::new(&path, uuid(), None, timeout).unwrap();
        let answer = client.replace(1, &body(1));
        assert!(matches!(answer, Err(Error::Unknown(_) | Error::Away(_))), "{name}: {answer:?}");
    }
    let path = dir.path().join("verbose");
    let timeout = TIMEOUT;
    impostor(&path, vec!["ok store\n", "ok\nok\n", "conflict\n"], Duration::ZERO);
    let mut client = Client::new(&path, uuid(), None, timeout).unwrap();
    assert_eq!(client.replace(1, &body(1)), Ok(Replaced::Done));
    // The second `ok` is nobody's.
    assert_eq!(client.replace(2, &body(2)), Ok(Replaced::Done), "on a connection of its own");
}

#[test]
fn an_agent_that_stands_still_with_many_at_its_door_is_away_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("agent");
    // Room for two that wait.
    let listener = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
    bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    listen(&listener, 1).unwrap();
    let answers: Vec<String> = (0..4)
        .map(|_| match Client::new(&path, uuid(), None, Duration::from_millis(50)).unwrap().load() {
            Err(Error::Away(why)) => why.to_string(),
            other => panic!("nobody answers: {other:?}"),
        })
        .collect();
    assert_eq!(answers[..2], ["no answer in time"; 2]);
    assert!(answers[2..].iter().all(|why| why.contains("temporarily unavailable")), "{answers:?}");
}
