//! `monitor`: a program is run for each event, as mdadm --monitor does.

use crate::{
    boot::escape,
    daemon::{
        log::Sink,
        state::{Change, State},
    },
    event::{About, Class, EventFile, Feed, Position, Record},
    failure::{Context, Exit, Failure, Outcome},
    output,
    run_dir::FOLDER,
    ublk,
};
use nix::unistd::geteuid;
use std::{
    collections::HashMap,
    fs,
    io::Write,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Once,
    thread,
    time::{Duration, Instant},
};

/// How often it looks.
const PERIOD: Duration = Duration::from_secs(1);
/// How long a program may take for an event.
const PATIENCE: Duration = Duration::from_secs(60);

/// Run a program for each event of any volume, and for daemons that die
#[derive(clap::Args)]
pub struct Args {
    /// The program: it gets an event in UBLK_EVENT_CLASS, _SEVERITY, _MESSAGE and so on, and as JSON on standard input
    #[arg(long, value_name = "PROGRAM")]
    command: PathBuf,
    /// Run it once for an event of class "test", and exit as it does
    #[arg(long)]
    test: bool,
}

pub fn run(args: &Args) -> Outcome {
    let program = trusted(&args.command)?;
    if args.test {
        return hook(&program, &Record::new(Class::Test, &About::default(), "this is a test of the monitor".into()));
    }
    let folder = Path::new(FOLDER);
    // What was told while no monitor ran, at boot for one, is passed on, too.
    let kept = kept_position(folder, &program);
    let mut position = Position::load(&kept);
    // Who is not root passes events on, and is told once that the next start begins anew.
    let unsaved = Once::new();
    let mut feed = Feed::from(folder, position.clone());
    let (mut watch, sink) = (Deaths::told_in(Feed::of(folder).take()), Sink::foreground());
    loop {
        for death in watch.look(State::all().iter().map(|state| (state, is_left(state)))) {
            EventFile::of(folder, &death.volume).add(&death);
            sink.write(Class::DaemonDied, &death);
        }
        for told in feed.take_told() {
            hook(&program, &told.record).unwrap_or_else(output::warn);
            // After it has ended: one that is killed with us gets the event once more.
            position.note(&told);
            if let Err(failure) = position.save(&kept).doing(format_args!("can't write {}", kept.display())) {
                unsaved.call_once(|| output::warn(failure));
            }
        }
        thread::sleep(PERIOD);
    }
}

/// Where it is kept how far the events have been passed on to this program. In memory, as they are.
fn kept_position(folder: &Path, program: &Path) -> PathBuf {
    folder.join(format!("monitor-{}.position", escape::path(program)))
}

/// A daemon that is dead while its device is there, and nobody is about to follow it.
fn is_left(state: &State) -> bool {
    !state.is_alive() && !Change::is_under_way(state.id) && state.has_device()
}

/// Daemons that have died, each told once.
#[derive(Default)]
struct Deaths {
    /// How often a daemon was found dead.
    found: HashMap<(u32, u32), u32>,
    /// The daemon of each volume whose death was told last, by a monitor before this one.
    told: HashMap<String, u32>,
}

impl Deaths {
    /// With those that were told already.
    fn told_in(events: Vec<Record>) -> Self {
        let deaths = events.into_iter().filter(|event| event.class == Class::DaemonDied.word());
        Self { told: deaths.map(|death| (death.volume, death.pid)).collect(), ..Self::default() }
    }

    /// Those that are found dead for the second time: another may have been about to take its place
    /// at the first.
    fn look<'s>(&mut self, states: impl Iterator<Item = (&'s State, bool)>) -> Vec<Record> {
        let left: Vec<_> = states.filter(|(_, is_left)| *is_left).map(|(state, _)| state).collect();
        self.found.retain(|daemon, _| left.iter().any(|state| (state.id, state.pid) == *daemon));
        let mut dead = Vec::new();
        for state in left {
            let found = self.found.entry((state.id, state.pid)).or_default();
            *found = found.saturating_add(1);
            if *found == 2 && self.told.remove(&state.volume.uuid) != Some(state.pid) {
                dead.push(death(state));
            }
        }
        dead
    }
}

fn death(state: &State) -> Record {
    let about = About {
        volume: state.volume.uuid.clone(),
        name: state.settings.name.as_ref().map(|name| name.as_str().to_owned()),
        data: state.settings.data.display().to_string(),
        pid: state.pid,
    };
    let (device, remedy) = (ublk::block_path(state.id), state.remedy());
    let message = format!("the daemon of {} (pid {}) is dead: {remedy}", device.display(), state.pid);
    Record::new(Class::DaemonDied, &about, message)
}

