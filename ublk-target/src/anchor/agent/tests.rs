use super::*;
use crate::{
    anchor::asked,
    device::{Backings, Use},
};
use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixListener,
    thread,
};

const VOLUME: [u8; 16] = [1; 16];
const SOON: Duration = Duration::from_millis(300);

fn body(generation: u64, fill: u8) -> AnchorBytes {
    let mut body = [fill; 512];
    body[32..40].copy_from_slice(&generation.to_le_bytes());
    body[336..344].fill(0);
    body
}

/// An agent that answers the lines that come by `answers`, one after the other, over as many connections as it takes. An
/// answer is a text, or where it begins with a number so many milliseconds late. `-`: none, and the connection ends.
fn agent(answers: &'static [&'static str]) -> (tempfile::TempDir, AgentAnchor, thread::JoinHandle<Vec<String>>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let served = thread::spawn(move || {
        let (mut asked, mut answers) = (Vec::new(), answers.iter());
        'connections: while let Ok((mut stream, _)) = listener.accept() {
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
            while let Some(Ok(line)) = lines.next() {
                asked.push(line);
                let Some(answer) = answers.next() else { break 'connections };
                if *answer == "-" {
                    continue 'connections;
                }
                let (late, text) = match answer.split_once("ms ") {
                    Some((late, text)) => (late.parse().unwrap(), text),
                    None => (0, *answer),
                };
                thread::sleep(Duration::from_millis(late));
                let _ = stream.write_all(format!("{text}\n").as_bytes());
                if answers.as_slice().is_empty() {
                    break 'connections;
                }
            }
        }
        asked
    });
    (folder, AgentAnchor::at(&path, SOON), served)
}

#[test]
fn a_store_is_asked_line_by_line() {
    let one = body(1, 7);
    let line: &'static str = Box::leak(format!("ok 1 {}", hex(&one)).into_boxed_str());
    let answers: &'static [&str] = Box::leak(vec!["ok store", "absent", "ok", line, "conflict"].into_boxed_slice());
    let (_folder, anchor, served) = agent(answers);
    assert_eq!(asked(anchor.load(&VOLUME)), Ok(Held::Nothing));
    assert_eq!(asked(anchor.replace(&VOLUME, 0, &one)), Replaced::Done);
    assert_eq!(asked(anchor.load(&VOLUME)), Ok(Held::Body(one)));
    assert_eq!(asked(anchor.replace(&VOLUME, 1, &body(2, 8))), Replaced::Conflict);
    let lines = served.join().unwrap();
    assert_eq!(lines[0], "hello 1 01010101-0101-0101-0101-010101010101");
    assert_eq!((lines[1].as_str(), lines[3].as_str()), ("load", "load"));
    assert_eq!(lines[2], format!("init 1 {}", hex(&one)));
    assert_eq!(lines[4], format!("replace 1 {}", hex(&body(2, 8))));
}

/// It keeps what replaces a body as the next one: a body that says otherwise could not be read again.
#[test]
fn a_store_that_holds_something_goes_on_from_there() {
    let (_folder, anchor, served) = agent(&["ok store", "absent"]);
    assert_eq!(asked(anchor.load(&VOLUME)), Ok(Held::Nothing));
    let begin = |held: Held, above| asked(anchor.begin(&VOLUME, &held, above));
    assert_eq!(begin(Held::Body(body(11, 1)), 500), Ok(Beginning { expected: 11, generation: 12, era: 0 }));
    assert_eq!(begin(Held::Nothing, 500), Ok(Beginning { expected: 0, generation: 501, era: 0 }));
    assert!(begin(Held::Body(body(u64::MAX, 1)), 0).unwrap_err().contains("take it away"));
    assert_eq!(served.join().unwrap().len(), 2);
}

#[test]
fn an_answer_that_comes_late_twice_or_never_is_none() {
    // Late: it is not taken for that of the next request, for there is another connection by then.
    let (_folder, anchor, served) = agent(&["ok store", "900ms ok", "ok store", "absent"]);
    let late = asked(anchor.replace(&VOLUME, 1, &body(2, 1)));
    assert!(matches!(&late, Replaced::Unknown(why) if why.contains("in time")), "{late:?}");
    let patient = AgentAnchor { timeout: Duration::from_secs(5), ..anchor };
    assert_eq!(asked(patient.load(&VOLUME)), Ok(Held::Nothing));
    assert_eq!(served.join().unwrap().len(), 4);
    // Twice.
    let (_folder, anchor, served) = agent(&["ok store", "ok\nok", "ok store", "absent"]);
    let twice = asked(anchor.replace(&VOLUME, 1, &body(2, 1)));
    assert!(matches!(&twice, Replaced::Done | Replaced::Unknown(_)), "{twice:?}");
    assert_eq!(asked(anchor.load(&VOLUME)), Ok(Held::Nothing), "the second is not the answer to this");
    drop(served.join());
    // Never.
    let (_folder, anchor, served) = agent(&["ok store", "-", "ok store", "absent"]);
    assert!(matches!(asked(anchor.replace(&VOLUME, 1, &body(2, 1))), Replaced::Unknown(why) if why.contains("closed")));
    assert_eq!(asked(anchor.load(&VOLUME)), Ok(Held::Nothing));
    drop(served.join());
}

