//! `doctor`: what this machine has of what the program needs, and what to do about the rest.

use super::session;
use crate::{
    boot::table::{TABLE, Table},
    daemon,
    event_loop::OwnRing,
    failure::{Exit, Failure, Outcome, no_ring, plain},
    os,
    output::Output,
    size::Size,
    ublk,
    watch::{
        health::{self, Health},
        survey,
    },
};
use nix::{
    libc::RLIM_INFINITY,
    sys::resource::{Resource, getrlimit},
};
use serde::Serialize;
use std::{env, fs, io::ErrorKind, path::Path};

/// Say what this machine has of what serving devices takes, and what to do about the rest
#[derive(clap::Args)]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What was looked at.
#[derive(Serialize)]
struct Finding {
    what: &'static str,
    state: State,
    /// What is there, or missing.
    found: String,
    /// What to do.
    remedy: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
enum State {
    Ok,
    /// It works without, but less well.
    Note,
    /// No device can be served like this, or one is not well.
    Bad,
}

#[derive(Serialize)]
struct Report<'f> {
    findings: &'f [Finding],
}

pub fn run(args: &Args) -> Outcome {
    let root = Path::new("/");
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let findings = [
        kernel(&release),
        configuration(&root.join("boot").join(format!("config-{}", release.trim()))),
        driver(),
        // Before there is a ring: they are asked for by another process.
        features(driver_features()),
        io_uring(),
        locked_memory(),
        processor(&processor_features()),
        wipefs(env::var_os("PATH").iter().flat_map(env::split_paths).any(|folder| folder.join("wipefs").exists())),
        installed(root, "udev rules", "udev/rules.d/61-ublk-integrity.rules", "run/udev/control"),
        installed(
            root,
            "systemd's generator",
            "systemd/system-generators/ublk-integrity-generator",
            "run/systemd/system",
        ),
        installed(root, "units", "systemd/system/ublk-integrity-monitor.service", "run/systemd/system"),
        group(&fs::read_to_string("/etc/group").unwrap_or_default()),
        table(Path::new(TABLE)),
        devices(),
        sessions(&in_sessions()),
    ];
    let out = if args.json { Output::json(&Report { findings: &findings }) } else { lines(&findings) };
    let bad = findings.iter().filter(|finding| finding.state == State::Bad).count();
    let verdict = match bad {
        0 => Ok(()),
        _ => {
            Err(Failure::new(Exit::Device, format_args!("{bad} of {} things are not as they must be", findings.len())))
        }
    };
    out.print_with(verdict)
}

fn lines(findings: &[Finding]) -> Output {
    let mut out = Output::new();
    for Finding { what, state, found, remedy } in findings {
        let mark = match state {
            State::Ok => "ok  ",
            State::Note => "note",
            State::Bad => "BAD ",
        };
        let remedy = remedy.as_ref().map_or_else(String::new, |remedy| format!(": {remedy}"));
        out.line(format_args!("{mark}  {what:<20}{found}{remedy}"));
    }
    out
}

impl Finding {
    fn new(what: &'static str, state: State, found: impl ToString) -> Self {
        Self { what, state, found: found.to_string(), remedy: None }
    }

    fn but(self, remedy: impl ToString) -> Self {
        Self { remedy: Some(remedy.to_string()), ..self }
    }
}

fn kernel(release: &str) -> Finding {
    let release = release.trim();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|number| number.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let found = |state| Finding::new("kernel", state, format_args!("Linux {release}"));
    match version {
        (6, 1..) | (7.., _) if version >= (6, 16) => found(State::Ok),
        (6, 5..) => found(State::Ok).but("from 6.16 on threads can share a queue"),
        (6, 1..) => found(State::Note).but("before 6.5 no write is answered before it is in place"),
        _ => found(State::Bad).but("devices are served from 6.1 on; the other commands work from 5.19 on"),
    }
}

