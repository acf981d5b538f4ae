//! The agent beside a TPM in software, swtpm, on this machine.

mod server;
#[path = "../../../tests/support.rs"]
mod support;

use server::Tpm;
use std::{
    collections::HashSet,
    fs::{self, File},
    os::unix::net::UnixDatagram,
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};
use support::{LIMIT, Process, UUID, client, refused, until_answered};
use ublk_anchor_protocol::{Client, Error, Incremented, Replaced, Secret, Uuid, message::Shape};

const AGENT: &str = env!("CARGO_BIN_EXE_ublk-anchor-tpm");

/// An authorization counter index as ours are, in tpm2-tools' words. Not orderly.
const ATTRIBUTES: &str = "authwrite|nt=0x1|authread|no_da";

fn secret() -> Option<Secret> {
    Some(Secret([7; Secret::BYTES]))
}

#[test]
fn a_counter_counts_and_its_secret_is_asked_for() {
    let Some(mut tpm) = Tpm::start() else { return };
    let (mut agent, mut client) = tpm.agent("agent", &[]);
    assert_eq!(client.shape(), Ok(Shape::Counter));
    assert_eq!(until_answered(|| client.read()), None);
    assert_eq!(client.increment(0), Ok(Incremented::Absent));
    let Ok(Incremented::Done(first)) = client.init_counter() else { panic!("a counter") };
    assert_eq!(client.init_counter(), Ok(Incremented::Conflict));
    assert_eq!(client.increment(first - 1), Ok(Incremented::Conflict));
    assert_eq!(client.increment(first), Ok(Incremented::Done(first + 1)));
    assert_eq!(client.increment(first), Ok(Incremented::Conflict));
    assert_eq!(client.read(), Ok(Some(first + 1)));
    // The attributes are those that we want, no others, and the index is where its UUID points to.
    assert_eq!(tpm.indices(), ["0x1805a5a"]);
    let public = tpm.tool("tpm2_nvreadpublic 0x1805a5a");
    assert!(public.contains(&format!("friendly: {ATTRIBUTES}|written\n")), "{public}");

    let with = |secret| Client::new(&tpm.path("agent"), UUID, secret, LIMIT).unwrap();
    let wrong = with(Some(Secret([8; Secret::BYTES]))).read();
    assert!(matches!(wrong, Err(Error::Refused(_))), "{wrong:?}");
    assert!(matches!(with(Some(Secret([8; Secret::BYTES]))).increment(first + 1), Err(Error::Refused(_))));
    assert!(matches!(with(None).read(), Err(Error::Refused(why)) if why.as_str().contains("a secret is needed")));
    // A wrong secret locks nobody out.
    for _ in 0..40 {
        assert!(with(Some(Secret([8; Secret::BYTES]))).read().is_err());
    }
    assert_eq!(client.read(), Ok(Some(first + 1)));

    // What is acknowledged is there after all have been killed, exactly: the index is not orderly.
    agent.kill();
    tpm.restart();
    let (_agent, mut client) = tpm.agent("agent", &[]);
    assert_eq!(until_answered(|| client.read()), Some(first + 1));
    // With a secret of the agent's own none is wanted.
    fs::write(tpm.path("secret"), format!("{}\n", "07".repeat(Secret::BYTES))).unwrap();
    let file = tpm.path("secret").into_os_string().into_string().unwrap();
    let (_other, mut other) = tpm.agent("other", &["--secret-file", &file]);
    assert_eq!(other.read(), Ok(Some(first + 1)));
    assert_eq!(with_socket(&tpm.path("other")).read(), Ok(Some(first + 1)));
}

fn with_socket(socket: &Path) -> Client {
    Client::new(socket, UUID, None, LIMIT).unwrap()
}

