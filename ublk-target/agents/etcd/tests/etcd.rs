//! The agent beside a real etcd of one member on this machine.

#[path = "../../tests/support.rs"]
mod support;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};
use support::{LIMIT, Process, UUID, client, free_ports, refused, until_answered, wait_for};
use tempfile::TempDir;
use ublk_anchor_protocol::{Body, Client, Error, Replaced, message::Shape};

const AGENT: &str = env!("CARGO_BIN_EXE_ublk-anchor-etcd");

fn body(number: u64) -> Body {
    let mut body = Body([0; Body::BYTES]);
    body.0[..8].copy_from_slice(&number.to_le_bytes());
    body
}

/// An etcd, and the folder of all that belongs to it.
struct Etcd {
    process: Process,
    ports: [u16; 2],
    tls: bool,
    dir: TempDir,
}

impl Etcd {
    /// Nothing where it is not installed.
    fn start() -> Option<Self> {
        Self::start_in(tempfile::tempdir().unwrap(), false)
    }

    fn start_in(dir: TempDir, tls: bool) -> Option<Self> {
        let ports = free_ports();
        let process = launch(dir.path(), ports, tls)?;
        Some(Self { process, ports, tls, dir })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn endpoint(&self) -> String {
        format!("{}://localhost:{}", if self.tls { "https" } else { "http" }, self.ports[0])
    }

    fn restart(&mut self) {
        self.process.kill();
        self.process = launch(self.dir.path(), self.ports, self.tls).unwrap();
    }

    /// An agent of it, with a socket of that name, and a client; both wait long.
    fn agent(&self, name: &str, more: &[&str]) -> (Process, Client) {
        self.agent_that_waits(name, LIMIT / 2, more)
    }

    /// Both wait for a second or so: what stops is seen soon. On a busy machine anything may take longer.
    fn impatient_agent(&self, name: &str) -> (Process, Client) {
        self.agent_that_waits(name, Duration::from_secs(1), &[])
    }

    fn agent_that_waits(&self, name: &str, time: Duration, more: &[&str]) -> (Process, Client) {
        let (socket, seconds) = (self.path(name), time.as_secs().to_string());
        let mut command = Command::new(AGENT);
        command.arg("--socket").arg(&socket).args(["--endpoint", &self.endpoint(), "--timeout", &seconds]).args(more);
        let agent = Process::start(&mut command).unwrap();
        (agent, client(&socket, None, time + time / 2))
    }
}

fn launch(dir: &Path, [port, peers]: [u16; 2], tls: bool) -> Option<Process> {
    let mut command = Command::new("etcd");
    let url = format!("{}://127.0.0.1:{port}", if tls { "https" } else { "http" });
    let peers = format!("http://127.0.0.1:{peers}");
    command.arg("--data-dir").arg(dir.join("data")).args([
        "--name",
        "one",
        "--initial-cluster",
        &format!("one={peers}"),
    ]);
    command.args(["--listen-client-urls", &url, "--advertise-client-urls", &url]);
    command.args(["--listen-peer-urls", &peers, "--initial-advertise-peer-urls", &peers]);
    command.args(["--heartbeat-interval", "50", "--election-timeout", "500", "--log-level", "error"]);
    if tls {
        command.arg("--client-cert-auth");
        for (option, file) in
            [("--trusted-ca-file", "ca.crt"), ("--cert-file", "server.crt"), ("--key-file", "server.key")]
        {
            command.arg(option).arg(dir.join(file));
        }
    }
    // Elsewhere than on x86-64 it wants to be told that this is meant.
    command.env("ETCD_UNSUPPORTED_ARCH", std::env::consts::ARCH.replace("aarch64", "arm64"));
    Process::start(command.stderr(Stdio::null()))
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
fn by_tls_both_sides_prove_who_they_are() {
    let dir = tempfile::tempdir().unwrap();
    for authority in ["ca", "other-ca"] {
        openssl(
            dir.path(),
            &format!(
                "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN={authority} -keyout {authority}.key -out {authority}.crt"
            ),
        );
    }
    for (name, authority, extension) in [
        ("server", "ca", "subjectAltName=DNS:localhost"),
        ("agent", "ca", "extendedKeyUsage=clientAuth"),
        ("stranger", "other-ca", "extendedKeyUsage=clientAuth"),
    ] {
        fs::write(dir.path().join("extension"), extension).unwrap();
        openssl(
            dir.path(),
            &format!(
                "req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN={name} -keyout {name}.key -out {name}.csr"
            ),
        );
        openssl(
            dir.path(),
            &format!(
                "x509 -req -in {name}.csr -CA {authority}.crt -CAkey {authority}.key -CAcreateserial -days 2 -extfile extension -out {name}.crt"
            ),
        );
    }
    let Some(etcd) = Etcd::start_in(dir, true) else { return };
    let file = |name: &str| etcd.path(name).into_os_string().into_string().unwrap();
    let with = |ca: &str, name: &str| {
        [
            "--ca".into(),
            file(ca),
            "--cert".into(),
            file(&format!("{name}.crt")),
            "--key".into(),
            file(&format!("{name}.key")),
        ]
    };
    let agent = |socket: &str, arguments: [String; 6]| etcd.agent(socket, &arguments.each_ref().map(String::as_str));

    let (_right, mut right) = agent("right", with("ca.crt", "agent"));
    assert_eq!(until_answered(|| right.load()), None);
    assert_eq!(right.init_store(1, &body(1)), Ok(Replaced::Done));
    assert_eq!(right.replace(1, &body(2)), Ok(Replaced::Done));

    let (_stranger, mut stranger) = agent("stranger", with("ca.crt", "stranger"));
    assert!(matches!(stranger.load(), Err(Error::Away(_))), "etcd does not know it");
    let (_trusting, mut trusting) = agent("trusting", with("other-ca.crt", "agent"));
    let answer = trusting.load();
    assert!(matches!(answer, Err(Error::Away(_))), "it does not know etcd: {answer:?}");
    let (_bare, mut bare) = etcd.agent("bare", &["--ca", &file("ca.crt")]);
    assert!(matches!(bare.load(), Err(Error::Away(_))), "without a certificate");
    // The certificate is of a name, and this is none of its.
    let mut command = Command::new(AGENT);
    let socket = etcd.path("misnamed");
    command.arg("--socket").arg(&socket).arg("--endpoint").arg(format!("https://127.0.0.1:{}", etcd.ports[0]));
    let _misnamed = Process::start(command.args(with("ca.crt", "agent"))).unwrap();
    assert!(matches!(client(&socket, None, LIMIT).load(), Err(Error::Away(_))));
    assert_eq!(right.load(), Ok(Some((2, body(2)))));

    // With roles it writes where it may and nowhere else: the document's commands.
    let document = include_str!("../../../../docs/anchor-agents.md");
    let commands: Vec<&str> = document.lines().filter(|line| line.starts_with("etcdctl ")).collect();
    assert_eq!(commands.len(), 4);
    let root = ["etcdctl user add root --no-password", "etcdctl user grant-role root root", "etcdctl auth enable"];
    for command in commands.into_iter().chain(root) {
        etcdctl(&etcd, command);
    }
    assert_eq!(until_answered(|| right.load()), Some((2, body(2))));
    assert_eq!(right.replace(2, &body(3)), Ok(Replaced::Done));
    let elsewhere = [&with("ca.crt", "agent")[..], &["--prefix".into(), "/elsewhere/".into()]].concat();
    let elsewhere: Vec<&str> = elsewhere.iter().map(String::as_str).collect();
    let (_elsewhere, mut elsewhere) = etcd.agent("elsewhere", &elsewhere);
    let answer = elsewhere.load();
    assert!(matches!(answer, Err(Error::Refused(why)) if why.as_str().contains("permission denied")), "{answer:?}");
    assert!(matches!(elsewhere.init_store(1, &body(1)), Err(Error::Refused(_))));
}

fn etcdctl(etcd: &Etcd, command: &str) {
    let mut words = command.split(' ');
    let mut tool = Command::new(words.next().unwrap());
    tool.args(words).args([
        "--endpoints",
        &etcd.endpoint(),
        "--cacert",
        "ca.crt",
        "--cert",
        "agent.crt",
        "--key",
        "agent.key",
    ]);
    let done = tool.env("ETCDCTL_API", "3").current_dir(etcd.dir.path()).output().expect("etcdctl is installed");
    assert!(done.status.success(), "{command}: {}", String::from_utf8_lossy(&done.stderr));
}

fn openssl(dir: &Path, arguments: &str) {
    let done =
        Command::new("openssl").args(arguments.split(' ')).current_dir(dir).output().expect("openssl is installed");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
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