fn driver() -> Finding {
    match ublk::need_driver() {
        Ok(()) => Finding::new("ublk", State::Ok, "the driver is there"),
        Err(failure) => Finding::new("ublk", State::Bad, failure),
    }
}

/// What the kernel was built with, where its distribution says so.
fn configuration(path: &Path) -> Finding {
    const NEEDED: [&str; 2] = ["CONFIG_BLK_DEV_UBLK", "CONFIG_IO_URING"];
    let Ok(text) = fs::read_to_string(path) else {
        return Finding::new("configuration", State::Ok, format_args!("not known: no {}", path.display()));
    };
    let is_set = |name: &str| {
        let values = text.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        values.into_iter().any(|value| matches!(value, "y" | "m"))
    };
    match NEEDED.iter().find(|name| !is_set(name)) {
        None => Finding::new("configuration", State::Ok, NEEDED.join(", ")),
        // It may be a module of somebody else's: the driver decides.
        Some(name) => {
            Finding::new("configuration", State::Note, format_args!("{name} is not set in {}", path.display()))
                .but("devices can't be served by a kernel without it")
        }
    }
}

/// What the driver can do besides: whether threads share a queue, and whether a device grows in use. Or why that isn't known.
fn driver_features() -> Result<(bool, bool), &'static str> {
    match ublk::need_driver() {
        Err(_) => Err("there is none to ask"),
        Ok(()) if !ublk::may_be_asked() => Err("what it can is told to root alone"),
        Ok(()) => Ok((ublk::shares_queues(), ublk::resizes_in_use())),
    }
}

fn features(can: Result<(bool, bool), &str>) -> Finding {
    let new = |state, found| Finding::new("driver", state, found);
    match can {
        Err(why) => new(State::Ok, why),
        Ok((true, true)) => new(State::Ok, "threads share a queue, devices grow in use"),
        Ok((shares, _)) => new(
            State::Note,
            if shares { "no device grows in use" } else { "no threads share a queue, and no device grows in use" },
        )
        .but("Linux 6.16 can"),
    }
}

/// What a daemon has is locked, so that it never waits for swap.
fn locked_memory() -> Finding {
    let limit = getrlimit(Resource::RLIMIT_MEMLOCK).map_or(RLIM_INFINITY, |(soft, _)| soft);
    locked_memory_within(limit, &fs::read_to_string("/proc/self/status").unwrap_or_default())
}

fn locked_memory_within(limit: u64, status: &str) -> Finding {
    let new = |state, found: String| Finding::new("locked memory", state, found);
    match limit {
        _ if os::may_lock(status) => new(State::Ok, "as much as there is".into()),
        RLIM_INFINITY => new(State::Ok, "no limit".into()),
        limit => new(State::Note, format!("{} for who asks here", Size(limit)))
            .but("root has no limit, nor has a unit with LimitMEMLOCK=infinity"),
    }
}

/// Instructions of which tags are made faster: what they are called, and whether the processor has them.
fn processor_features() -> Vec<(&'static str, bool)> {
    #[cfg(target_arch = "x86_64")]
    let all = vec![
        ("SHA", is_x86_feature_detected!("sha")),
        ("AVX2", is_x86_feature_detected!("avx2")),
        ("AES", is_x86_feature_detected!("aes")),
    ];
    #[cfg(target_arch = "aarch64")]
    let all = vec![
        ("SHA2", std::arch::is_aarch64_feature_detected!("sha2")),
        ("AES", std::arch::is_aarch64_feature_detected!("aes")),
    ];
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let all = Vec::new();
    all
}

fn processor(features: &[(&str, bool)]) -> Finding {
    let names = |wanted| {
        let named = features.iter().filter(move |(_, has)| *has == wanted).map(|(name, _)| *name);
        named.collect::<Vec<_>>().join(", ")
    };
    match (names(true), names(false)) {
        (has, lacks) if lacks.is_empty() => Finding::new("processor", State::Ok, has),
        (_, lacks) => Finding::new("processor", State::Note, format_args!("no {lacks}"))
            .but("tags take more time: `benchmark` says how much with each algorithm"),
    }
}

