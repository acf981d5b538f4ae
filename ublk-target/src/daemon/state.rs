//! What is known of devices outside their daemons: one JSON file each under /run, that all may
//! read, and beside it the lock that says that the daemon lives. Each daemon has such a lock of its
//! own, so that the one that follows never makes the one before look alive: the number's lock is its
//! already while the file still speaks of that one.

use super::{
    life::{Life, is_current, lock_current, lock_current_within, lock_of_dead},
    links,
    settings::Settings,
};
use crate::{
    device::stack,
    failure::{Context, Exit, Failure, Outcome},
    run_dir::{FOLDER, make_folder},
    ublk::{self, Mark, Proof, Whose},
    wait::{LONGEST, Wait},
};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::Duration,
};
use ublk_integrity::create::VolumeInfo;

/// A device as its state file describes it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct State {
    /// Number of the device.
    pub id: u32,
    /// The daemon.
    pub pid: u32,
    /// The file whose lock says that it lives; older versions have none but the number's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub life: Option<PathBuf>,
    /// The version of its program; older ones do not say it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// What the kernel remembers the device by; older versions have left none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mark: Option<Mark>,
    /// The id (hexadecimal) of the open that the daemon serves, by which its kept writes are found.
    #[serde(default)]
    pub open_id: String,
    /// What it serves: another volume must never take its place.
    #[serde(flatten)]
    pub volume: Identity,
    /// The volume's name.
    #[serde(default)]
    pub label: String,
    /// Bytes that its data device writes atomically as the user says.
    #[serde(default)]
    pub assumed_atomic_bytes: Option<u32>,
    /// Why the device ended otherwise than in good order: all that is left of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<String>,
    /// What it was asked to be.
    #[serde(flatten)]
    pub settings: Settings,
}

/// What makes a volume the one that a device was made of.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Identity {
    /// UUID in the usual text form.
    pub uuid: String,
    /// Usable size in bytes.
    pub size: u64,
    /// Unit of integrity in bytes.
    pub block_size: u32,
}

impl Identity {
    /// The identity of an open volume.
    pub fn of(volume: &VolumeInfo) -> Self {
        Self { uuid: volume.uuid.clone(), size: volume.size, block_size: volume.block_size }
    }

    /// Whether `later` may be the same volume: one grows, and never shrinks.
    pub fn may_become(&self, later: &Self) -> bool {
        (&self.uuid, self.block_size) == (&later.uuid, later.block_size) && self.size <= later.size
    }
}

/// The daemon's hold on its own state. Removes it when the device ends in an orderly way.
pub struct OwnState {
    /// On the number: no other daemon has it meanwhile.
    number: Flock<File>,
    /// On its life.
    life: Flock<File>,
    state: State,
}

/// The right to end a device, or to give it another daemon. A daemon that a signal stops asks nobody:
/// it hands nothing over.
pub struct Change {
    lock: Flock<File>,
    path: PathBuf,
}

impl Change {
    /// That to end device `id`. Several commands may have that, and none the other one meanwhile.
    pub fn end(id: u32) -> Outcome<Self> {
        Self::begin(id, FlockArg::LockSharedNonblock, LONGEST)
    }

    /// That to give device `id` another daemon. One command has it.
    pub fn follow(id: u32) -> Outcome<Self> {
        Self::follow_within(id, LONGEST)
    }

    /// The same of one that waits so long for another.
    pub fn follow_within(id: u32, limit: Duration) -> Outcome<Self> {
        Self::begin(id, FlockArg::LockExclusiveNonblock, limit)
    }

    /// Whether a command is about to give device `id` another daemon. To who may not know it, none is.
    pub fn is_under_way(id: u32) -> bool {
        Self::is_under_way_at(&file_of(id, "change"))
    }

    fn is_under_way_at(path: &Path) -> bool {
        let Ok(file) = File::open(path) else { return false };
        matches!(Flock::lock(file, FlockArg::LockSharedNonblock), Err((_, Errno::EWOULDBLOCK)))
    }