#[test]
fn a_counter_is_asked_line_by_line_once_the_volume_is_known() {
    let meta = tempfile::NamedTempFile::new().unwrap();
    meta.as_file().set_len(1 << 20).unwrap();
    let backings = Backings::open(meta.path(), None, Use::Exclusive, Duration::ZERO).unwrap();
    let (_folder, anchor, served) = agent(&[
        "ok counter auth era", // Only to see what it keeps.
        "ok counter auth era",
        "ok",
        "absent",
        "ok 7",
        "ok 77", // Its era.
        "ok 8",
        "ok 8",
        "ok 77",
        "ok 9",
        "ok 9",
        "ok 77",
        "ok 9",
        "ok 9",
        "ok 78", // Of another counter.
        "ok",
        "refused the owner's password",
    ]);
    assert_eq!(anchor.answers(&VOLUME), Ok(()));
    assert!(anchor.is_counter());
    anchor.introduce(&[0xab; 32], MetaDevice::of(&backings).unwrap());
    assert_eq!(asked(anchor.load(&VOLUME)), Ok(Held::Nothing));
    let beginning = asked(anchor.begin(&VOLUME, &Held::Nothing, 100));
    assert_eq!(beginning, Ok(Beginning { expected: 8, generation: 9, era: 77 }), "whatever its first value is");
    let of_era = |mut body: AnchorBytes| {
        body[336..344].copy_from_slice(&77_u64.to_le_bytes());
        body
    };
    assert_eq!(asked(anchor.replace(&VOLUME, 8, &of_era(body(9, 1)))), Replaced::Done);
    assert_eq!(asked(anchor.load(&VOLUME)), Ok(Held::Body(of_era(body(9, 1)))));
    assert_eq!(asked(anchor.replace(&VOLUME, 8, &of_era(body(9, 2)))), Replaced::Conflict);
    assert_eq!(asked(anchor.replace(&VOLUME, 9, &of_era(body(10, 2)))), Replaced::Conflict, "of another counter");
    assert_eq!(asked(anchor.retire(&VOLUME, 9)), Ok(()));
    assert!(asked(anchor.retire(&VOLUME, 9)).unwrap_err().contains("password"));
    let lines = served.join().unwrap();
    assert_eq!(lines[2], format!("auth {}", "ab".repeat(32)));
    let asked_for =
        ["read", "init", "era", "increment 7", "read", "era", "increment 8", "read", "era", "read", "read", "era"];
    assert_eq!(lines[3..15], asked_for);
    assert_eq!(lines[15..], ["retire 9", "retire 9"]);
    let written = std::fs::read(meta.path()).unwrap();
    let places: Vec<usize> = (0..written.len()).filter(|at| written[*at] != 0).collect();
    assert!(places.first() >= Some(&(256 << 10)) && places.last() < Some(&(264 << 10)), "it writes nowhere else");
}

#[test]
fn what_is_behind_an_agent_is_waited_for_where_it_may_come() {
    let (_folder, anchor, served) = agent(&["ok store", "err no member answers", "absent", "refused no body"]);
    assert!(anchor.answers(&VOLUME).unwrap_err().contains("no member"));
    assert_eq!((anchor.answers(&VOLUME), anchor.answers(&VOLUME)), (Ok(()), Ok(())));
    drop(served.join());
    let (_folder, anchor, served) = agent(&["ok counter", "err it is busy", "err it is busy", "ok 3", "err busy"]);
    let anchor = anchor.patient(Duration::from_secs(20));
    anchor.wait_for_counter(&VOLUME);
    // Not without end.
    let anchor = anchor.patient(Duration::ZERO);
    anchor.wait_for_counter(&VOLUME);
    assert_eq!(served.join().unwrap()[1..], ["read"; 4]);
}

#[test]
fn what_is_no_store_is_named() {
    for (answer, word) in [
        ("ok counter auth", "the volume is not known"),
        ("refused this agent speaks version 2 alone", "version 2"),
        ("HTTP/1.1 400", "no agent"),
    ] {
        let answers: &'static [&str] = Box::leak(vec![answer].into_boxed_slice());
        let (_folder, anchor, served) = agent(answers);
        assert!(asked(anchor.load(&VOLUME)).unwrap_err().contains(word), "{answer}");
        drop(served.join());
    }
    let (_folder, anchor, served) = agent(&["ok store", "ok 1 00"]);
    assert!(asked(anchor.load(&VOLUME)).unwrap_err().contains("no body"));
    drop(served.join());
    let nobody = AgentAnchor::at(Path::new("/nonexistent/socket"), SOON);
    assert!(asked(nobody.load(&VOLUME)).unwrap_err().contains("/nonexistent/socket"));
}