fn io_uring() -> Finding {
    match OwnRing::new(Vec::new()) {
        Ok(_) => Finding::new("io_uring", State::Ok, "it is there"),
        Err(e) => Finding::new("io_uring", State::Bad, no_ring(&e)),
    }
}

fn wipefs(is_there: bool) -> Finding {
    match is_there {
        true => Finding::new("wipefs", State::Ok, "`format` can tell what a device holds"),
        false => Finding::new("wipefs", State::Note, "not in PATH")
            .but("without it only `format --force` formats; it is in util-linux"),
    }
}

/// Something that a package installs where there is who reads it.
fn installed(root: &Path, what: &'static str, file: &str, reader: &str) -> Finding {
    if !root.join(reader).exists() {
        return Finding::new(what, State::Ok, "nobody here reads any");
    }
    let places = ["usr/lib", "lib", "usr/local/lib", "etc"];
    match places.iter().map(|place| root.join(place).join(file)).find(|path| path.exists()) {
        Some(path) => Finding::new(what, State::Ok, path.display()),
        None => Finding::new(what, State::Note, "not installed").but("scripts/install or the Debian package brings it"),
    }
}

fn group(file: &str) -> Finding {
    match file.lines().any(|line| line.starts_with("ublk-integrity:")) {
        true => Finding::new("group", State::Ok, "members of ublk-integrity may ask the daemons"),
        false => Finding::new("group", State::Note, "only root may ask the daemons")
            .but("`groupadd --system ublk-integrity` lets others, and counts for devices that are added then"),
    }
}

fn table(path: &Path) -> Finding {
    let shown = path.display();
    match fs::read(path).map(|bytes| Table::parse(&bytes)) {
        Ok(table) => match table.bad.first() {
            None => Finding::new("table", State::Ok, format_args!("{shown} has {} volumes", table.entries.len())),
            Some(bad) => Finding::new("table", State::Bad, format_args!("{shown}: {bad}")),
        },
        Err(e) if e.kind() == ErrorKind::NotFound => Finding::new("table", State::Ok, format_args!("no {shown}")),
        Err(e) => Finding::new("table", State::Bad, format_args!("can't read {shown}: {}", plain(&e))),
    }
}

fn devices() -> Finding {
    let health: Vec<_> = survey::all_settled().iter().map(Health::of).collect();
    let ill = health.iter().filter(|health| **health != Health::Ok).count();
    match health::worst(&health) {
        None => Finding::new("devices", State::Ok, format_args!("{}, all ok", health.len())),
        Some(_) => Finding::new("devices", State::Bad, format_args!("{ill} of {} not ok", health.len()))
            .but("`ublk-integrity status -x` says which"),
    }
}

/// Daemons that end with somebody's session, each as number and session.
fn in_sessions() -> Vec<(u32, String)> {
    let alive = daemon::state::State::all().into_iter().filter(|state| state.is_alive());
    alive.filter_map(|state| Some((state.id, session::of(state.pid)?))).collect()
}