#[test]
fn nothing_brings_a_counter_back() {
    let Some(tpm) = Tpm::start() else { return };
    let (_agent, mut client) = tpm.agent("agent", &[]);
    assert_eq!(until_answered(|| client.read()), None);
    let (mut highest, mut eras) = (0, Vec::new());
    let mut count = |client: &mut Client| {
        assert_eq!((client.read(), client.era()), (Ok(None), Ok(None)));
        let Ok(Incremented::Done(first)) = client.init_counter() else { panic!("a counter") };
        assert!(first > highest, "{first} after {highest}");
        highest = first;
        for _ in 0..3 {
            assert_eq!(client.increment(highest), Ok(Incremented::Done(highest + 1)));
            highest += 1;
        }
        // It is another counter each time.
        eras.push(client.era().unwrap().unwrap());
        assert_eq!(client.era(), Ok(eras.last().copied()));
        (highest, eras.clone())
    };
    let (value, _) = count(&mut client);
    // Retired.
    assert_eq!(client.retire(value - 1), Ok(Replaced::Conflict));
    assert_eq!(client.retire(value), Ok(Replaced::Done));
    assert_eq!(client.retire(value), Ok(Replaced::Absent));
    // Removed by the owner.
    count(&mut client);
    tpm.tool("tpm2_nvundefine -C o 0x1805a5a");
    // The TPM cleared.
    count(&mut client);
    tpm.tool("tpm2_clear -c p");
    let (_, eras) = count(&mut client);
    assert!(eras.iter().all(|era| *era != 0) && eras.iter().collect::<HashSet<_>>().len() == 4, "{eras:?}");

    // The owner makes something else of it: an ordinary index with an old value, and our name on it.
    fs::write(tpm.path("policy"), [b"ublk-integrity 1".as_slice(), &UUID.0].concat()).unwrap();
    fs::write(tpm.path("old"), 2_u64.to_be_bytes()).unwrap();
    let ordinary = ATTRIBUTES.replace("nt=0x1|", "");
    let password = format!("hex:{}", "07".repeat(Secret::BYTES));
    tpm.tool("tpm2_nvundefine -C o 0x1805a5a");
    tpm.tool(&format!("tpm2_nvdefine 0x1805a5a -C o -s 8 -a {ordinary} -L policy -p {password}"));
    tpm.tool(&format!("tpm2_nvwrite 0x1805a5a -C 0x1805a5a -P {password} -i old"));
    assert!(matches!(client.read(), Err(Error::Refused(why)) if why.as_str().contains("is no counter")));
    assert!(matches!(client.init_counter(), Err(Error::Refused(_))));
    // An orderly counter, which forgets in a power cut.
    tpm.tool("tpm2_nvundefine -C o 0x1805a5a");
    tpm.tool(&format!("tpm2_nvdefine 0x1805a5a -C o -s 8 -a {ATTRIBUTES}|orderly -L policy -p {password}"));
    assert!(matches!(client.init_counter(), Err(Error::Refused(why)) if why.as_str().contains("is no counter")));
    // A counter as ours are, whose secret is another one.
    tpm.tool("tpm2_nvundefine -C o 0x1805a5a");
    tpm.tool(&format!("tpm2_nvdefine 0x1805a5a -C o -s 8 -a {ATTRIBUTES} -L policy -p other"));
    tpm.tool("tpm2_nvincrement 0x1805a5a -C 0x1805a5a -P other");
    assert!(matches!(client.read(), Err(Error::Refused(why)) if why.as_str().contains("reading the counter")));
    // Two of them.
    tpm.tool(&format!("tpm2_nvdefine 0x1800001 -C o -s 8 -a {ATTRIBUTES} -L policy -p other"));
    assert!(matches!(client.read(), Err(Error::Refused(why)) if why.as_str().contains("another one")));
    tpm.tool("tpm2_nvundefine -C o 0x1800001");
    tpm.tool("tpm2_nvundefine -C o 0x1805a5a");

    // Others' indices in our place are left alone, and an `init` that was cut short is gone on with.
    tpm.tool(&format!("tpm2_nvdefine 0x1805a5a -C o -s 8 -a {ordinary} -p other"));
    tpm.tool(&format!("tpm2_nvdefine 0x1805a5b -C o -s 8 -a {ATTRIBUTES} -L policy -p {password}"));
    let (highest, eras) = count(&mut client);
    assert_eq!(eras.last(), Some(&0), "it was made before there were eras");
    assert_eq!(tpm.indices(), ["0x1805a5a", "0x1805a5b"]);
    assert_eq!(client.retire(highest), Ok(Replaced::Done));
    let Ok(Incremented::Done(next)) = client.init_counter() else { panic!("a counter") };
    assert!(next > highest);
    assert_eq!(tpm.indices(), ["0x1805a5a", "0x1805a5b"]);
}

