//! How much memory a daemon may take: what it takes is locked, and the kernel can get none of it
//! back, nor kill it for it.
//!
//! `add` weighs what it would take against what can be had now. Between that and the taking of it
//! lies the opening of the volume, so the sum is *promised* first: a file beside the state files,
//! which counts for as long as its daemon lives, less what the daemon has in memory by now. Looking
//! and promising are one step, under a lock.

use super::counts::Counts;
use crate::{
    failure::{Context, Exit, Failure, Outcome},
    run_dir::{FOLDER, lock_alone, make_folder},
    size::Size,
    unnamed,
    write_back_file::{MOST_BYTES, PAGE},
};
use nix::{
    fcntl::{Flock, FlockArg},
    sys::resource::{RLIM_INFINITY, Resource, getrlimit},
};
use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    process,
};
use ublk_integrity::{create::VolumeInfo, most_memory_bytes};

/// The part of the machine's memory that new devices leave to everything else: one in so many.
const LEFT_FREE: u64 = 8;
/// Address space for what is not counted: code, stacks, tables, and the 64 MiB that the C library
/// sets aside for what a thread that is still to come allocates.
const UNCOUNTED: u64 = (64 + 16) << 20;

/// Code, and the tables and stacks of up to four threads for requests and hashing.
const CODE: u64 = 18 << 20;
/// Stack of each further one.
const THREAD: u64 = 2 << 20;
/// Each request's room in the tables of its ring, and what aligns its buffer.
const REQUEST: u64 = 8 << 10;

/// What is neither request buffers nor the volume's.
pub fn rest(counts: Counts) -> u64 {
    let threads = counts.io_threads() + u64::from(counts.hash_threads);
    // The slots of the write-back file and their heads outlive the daemon.
    let write_back = counts.write_back_slots() * (MOST_BYTES as u64 + REQUEST) + counts.io_threads() * PAGE as u64;
    CODE + threads.saturating_sub(4) * THREAD + counts.requests() * REQUEST + write_back
}

/// Bytes of the volume's largest request: what the daemon before had answered may be larger than
/// those of the device.
pub fn largest_request(max_io: u32) -> usize {
    (max_io as usize).max(MOST_BYTES)
}

/// What a daemon takes at most, with a volume of these sizes or any: blocks of 512 bytes and a deep
/// tree take most.
pub fn most_memory(volume: Option<&VolumeInfo>, counts: Counts, max_io: u32, cache: u64) -> u64 {
    let requests = counts.requests();
    // Neither product comes near 64 bits; the cache may be anything.
    let volume = most_memory_bytes(volume, cache, counts.contexts(), largest_request(max_io));
    volume.saturating_add(requests * u64::from(max_io) + rest(counts))
}

/// Bytes of memory of this machine.
pub fn machine_memory() -> u64 {
    // Unreadable: as if small.
    kilobytes(&fs::read_to_string("/proc/meminfo").unwrap_or_default(), "MemTotal").unwrap_or(512 << 20)
}

/// Who asks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Purpose {
    /// A new device: leaves something to the machine.
    New,
    /// A device that waits for its daemon, and whoever uses it with it; or a command, whose memory
    /// the kernel can get back.
    Needed,
}

/// What can be had, and what it is that allows no more.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Available {
    /// Bytes.
    pub bytes: u64,
    why: String,
}

impl Available {
    /// Of the machine, of this process's control groups, and within its limits.
    pub fn here(purpose: Purpose) -> Self {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let promised = promised();
        let machine = of_machine(&text("/proc/meminfo"), promised, purpose);
        let groups =
            control_groups(&text("/proc/self/cgroup")).into_iter().filter_map(|group| of_group(&group, promised));
        let status = text("/proc/self/status");
        std::iter::once(machine).chain(groups).chain(of_limits(&status)).min_by_key(|a| a.bytes).expect("one at least")
    }

    /// Refuses a daemon that would take `need`, and says what can be done about it.
    pub fn refuse_less_than(&self, need: u64, remedy: &str) -> Outcome {
        if need <= self.bytes {
            return Ok(());
        }
        let message = format_args!(
            "the daemon would take up to {} of memory, {} can be had ({}): {remedy}",
            Size(need),
            Size(self.bytes),
            self.why
        )
        .to_string();
        Err(Failure::new(Exit::Memory, message))
    }
}

/// A value in bytes from a file like /proc/meminfo.
fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.trim().trim_end_matches(" kB").parse::<u64>().ok().map(|k| k * 1024)
}

fn of_machine(meminfo: &str, promised: u64, purpose: Purpose) -> Available {
    // Unreadable: as if small.
    let total = kilobytes(meminfo, "MemTotal").unwrap_or(512 << 20);
    let available = kilobytes(meminfo, "MemAvailable").unwrap_or(total / 2);
    let left_free = if purpose == Purpose::New { total / LEFT_FREE } else { 0 };
    let mut why = format!("MemAvailable is {} of {}", Size(available), Size(total));
    if left_free > 0 {
        why += &format!(", {} stay free", Size(left_free));
    }
    if promised > 0 {
        why += &format!(", {} are promised to devices that are being added", Size(promised));
    }
    Available { bytes: available.saturating_sub(left_free).saturating_sub(promised), why }
}