/// Refuses a program that others could change: it runs as whoever runs the monitor.
fn trusted(program: &Path) -> Outcome<PathBuf> {
    let shown = program.display();
    let path = program.canonicalize().doing(format_args!("can't run {shown}"))?;
    let meta = fs::metadata(&path).doing(format_args!("can't run {shown}"))?;
    if !meta.is_file() || meta.permissions().mode() & 0o111 == 0 {
        return Err(Failure::new(
            Exit::Arguments,
            format_args!("{shown} is no program: --command names a file that can be executed"),
        ));
    }
    if meta.permissions().mode() & 0o022 != 0 || ![0, geteuid().as_raw()].contains(&meta.uid()) {
        let message = format!("{shown} is not run: others can change it; `chown root {shown}; chmod go-w {shown}`");
        return Err(Failure::new(Exit::KeyOrPermission, message));
    }
    Ok(path)
}

/// Runs it for one event.
fn hook(program: &Path, record: &Record) -> Outcome {
    let what = format!("{} for event {}", program.display(), record.class);
    let number = |number: Option<u64>| number.map(|number| number.to_string()).unwrap_or_default();
    let mut child = Command::new(program)
        .env("UBLK_EVENT_TIME", &record.time)
        .env("UBLK_EVENT_CLASS", &record.class)
        .env("UBLK_EVENT_SEVERITY", &record.severity)
        .env("UBLK_EVENT_VOLUME", &record.volume)
        .env("UBLK_EVENT_NAME", record.name.as_deref().unwrap_or_default())
        .env("UBLK_EVENT_DATA", &record.data)
        .env("UBLK_EVENT_MESSAGE", &record.message)
        .env("UBLK_EVENT_COUNT", record.count.to_string())
        .env("UBLK_EVENT_FIRST_BLOCK", number(record.first_block))
        .env("UBLK_EVENT_BLOCKS", number(record.blocks))
        .env("UBLK_EVENT_ERRNO", record.errno.map(|errno| errno.to_string()).unwrap_or_default())
        .stdin(Stdio::piped())
        .spawn()
        .doing(&what)?;
    // Less than a pipe holds; it need not read it.
    let line = format!("{}\n", serde_json::to_string(record).expect("plain data"));
    drop(child.stdin.take().map(|mut stdin| stdin.write_all(line.as_bytes())));
    ended(&mut child, Instant::now() + PATIENCE).map_err(|why| Failure::new(Exit::Device, format_args!("{what} {why}")))
}

/// Waits for its end, but not without one.
fn ended(child: &mut Child, deadline: Instant) -> Result<(), String> {
    loop {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(status)) => return Err(format!("has failed: {status}")),
            Ok(None) if Instant::now() < deadline => thread::sleep(Duration::from_millis(20)),
            Ok(None) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("has taken more than {} s and was ended", PATIENCE.as_secs()));
            }
            Err(e) => return Err(format!("can't be waited for: {e}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_death_is_told_once() {
        let mut watch = Deaths::default();
        let mut state = State::of_test(7);
        state.pid = 100;
        let mut look = |state: &State, left| watch.look([(state, left)].into_iter()).len();
        assert_eq!([look(&state, false), look(&state, true), look(&state, true), look(&state, true)], [0, 0, 1, 0]);
        // Recovered, by one that dies, too.
        state.pid = 101;
        assert_eq!([look(&state, false), look(&state, true), look(&state, true), look(&state, true)], [0, 0, 1, 0]);
        // One that was only about to be followed.
        state.pid = 102;
        assert_eq!([look(&state, true), look(&state, false), look(&state, true), look(&state, true)], [0, 0, 0, 1]);
        // A monitor that was started anew does not tell what the one before has; but the next death.
        let mut anew = Deaths::told_in(vec![death(&state)]);
        let mut look = |state: &State| anew.look([(state, true)].into_iter()).len();
        assert_eq!([look(&state), look(&state), look(&state)], [0, 0, 0]);
        let next = State { pid: 103, ..state.clone() };
        assert_eq!([look(&next), look(&next)], [0, 1]);
        let told = death(&state);
        assert!(told.message.contains("/dev/ublkb7 (pid 102) is dead: `recover -n 7`") && told.class == "daemon-died");
    }

    #[test]
    fn what_takes_too_long_is_ended() {
        let mut child = Command::new("sleep").arg("600").spawn().unwrap();
        assert!(ended(&mut child, Instant::now()).unwrap_err().contains("was ended"));
        let mut child = Command::new("false").spawn().unwrap();
        assert!(ended(&mut child, Instant::now() + PATIENCE).unwrap_err().contains("has failed"));
    }
}