/// Increments a counter from `at`, and does what the protocol says where the outcome is not known: it
/// was sent so many times already.
fn increment_surely(client: &mut Client, at: u64, mut sent: u32) {
    loop {
        if sent > 0 {
            match until_answered(|| client.read()) {
                Some(value) if value == at + 1 => return,
                Some(value) if value == at => {}
                other => panic!("{other:?} instead of {at} or the next one"),
            }
        }
        match client.increment(at) {
            Ok(Incremented::Done(value)) if value == at + 1 => return,
            // One of two that were sent.
            Ok(Incremented::Conflict) if sent > 0 => {}
            Ok(other) => panic!("{other:?} after {at}, sent {sent} times before"),
            Err(Error::Away(_)) => continue,
            Err(Error::Unknown(_)) => {}
            Err(e @ Error::Refused(_)) => panic!("{e}"),
        }
        sent += 1;
    }
}

/// The first value of a new counter, however long that takes.
fn begun(client: &mut Client) -> u64 {
    loop {
        if let Some(first) = until_answered(|| client.read()) {
            return first;
        }
        let _ = client.init_counter();
    }
}

/// What stops or kills the TPM or the agent between a request and its answer leaves the value of
/// before or the next one, and a request that is sent again is done once.
#[test]
fn an_increment_is_done_once_whatever_stops_in_the_middle() {
    let Some(mut tpm) = Tpm::start() else { return };
    let (mut agent, mut client) = tpm.agent_for_an_impatient("agent");
    let mut at = begun(&mut client);
    for round in 0..10 {
        for _ in 0..5 {
            increment_surely(&mut client, at, 0);
            at += 1;
        }
        match round % 5 {
            0 | 1 => tpm.process.stop(),
            2 => agent.stop(),
            3 => tpm.process.kill(),
            _ => agent.kill(),
        }
        let since = Instant::now();
        let answer = client.increment(at);
        let took = since.elapsed();
        assert!(answer.is_err() && took < Duration::from_secs(10), "round {round}: {answer:?} after {took:?}");
        assert_eq!(matches!(answer, Err(Error::Unknown(_))), round % 5 < 4, "round {round}: {answer:?}");
        match round % 5 {
            0 => tpm.process.go_on(),
            2 => agent.go_on(),
            1 | 3 => tpm.restart(),
            _ => (agent, client) = tpm.agent_for_an_impatient("agent"),
        }
        increment_surely(&mut client, at, 1);
        at += 1;
    }
    assert_eq!(client.read(), Ok(Some(at)));
}

#[test]
fn a_client_goes_on_while_the_tpm_is_killed_at_random_moments() {
    let Some(mut tpm) = Tpm::start() else { return };
    let (_agent, mut client) = tpm.agent_for_an_impatient("agent");
    let first = begun(&mut client);
    let counting = thread::spawn(move || {
        let (since, mut at) = (Instant::now(), first);
        while since.elapsed() < Duration::from_secs(5) {
            increment_surely(&mut client, at, 0);
            at += 1;
        }
        (at, client)
    });
    for moment in [37, 411, 113, 29, 250, 7, 71] {
        thread::sleep(Duration::from_millis(moment));
        tpm.restart();
        thread::sleep(Duration::from_millis(100));
        tpm.process.stop();
        thread::sleep(Duration::from_millis(moment));
        tpm.process.go_on();
    }
    let (at, mut client) = counting.join().unwrap();
    assert_eq!(until_answered(|| client.read()), Some(at));
    assert!(at > first + 20, "it has gone on: from {first} to {at}");
}

#[test]
fn a_days_increments_are_not_exceeded() {
    let Some(tpm) = Tpm::start() else { return };
    let (_agent, mut client) = tpm.agent("agent", &["--wear-limit", "3"]);
    let first = begun(&mut client);
    assert_eq!(client.increment(first), Ok(Incremented::Done(first + 1)));
    // Nothing is taken for what is not done.
    assert_eq!(client.increment(first), Ok(Incremented::Conflict));
    assert_eq!(client.increment(first + 1), Ok(Incremented::Done(first + 2)));
    let answer = client.increment(first + 2);
    assert!(matches!(answer, Err(Error::Unknown(why)) if why.as_str().contains("--wear-limit")), "{answer:?}");
    assert_eq!(client.read(), Ok(Some(first + 2)));
}