    fn begin(id: u32, how: FlockArg, limit: Duration) -> Outcome<Self> {
        Self::at(file_of(id, "change"), how, limit).map_err(|e| match e.kind() {
            io::ErrorKind::WouldBlock => {
                let (path, seconds) = (file_of(id, "change"), limit.as_secs());
                let path = path.display();
                let message = format!(
                    "/dev/ublkb{id}: another `upgrade` or `del` has held {path} for {seconds} s: `fuser {path}` names it; try again when it has ended"
                );
                Failure::new(Exit::Busy, message)
            }
            _ => Failure::io(format_args!("can't lock {}", file_of(id, "change").display()), &e),
        })
    }

    fn at(path: PathBuf, how: FlockArg, limit: Duration) -> io::Result<Self> {
        let mut wait = Wait::up_to(limit, format_args!("another command that holds {}", path.display()));
        Ok(Self { lock: lock_current_within(&path, how, &mut wait)?, path })
    }
}

impl Drop for Change {
    fn drop(&mut self) {
        // Whoever else holds it takes it away, and whoever waits looks whether it is still there.
        if self.lock.relock(FlockArg::LockExclusiveNonblock).is_ok() && is_current(&self.lock, &self.path) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn file_of(id: u32, suffix: &str) -> PathBuf {
    PathBuf::from(FOLDER).join(format!("{id}.{suffix}"))
}

/// Where the daemon of device `id` listens.
pub fn socket_path(id: u32) -> PathBuf {
    file_of(id, "sock")
}

impl State {
    /// Writes the state down and takes the lock that says "alive".
    pub fn publish(self) -> Outcome<OwnState> {
        let what = format!("can't keep state in {FOLDER}");
        make_folder().doing(&what)?;
        let number = lock_current(&file_of(self.id, "lock")).map_err(|e| match e.kind() {
            io::ErrorKind::WouldBlock => {
                let (lock, seconds) = (file_of(self.id, "lock"), LONGEST.as_secs());
                let message = format!(
                    "{}: the daemon that had this number before has held it for {seconds} s and not ended: choose another number",
                    lock.display()
                );
                Failure::new(Exit::Busy, message)
            }
            _ => Failure::io(&what, &e),
        })?;
        // Whoever had the number before has died, or its device was deleted by another program.
        links::withdraw(self.id, self.settings.name.as_ref());
        let path = file_of(self.id, &format!("{}.life", self.pid));
        let life = lock_current(&path).doing(&what)?;
        let before = Self::load(self.id).ok().and_then(|before| before.life);
        let own = OwnState { number, life, state: Self { life: Some(path.clone()), ..self } };
        own.write().doing(&what)?;
        if let Some(before) = before.filter(|before| *before != path) {
            let _ = fs::remove_file(before);
        }
        Ok(own)
    }

    /// What the ublk device `id` lies on, if it is ours.
    pub fn lies_on(id: u32) -> Vec<PathBuf> {
        Self::load(id).iter().flat_map(|state| state.settings.paths()).map(Path::to_owned).collect()
    }

    /// What the ublk device `id` lies on, or waits for, if it is ours.
    pub fn below(id: u32) -> Vec<PathBuf> {
        Self::load(id).iter().flat_map(|state| state.settings.needs()).map(Path::to_owned).collect()
    }

    /// All devices: those that lie on others' devices, or have their anchor there, before these, so that each can be ended
    /// when nothing of ours lies on it any more.
    pub fn all_top_down() -> Vec<Self> {
        in_order(Self::all(), |upper, lower| {
            upper.id != lower.id && upper.settings.needs().any(|path| stack::lies_on_ublk(path, lower.id, Self::below))
        })
    }

    /// The device `id`, if it is ours.
    pub fn load(id: u32) -> Outcome<Self> {
        let path = file_of(id, "json");
        let text = fs::read(&path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => Failure::new(
                Exit::Device,
                format_args!("device {id} is not one of ours: `ublk-integrity list` shows them"),
            ),
            _ => Failure::io(format_args!("can't read {}", path.display()), &e),
        })?;
        serde_json::from_slice(&text).map_err(|e| Failure::new(Exit::Device, format_args!("{}: {e}", path.display())))
    }

    /// The same, if its daemon lives.
    pub fn load_alive(id: u32) -> Outcome<Self> {
        let state = Self::load(id)?;
        if state.is_alive() { Ok(state) } else { Err(state.daemon_is_dead()) }
    }

    /// That its daemon does not live any more, and what to do.
    pub fn daemon_is_dead(&self) -> Failure {
        let message = format!("the daemon of device {} (pid {}) is dead: {}", self.id, self.pid, self.remedy());
        Failure::new(Exit::Device, message)
    }

    /// All devices, by number.
    pub fn all() -> Vec<Self> {
        Self::files().into_iter().filter(|state| state.ended.is_none()).collect()
    }

    fn files() -> Vec<Self> {
        let names = fs::read_dir(FOLDER).into_iter().flatten().flatten().map(|entry| entry.file_name());
        let ids = names.filter_map(|name| name.to_str()?.strip_suffix(".json")?.parse().ok());
        let mut all: Vec<Self> = ids.filter_map(|id| Self::load(id).ok()).collect();
        all.sort_by_key(|state| state.id);
        all
    }

    /// Whether its daemon lives.
    pub fn is_alive(&self) -> bool {
        self.watch().is_some()
    }

    /// The daemon's life, if it lives.
    pub fn watch(&self) -> Option<Life> {
        match &self.life {
            Some(own) => Life::of(own, self.pid),
            None => Life::of_older(&file_of(self.id, "lock"), self.pid),
        }
    }

    /// What proves that the kernel's device of this number is the one that it describes.
    pub fn proof(&self) -> Proof {
        Proof { number: self.id, mark: self.mark, pid: self.pid }
    }

    /// Whose the kernel's device of this number is.
    pub fn whose(&self) -> Outcome<Whose> {
        self.proof().whose()
    }

    /// Whether the kernel has the device yet. Who may not ask it whose that is goes by the number.
    pub fn has_device(&self) -> bool {
        self.whose().map_or_else(|_| ublk::exists(self.id), |whose| whose == Whose::Ours)
    }

    /// What to do about a daemon that is dead.
    pub fn remedy(&self) -> String {
        let id = self.id;
        if self.settings.recovery { format!("`recover -n {id}` or `del -n {id}`") } else { format!("`del -n {id}`") }
    }

    /// Whether the file of this number still speaks of the same daemon.
    pub fn is_current(&self) -> bool {
        Self::load(self.id).is_ok_and(|now| now.pid == self.pid)
    }

    /// What its file says by now, if that still speaks of the same device.
    pub fn anew(&self) -> Self {
        let now = Self::load(self.id).ok().filter(|now| self.volume.may_become(&now.volume));
        now.unwrap_or_else(|| self.clone())
    }

    /// The process that serves it in place of this state's, if another does.
    pub fn follower(&self) -> Option<u32> {
        let now = Self::load(self.id).ok()?;
        (now.pid != self.pid && now.ended.is_none() && now.is_alive()).then_some(now.pid)
    }

    /// Forgets a device that is gone, unless its number has a new owner, who holds the lock.
    pub fn remove(&self) {
        let lock = file_of(self.id, "lock");
        let held = lock_of_dead(&lock);
        if self.is_current() && (held.is_some() || !lock.exists()) {
            remove_files(self);
        }
    }
}

#[cfg(test)]
impl State {
    pub fn of_test(id: u32) -> Self {
        let settings = super::settings::tests::settings();
        let volume = Identity { uuid: uuid::Uuid::nil().to_string(), size: 1 << 20, block_size: 4096 };
        let (open_id, label) = Default::default();
        Self {
            id,
            pid: 1,
            life: None,
            version: None,
            mark: None,
            open_id,
            volume,
            label,
            assumed_atomic_bytes: None,
            ended: None,
            settings,
        }
    }
}

fn in_order<T>(mut all: Vec<T>, lies_on: impl Fn(&T, &T) -> bool) -> Vec<T> {
    let mut ordered = Vec::new();
    while !all.is_empty() {
        // Where each lies on another, which can't be, any is as good as the next.
        let top = all.iter().position(|lower| !all.iter().any(|upper| lies_on(upper, lower))).unwrap_or(0);
        ordered.push(all.remove(top));
    }
    ordered
}

/// All that leads to a device that is gone. The number's lock last: whoever waits for it looks whether
/// it is still there.
fn remove_files(state: &State) {
    let file = |suffix| Some(file_of(state.id, suffix));
    links::withdraw(state.id, None);
    for path in [file("sock"), file("json"), state.life.clone(), file("lock")].into_iter().flatten() {
        let _ = fs::remove_file(path);
    }
}

impl OwnState {
    /// Never empty nor half written for others: a new daemon needs the old one's word if this one
    /// fails.
    fn write(&self) -> io::Result<()> {
        let text = serde_json::to_vec_pretty(&self.state).expect("plain data");
        let (new, path) = (file_of(self.state.id, "new"), file_of(self.state.id, "json"));
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o644).open(&new)?;
        file.write_all(&text)?;
        fs::rename(new, path)
    }