/// The folders of this process's memory control group and those above it, innermost first
/// (cgroups(7)).
fn control_groups(membership: &str) -> Vec<PathBuf> {
    let unified = |line: &str| Some((PathBuf::from("/sys/fs/cgroup"), line.strip_prefix("0::/")?.to_owned()));
    let legacy = |line: &str| {
        let (controllers, path) = line.split_once(':')?.1.split_once(":/")?;
        let has_memory = controllers.split(',').any(|c| c == "memory");
        has_memory.then(|| (PathBuf::from("/sys/fs/cgroup/memory"), path.to_owned()))
    };
    let found = membership.lines().filter_map(|line| legacy(line).or_else(|| unified(line)));
    found.flat_map(|(root, path)| Path::new(&path).ancestors().map(|p| root.join(p)).collect::<Vec<_>>()).collect()
}

/// Within the limit of a control group; `None` where it has none.
fn of_group(folder: &Path, promised: u64) -> Option<Available> {
    let number = |names: [&str; 2]| {
        names.iter().find_map(|name| fs::read_to_string(folder.join(name)).ok()?.trim().parse::<u64>().ok())
    };
    let limit = number(["memory.max", "memory.limit_in_bytes"])?;
    let used = number(["memory.current", "memory.usage_in_bytes"])?;
    // What is cached of files goes when it must.
    let stat = fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
    let pages = |name: &str| {
        stat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse::<u64>().ok()).unwrap_or(0)
    };
    let cached = pages("inactive_file") + pages("active_file");
    let used = used.saturating_sub(cached);
    let why = format!("the limit of {} is {}, {} are in use", folder.display(), Size(limit), Size(used));
    Some(Available { bytes: limit.saturating_sub(used).saturating_sub(promised), why })
}

/// Within this process's own limits: on locked memory, which root does not have, and on address
/// space.
fn of_limits(status: &str) -> Vec<Available> {
    const CAP_IPC_LOCK: u64 = 1 << 14;
    let soft = |resource| getrlimit(resource).map_or(RLIM_INFINITY, |(soft, _)| soft);
    let capabilities =
        status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok());
    let may_lock = capabilities.unwrap_or(0) & CAP_IPC_LOCK != 0;
    let locked = if may_lock { RLIM_INFINITY } else { soft(Resource::RLIMIT_MEMLOCK) };
    let mapped = kilobytes(status, "VmSize").unwrap_or(0) + UNCOUNTED;
    [
        (locked, 0, "the limit on locked memory (`ulimit -l`)"),
        (soft(Resource::RLIMIT_AS), mapped, "the limit on address space (`ulimit -v`)"),
    ]
    .into_iter()
    .filter(|(limit, ..)| *limit != RLIM_INFINITY)
    .map(|(limit, used, name)| {
        let why = format!("{name} is {}", Size(limit));
        Available { bytes: limit.saturating_sub(used), why }
    })
    .collect()
}

/// What daemons that live have been promised and have not taken yet.
fn promised() -> u64 {
    promises(Path::new(FOLDER)).filter_map(|path| outstanding(&path)).sum()
}

const EXTENSION: &str = "memory";

fn promises(folder: &Path) -> impl Iterator<Item = PathBuf> {
    let files = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    files.filter(|path| path.extension().is_some_and(|e| e == EXTENSION))
}

/// Of one promise; `None` where its daemon is dead. Removes nothing: by then the name may be
/// another's.
fn outstanding(path: &Path) -> Option<u64> {
    let pid: u32 = path.file_stem()?.to_str()?.parse().ok()?;
    let text = fs::read_to_string(path).ok()?;
    if is_broken(path) {
        return None;
    }
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    Some(text.trim().parse::<u64>().ok()?.saturating_sub(kilobytes(&status, "VmRSS").unwrap_or(0)))
}

/// Whether whoever made the promise lives no longer, or it is no file of ours.
fn is_broken(path: &Path) -> bool {
    File::open(path).is_ok_and(|file| Flock::lock(file, FlockArg::LockSharedNonblock).is_ok())
}

/// Memory that is this process's to take; it counts as taken until the process ends.
pub struct Promise {
    path: PathBuf,
    /// Until the process ends.
    _lock: Flock<File>,
}