#[test]
fn the_owners_password_is_asked_for_at_the_beginning_and_the_end() {
    let Some(tpm) = Tpm::start() else { return };
    let (_agent, mut client) = tpm.agent("agent", &[]);
    until_answered(|| client.read());
    tpm.tool("tpm2_changeauth -c owner strong");
    assert!(matches!(client.init_counter(), Err(Error::Refused(why)) if why.as_str().contains("owner's password")));
    assert_eq!(client.read(), Ok(None));
    let password = tpm.path("password").into_os_string().into_string().unwrap();
    let (_with, mut with) = tpm.agent("with", &["--owner-auth-file", &password]);
    assert!(matches!(with.init_counter(), Err(Error::Refused(why)) if why.as_str().contains("can't be read")));
    fs::write(&password, "strong\n").unwrap();
    let first = begun(&mut with);
    assert_eq!(client.increment(first), Ok(Incremented::Done(first + 1)), "nobody needs it in between");
    assert!(matches!(client.retire(first + 1), Err(Error::Refused(_))));
    assert_eq!(client.read(), Ok(Some(first + 1)));
    assert_eq!(with.retire(first + 1), Ok(Replaced::Done));
}

#[test]
fn a_full_tpm_says_so_and_the_counters_that_it_has_go_on() {
    let Some(tpm) = Tpm::start() else { return };
    let (_agent, mut client) = tpm.agent("agent", &["--wear-limit", "0"]);
    let first = begun(&mut client);
    let mut number = 0x1800000;
    // What is kept for counters comes last.
    for (size, kind) in [(2048, "0x0"), (128, "0x0"), (8, "0x0"), (8, "0x1")] {
        let define = |number| format!("tpm2_nvdefine {number:#x} -C o -s {size} -a authread|authwrite|nt={kind}");
        while tpm.try_tool(&define(number)).status.success() {
            number += 1;
        }
    }
    let mut another = Client::new(&tpm.path("agent"), Uuid([1; 16]), secret(), LIMIT).unwrap();
    let full = another.init_counter();
    assert!(matches!(full, Err(Error::Refused(why)) if why.as_str().contains("insufficient space")), "{full:?}");
    assert_eq!(client.increment(first), Ok(Incremented::Done(first + 1)));
}

/// Needs no TPM: one is asked when somebody asks the agent.
#[test]
fn a_service_manager_is_told_and_memory_is_locked() {
    let dir = tempfile::tempdir().unwrap();
    let (notify, said) = (dir.path().join("notify"), dir.path().join("said"));
    let manager = UnixDatagram::bind(&notify).unwrap();
    manager.set_read_timeout(Some(LIMIT)).unwrap();
    let mut command = Command::new(AGENT);
    command.arg("--socket").arg(dir.path().join("agent")).env("NOTIFY_SOCKET", &notify);
    let agent =
        Process::start(command.args(["--tcti", "device:/nowhere"]).stderr(File::create(&said).unwrap())).unwrap();
    let mut heard = [0; 64];
    let length = manager.recv(&mut heard).unwrap();
    assert_eq!(&heard[..length], b"READY=1");
    let mut client = client(&dir.path().join("agent"), secret(), LIMIT);
    assert!(matches!(client.read(), Err(Error::Away(why)) if why.as_str().contains("can't be reached")));
    // Each step is done, or said to have failed.
    let said = fs::read_to_string(&said).unwrap();
    assert!(said.contains("at start: the TPM can't be reached"), "{said}");
    let locked = agent.status("VmLck").split_whitespace().next().unwrap().parse::<u64>().unwrap();
    assert_eq!(said.contains("mlockall"), locked == 0, "{locked} KiB; {said}");
    let score = agent.file("oom_score_adj");
    assert_eq!(said.contains("oom_score_adj"), score.trim() != "-1000", "{score}; {said}");
}

#[test]
fn bad_arguments_are_told_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let short = dir.path().join("short");
    fs::write(&short, "07").unwrap();
    let short = short.to_str().unwrap();
    for (code, arguments, word) in [
        (1, &[][..], "--socket"),
        (1, &["--socket", "s", "--tcti", "nothing"], "nothing"),
        (1, &["--socket", "s", "--wear-limit", "-1"], "-1"),
        (1, &["--socket", "s", "--secret-file", "/nowhere"], "/nowhere"),
        (1, &["--socket", "s", "--secret-file", short], short),
        (1, &["--socket", "s", "more"], "more"),
        (4, &["--socket", "/nowhere/s"], "/nowhere/s"),
    ] {
        let (exit, said) = refused(AGENT, arguments);
        assert!(
            exit == code && said.starts_with("ublk-anchor-tpm: ") && said.contains(word),
            "{arguments:?}: {exit}, {said}"
        );
    }
}