    /// The library's words for the devices in a text replaced by the paths.
    pub fn named(&self, text: &str) -> String {
        self.state.settings.named(text)
    }

    /// The device is gone, and not in good order: whoever ends it shall be told why.
    pub fn ended(mut self, why: &str) {
        self.state.ended = Some(why.to_owned());
        links::withdraw(self.state.id, None);
        let _ = fs::remove_file(socket_path(self.state.id));
        let _ = self.write();
        self.hold_until_exit();
    }

    /// The device is gone: so is its state. The lock goes with the process, after everything else.
    pub fn retire(self) {
        remove_files(&self.state);
        self.hold_until_exit();
    }

    /// Whoever waits for the locks waits for the end of everything that this process holds.
    fn hold_until_exit(self) {
        std::mem::forget((self.number, self.life));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_ended_or_followed_and_the_lock_for_that_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.change");
        let begin = |how, milliseconds| Change::at(path.clone(), how, Duration::from_millis(milliseconds));
        let (end, follow) = (FlockArg::LockSharedNonblock, FlockArg::LockExclusiveNonblock);
        let (first, second) = (begin(end, 0).unwrap(), begin(end, 0).unwrap());
        assert_eq!(begin(follow, 20).err().map(|e| e.kind()), Some(io::ErrorKind::WouldBlock));
        drop(first);
        assert!(begin(follow, 20).is_err(), "the other one holds it yet");
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| begin(follow, 60_000).unwrap());
            std::thread::sleep(Duration::from_millis(50));
            drop(second);
            let follower = waiting.join().unwrap();
            assert!(begin(end, 20).is_err() && begin(follow, 20).is_err(), "it is on the file that others find");
            drop(follower);
        });
        assert!(!path.exists());
    }

    #[test]
    fn a_daemon_that_is_about_to_be_followed_is_known() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.change");
        assert!(!Change::is_under_way_at(&path));
        let begin = |how| Change::at(path.clone(), how, Duration::ZERO).unwrap();
        let follows = begin(FlockArg::LockExclusiveNonblock);
        assert!(Change::is_under_way_at(&path));
        drop(follows);
        let _ends = begin(FlockArg::LockSharedNonblock);
        assert!(!Change::is_under_way_at(&path), "it is to end, and nobody follows");
    }

    #[test]
    fn a_volume_that_has_grown_is_the_same() {
        let now = State::of_test(0).volume;
        let with = |size, block_size| Identity { size, block_size, ..now.clone() };
        assert!(now.may_become(&now) && now.may_become(&with(2 << 20, 4096)));
        assert!(!now.may_become(&with((1 << 20) - 4096, 4096)) && !now.may_become(&with(2 << 20, 512)));
        let other = Identity { uuid: uuid::Uuid::from_u128(1).to_string(), ..now.clone() };
        assert!(!now.may_become(&other));
    }

    #[test]
    fn what_lies_on_another_comes_first() {
        let on = [(1, 4), (4, 2), (3, 2)];
        let order = in_order(vec![0, 1, 2, 3, 4], |upper, lower| on.contains(&(*upper, *lower)));
        assert_eq!(order, [0, 1, 3, 4, 2]);
        assert_eq!(in_order(vec![1, 2], |_, _| true).len(), 2, "and it ends");
    }
}