impl Promise {
    /// Decides how much with `decide`, which is told what can be had, and makes that ours before
    /// anybody else looks. Others wait for it: it must look at no device.
    pub fn make<T>(purpose: Purpose, decide: impl FnOnce(&Available) -> Outcome<(u64, T)>) -> Outcome<(Self, T)> {
        let what = format!("can't keep state in {FOLDER}");
        make_folder().doing(&what)?;
        let _alone = lock_alone("memory.lock")?;
        let (bytes, decided) = decide(&Available::here(purpose))?;
        Ok((Self::of(bytes, Path::new(FOLDER)).doing(&what)?, decided))
    }

    /// One that is counted from the moment on that it can be found. Those of the dead go; nobody
    /// else makes or removes any now.
    fn of(bytes: u64, folder: &Path) -> io::Result<Self> {
        promises(folder).filter(|path| is_broken(path)).for_each(|path| drop(fs::remove_file(path)));
        let path = folder.join(format!("{}.{EXTENSION}", process::id()));
        let mut lock = unnamed::locked(folder)?;
        writeln!(lock, "{bytes}")?;
        unnamed::name(&lock, &path)?;
        Ok(Self { path, _lock: lock })
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    impl Available {
        pub(in crate::daemon) fn of_test(bytes: u64) -> Self {
            Self { bytes, why: "in a test".into() }
        }
    }

    #[test]
    fn of_the_machine_what_is_available_and_nobody_has_been_promised() {
        let meminfo = "MemTotal:        1572864 kB\nMemFree:  1 kB\nMemAvailable:     614400 kB\n";
        assert_eq!(of_machine(meminfo, 0, Purpose::Needed).bytes, 600 * MIB);
        assert_eq!(of_machine(meminfo, 0, Purpose::New).bytes, (600 - 192) * MIB);
        let less = of_machine(meminfo, 100 * MIB, Purpose::New);
        assert_eq!(less.bytes, (600 - 192 - 100) * MIB);
        assert!(
            ["600.00 MiB", "1.50 GiB", "192.00 MiB", "100.00 MiB"].iter().all(|n| less.why.contains(n)),
            "{less:?}"
        );
        assert_eq!(of_machine(meminfo, u64::MAX, Purpose::New).bytes, 0);
        let failure = less.refuse_less_than(309 * MIB, "lower --cache").unwrap_err();
        assert_eq!(failure.exit, Exit::Memory);
        assert!(failure.message.contains("309.00 MiB") && failure.message.contains("308.00 MiB"), "{failure}");
        assert!(less.refuse_less_than(308 * MIB, "").is_ok());
    }

    #[test]
    fn groups_are_looked_at_up_to_the_root() {
        let unified = control_groups("0::/system.slice/a.service\n");
        let wanted = ["system.slice/a.service", "system.slice", ""].map(|p| Path::new("/sys/fs/cgroup").join(p));
        assert_eq!(unified, wanted);
        let legacy = control_groups("5:cpu,cpuacct:/x\n4:memory:/job\n0::/\n");
        assert_eq!(legacy[0], Path::new("/sys/fs/cgroup/memory/job"));
    }

    #[test]
    fn what_a_group_has_cached_can_be_had() {
        let folder = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
        assert_eq!(of_group(folder.path(), 0), None);
        put("memory.max", "max\n");
        put("memory.current", "62914560\n");
        assert_eq!(of_group(folder.path(), 0), None, "no limit");
        put("memory.max", "104857600\n");
        put("memory.stat", "anon 5\ninactive_file 20971520\nactive_file 10485760\n");
        assert_eq!(of_group(folder.path(), 0).unwrap().bytes, 70 * MIB);
        assert_eq!(of_group(folder.path(), 10 * MIB).unwrap().bytes, 60 * MIB);
    }

    #[test]
    fn the_line_at_start_stays_below_what_was_foretold() {
        let s = super::super::settings::tests::settings();
        let s = super::super::settings::Settings { write_back: 32, ..s };
        let volume = most_memory_bytes(None, s.cache, s.counts().contexts(), s.max_io as usize);
        assert_eq!(s.memory_line(volume).0, most_memory(None, s.counts(), s.max_io, s.cache));
    }

    #[test]
    fn a_promise_counts_from_the_moment_on_that_it_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let sum = || promises(folder).filter_map(|path| outstanding(&path)).sum::<u64>();
        let most = 1 << 50;
        let taken = 1 << 40;
        fs::write(folder.join("1.memory"), format!("{most}\n")).unwrap();
        assert_eq!(sum(), 0, "of one that is dead");
        assert!(folder.join("1.memory").exists(), "who only looks removes nothing");
        // Somebody looks all the time while promises are made.
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|s| {
            s.spawn(|| {
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    sum();
                }
            });
            let counted: Vec<_> = (0..200)
                .map(|_| {
                    let _promise = Promise::of(most, folder).unwrap();
                    sum()
                })
                .collect();
            done.store(true, std::sync::atomic::Ordering::Relaxed);
            assert!(counted.iter().all(|bytes| *bytes >= most - taken), "{counted:?}");
        });
        assert_eq!(fs::read_dir(folder).unwrap().count(), 0);
    }
}