fn sessions(in_sessions: &[(u32, String)]) -> Finding {
    let new = |state, found: String| Finding::new("sessions", state, found);
    match in_sessions.first() {
        None => new(State::Ok, "no daemon ends with a login session".into()),
        Some((id, session)) => {
            let count = in_sessions.len();
            let found = format!("{count} of the daemons are in login sessions, that of /dev/ublkb{id} in {session}");
            new(State::Note, found).but(format!(
                "a shutdown may kill it below a mounted file system; `upgrade -n {id}` takes it out of there"
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_judged_by_its_version() {
        for (release, state) in [
            ("6.16.3+deb13-amd64\n", State::Ok),
            ("7.0.0-rc1", State::Ok),
            ("6.12.41", State::Ok),
            ("6.1.0-40-amd64", State::Note),
            ("5.19.0", State::Bad),
            ("6.0.1", State::Bad),
            ("", State::Bad),
        ] {
            assert_eq!(kernel(release).state, state, "{release}");
        }
        assert!(kernel("6.16.0").remedy.is_none() && kernel("6.12.0").remedy.is_some());
    }

    #[test]
    fn what_is_missing_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config");
        assert_eq!(configuration(&path).state, State::Ok, "not everybody leaves one there");
        fs::write(&path, "CONFIG_IO_URING=y\n# CONFIG_BLK_DEV_UBLK is not set\nCONFIG_BLK_DEV_UBLK_X=y\n").unwrap();
        assert!(
            configuration(&path).state == State::Note && configuration(&path).found.contains("CONFIG_BLK_DEV_UBLK ")
        );
        fs::write(&path, "CONFIG_IO_URING=y\nCONFIG_BLK_DEV_UBLK=m\n").unwrap();
        assert_eq!(configuration(&path).state, State::Ok);
        for (can, state) in [((true, true), State::Ok), ((true, false), State::Note)] {
            assert_eq!(features(Ok(can)).state, state);
        }
        assert!(features(Ok((false, false))).found.contains("share"));
        assert_eq!(features(Err("root alone")).state, State::Ok, "nothing is known to be missing");
        let (user, root) = ("CapEff:\t0000000000000000\n", "CapEff:\t000001ffffffffff\n");
        assert_eq!(locked_memory_within(8 << 20, root).state, State::Ok);
        assert_eq!(locked_memory_within(RLIM_INFINITY, user).state, State::Ok);
        assert!(locked_memory_within(8 << 20, user).found.starts_with("8.00 MiB"));
        assert_eq!(processor(&[("SHA", true), ("AVX2", true)]).found, "SHA, AVX2");
        assert_eq!(processor(&[("SHA", false), ("AVX2", true)]).found, "no SHA");
    }

    #[test]
    fn a_daemon_that_ends_with_a_session_is_named() {
        assert_eq!(sessions(&[]).state, State::Ok);
        let note = sessions(&[(3, "session-1.scope".into()), (4, "session-2.scope".into())]);
        assert!(note.state == State::Note && note.found.contains("2 of the daemons"), "{}", note.found);
        assert!(note.found.contains("/dev/ublkb3 in session-1.scope"), "{}", note.found);
        assert!(note.remedy.is_some_and(|remedy| remedy.contains("`upgrade -n 3`")));
    }

    #[test]
    fn what_nobody_reads_need_not_be_there() {
        let root = tempfile::tempdir().unwrap();
        let look = || installed(root.path(), "rules", "udev/rules.d/x.rules", "run/udev/control");
        assert_eq!(look().state, State::Ok);
        fs::create_dir_all(root.path().join("run/udev")).unwrap();
        fs::write(root.path().join("run/udev/control"), "").unwrap();
        assert!(look().state == State::Note && look().remedy.is_some());
        fs::create_dir_all(root.path().join("usr/local/lib/udev/rules.d")).unwrap();
        fs::write(root.path().join("usr/local/lib/udev/rules.d/x.rules"), "").unwrap();
        assert!(look().state == State::Ok && look().found.ends_with("usr/local/lib/udev/rules.d/x.rules"));
    }

    #[test]
    fn a_bad_line_of_the_table_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tab");
        assert_eq!(table(&path).state, State::Ok);
        fs::write(&path, "home /dev/a\n").unwrap();
        assert!(table(&path).found.ends_with("tab has 1 volumes"));
        fs::write(&path, "home /dev/a\nwrong\n").unwrap();
        assert!(table(&path).state == State::Bad && table(&path).found.contains("line 2"));
        assert_eq!(
            (group("root:x:0:\nublk-integrity:x:9:").state, group("ublk-integrity2:x:9:").state),
            (State::Ok, State::Note)
        );
    }
}
