//! Certificates and roles.

use crate::{
    AGENT, body,
    server::Etcd,
    support::{LIMIT, Process, client, until_answered},
};
use std::{fs, path::Path, process::Command};
use ublk_anchor_protocol::{Error, Replaced};

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
    let document = include_str!("../../../../../docs/anchor-agents.md");
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
