//! System calls that have no safe wrapper elsewhere.

use crate::rings::{self, RingLife};
use io_uring::{IoUring, opcode, squeue, types};
use memmap2::{Mmap, MmapMut, MmapOptions};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        prctl,
        resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit},
        signal::{SigHandler, SigSet, SigmaskHow, Signal},
        signalfd::{SfdFlags, SignalFd},
        termios::{LocalFlags, SetArg, tcgetattr, tcsetattr},
    },
    unistd::{ForkResult, fork},
};
use std::{
    ffi::CString,
    fs::File,
    io,
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use zerocopy::{Immutable, IntoBytes};
use zeroize::Zeroizing;

/// `linux/prctl.h`
const PR_SET_IO_FLUSHER: libc::c_int = 57;

mod ioctl {
    nix::ioctl_read_bad!(physical_block_size, libc::BLKPBSZGET, libc::c_uint);
    nix::ioctl_read_bad!(logical_block_size, libc::BLKSSZGET, libc::c_int);
    nix::ioctl_none!(read_partitions, 0x12, 95);
}

/// What a block device writes atomically, in bytes (`BLKPBSZGET`).
pub fn physical_block_size(device: &File) -> io::Result<u32> {
    let mut size = 0;
    // SAFETY: the call fills in one unsigned int, which outlives it.
    unsafe { ioctl::physical_block_size(device.as_raw_fd(), &mut size) }?;
    Ok(size)
}

/// Lets other threads go before the calling one to a disk whose scheduler heeds that. What fails makes no difference but
/// in speed. Not so to a processor: the thread takes locks that requests wait for, and would keep them the longer the
/// busier the machine is.
pub fn yield_disk() {
    /// `linux/ioprio.h`: of a thread, class idle.
    const IOPRIO_WHO_PROCESS: libc::c_int = 1;
    const IOPRIO_IDLE: libc::c_int = 3 << 13;
    // SAFETY: changes a number of the calling thread's.
    let _ = unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IOPRIO_IDLE) };
}

/// Has the kernel look for partitions anew (`BLKRRPART`): EBUSY where one is in use, EINVAL where
/// there can't be any.
pub fn read_partitions(device: &File) -> nix::Result<()> {
    // SAFETY: takes no argument.
    unsafe { ioctl::read_partitions(device.as_raw_fd()) }.map(drop)
}

/// The least that a block device transfers, in bytes (`BLKSSZGET`).
pub fn logical_block_size(device: &File) -> std::io::Result<u32> {
    let mut size = 0;
    // SAFETY: the call fills in one int, which outlives it.
    unsafe { ioctl::logical_block_size(device.as_raw_fd(), &mut size) }?;
    Ok(size as u32)
}

/// What offsets and lengths of direct I/O to a file must be multiples of, in bytes
/// (`STATX_DIOALIGN`, Linux 6.1); `None` where the kernel or the file system does not say.
pub fn direct_io_alignment(file: &File) -> Option<u32> {
    let mut found = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the name is an empty string, and the kernel fills in at most one `statx`, which
    // outlives the call.
    let done = unsafe {
        libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, found.as_mut_ptr())
    };
    Errno::result(done).ok()?;
    // SAFETY: zeros are a valid `statx`, whatever the kernel has filled in of it.
    let found = unsafe { found.assume_init() };
    Some(found.stx_dio_offset_align).filter(|align| found.stx_mask & libc::STATX_DIOALIGN != 0 && *align > 0)
}

/// Marks this process as one that memory reclaim waits for (`PR_SET_IO_FLUSHER`): its own allocations
/// then never wait for reclaim that would write to its device. Threads started later inherit it.
pub fn set_io_flusher() -> nix::Result<()> {
    // SAFETY: takes integers only.
    Errno::result(unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) }).map(drop)
}

/// Before a key is in memory: no core dump of this process, whatever becomes of it, no other
/// process of its user may look into it, and it is not swapped out, as far as that can be had.
pub fn guard_secrets() -> nix::Result<()> {
    prctl::set_dumpable(false)?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    lock_secrets();
    Ok(())
}

/// Reads from a terminal that shows nothing of it meanwhile, and shows it again also where a signal
/// ends us. `interrupted`: whether a thread for signals has taken one.
pub fn without_echo<T>(
    terminal: &File,
    interrupted: impl Fn() -> bool,
    read: impl FnOnce() -> std::io::Result<T>,
) -> std::io::Result<T> {
    let before = tcgetattr(terminal)?;
    let mut silent = before.clone();
    silent.local_flags.remove(LocalFlags::ECHO);
    silent.local_flags.insert(LocalFlags::ICANON);
    let ends = heeded(&[Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    let blocked = ends.thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
    tcsetattr(terminal, SetArg::TCSAFLUSH, &silent)?;
    let signals = SignalFd::with_flags(&ends, SfdFlags::SFD_CLOEXEC);
    let ready = signals.map_err(std::io::Error::from).and_then(|signals| {
        let mut either =
            [PollFd::new(terminal.as_fd(), PollFlags::POLLIN), PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        loop {
            // Where there is a thread for signals it may have taken one.
            poll(&mut either, PollTimeout::from(100u8))?;
            match (either[0].any(), either[1].any()) {
                (_, Some(true)) => return Ok(false),
                _ if interrupted() => return Ok(false),
                (Some(true), _) => return Ok(true),
                _ => {}
            }
        }
    });
    // A line is whole when the terminal is ready: nothing waits any more.
    let done = match ready {
        Ok(true) => Some(read()),
        Ok(false) => None,
        Err(e) => Some(Err(e)),
    };
    let restored = tcsetattr(terminal, SetArg::TCSADRAIN, &before);
    // The signal ends us here, unless a thread is about to take it: it is to have done so by then.
    blocked.thread_set_mask()?;
    if done.is_none() {
        let came = std::time::Instant::now();
        while !interrupted() && came.elapsed().as_secs() < 1 {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
    restored?;
    done.unwrap_or_else(|| Err(Errno::EINTR.into()))
}

/// The payload of the "user" key `name` in the keyrings of this process, at most `limit` bytes of it.
pub fn read_user_key(name: &str, limit: usize) -> nix::Result<Zeroizing<Vec<u8>>> {
    /// `linux/keyctl.h`
    const KEYCTL_READ: libc::c_long = 11;
    let name = CString::new(name).map_err(|_| Errno::EINVAL)?;
    let mut payload = Zeroizing::new(vec![0u8; limit]);
    // SAFETY: both strings end in a NUL and outlive the call; a null callout asks nobody.
    let id = Errno::result(unsafe {
        libc::syscall(libc::SYS_request_key, c"user".as_ptr(), name.as_ptr(), std::ptr::null::<libc::c_char>(), 0)
    })?;
    // SAFETY: the kernel writes at most `len` bytes into `payload`, which outlives the call.
    let len = Errno::result(unsafe {
        libc::syscall(libc::SYS_keyctl, KEYCTL_READ, id, payload.as_mut_ptr(), payload.len())
    })?;
    // The answer is the key's full length, even where it did not fit.
    payload.truncate(len as usize);
    Ok(payload)
}

/// flock(2), of which the lock stays until the last descriptor of the opened file is closed,
/// whoever has it.
pub fn flock(file: &File, how: FlockArg) -> nix::Result<()> {
    let operation = match how {
        FlockArg::LockSharedNonblock => libc::LOCK_SH | libc::LOCK_NB,
        _ => libc::LOCK_EX | libc::LOCK_NB,
    };
    // SAFETY: takes integers only.
    Errno::result(unsafe { libc::flock(file.as_raw_fd(), operation) }).map(drop)
}

/// Sends a command to the ublk driver (IORING_OP_URING_CMD on its control device) and waits for its
/// end. For a thread that has no other ring after it.
pub fn ublk_command(control: &File, op: u32, device: u32, buf: &mut [u8]) -> io::Result<()> {
    /// `struct ublksrv_ctrl_cmd`
    #[derive(IntoBytes, Immutable)]
    #[repr(C)]
    struct Command {
        device: u32,
        queue: u16,
        len: u16,
        addr: u64,
        rest: [u8; 64],
    }
    let addr = if buf.is_empty() { 0 } else { buf.as_mut_ptr() as u64 };
    let command = Command { device, queue: u16::MAX, len: buf.len() as u16, addr, rest: [0; 64] };
    let command: [u8; 80] = zerocopy::transmute!(command);
    let entry = opcode::UringCmd80::new(types::Fd(control.as_raw_fd()), op).cmd(command).build();
    let mut ring = rings::build(&IoUring::<squeue::Entry128>::builder(), 1, RingLife::Thread)?;
    // SAFETY: the kernel reads and writes `buf` and uses the descriptor until the command has
    // ended. This function ends only after that, or before the command was taken from the ring.
    unsafe { ring.submission().push(&entry) }.map_err(io::Error::other)?;
    loop {
        if let Some(end) = ring.completion().next() {
            return if end.result() < 0 { Err(io::Error::from_raw_os_error(-end.result())) } else { Ok(()) };
        }
        match ring.submit_and_wait(1) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            // Nothing was submitted.
            Err(e) if !ring.submission().is_empty() => return Err(e),
            _ => {}
        }
    }
}

/// Locks all memory of this process: what there is, and what comes, either at once or
/// when it is first used.
pub fn lock_memory(at_once: bool) -> nix::Result<()> {
    let on_use = if at_once { 0 } else { libc::MCL_ONFAULT };
    // SAFETY: takes an integer only.
    Errno::result(unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE | on_use) }).map(drop)
}

/// Locks memory where this process may lock as much as it likes. With a limit to that, to lock what
/// comes would make allocations fail later.
fn lock_secrets() {
    let unlimited = matches!(getrlimit(Resource::RLIMIT_MEMLOCK), Ok((soft, _)) if soft == RLIM_INFINITY);
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    if unlimited || may_lock(&status) {
        let _ = lock_memory(false);
    }
}

/// Whether a process has CAP_IPC_LOCK, by its /proc/PID/status.
pub fn may_lock(status: &str) -> bool {
    const CAP_IPC_LOCK: u32 = 14;
    let capabilities = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let set = capabilities.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    set.is_some_and(|set| set >> CAP_IPC_LOCK & 1 == 1)
}

/// Locks the pages that these bytes lie on. They stay locked as long as they are mapped.
pub fn lock_pages(bytes: &[u8]) -> nix::Result<()> {
    // SAFETY: changes nothing about the memory but that it is not swapped out.
    Errno::result(unsafe { libc::mlock(bytes.as_ptr().cast(), bytes.len()) }).map(drop)
}

/// Maps `len` bytes of a file from `offset` on, shared with whoever opens it later.
pub fn map_shared(file: &Flock<File>, offset: u64, len: usize) -> io::Result<MmapMut> {
    // SAFETY: no two mappings of ours have a byte in common, and nobody else changes the
    // file or cuts it short: those of `write_back_file` are root's alone, and whoever opens
    // one asks for the lock first, which the daemon holds until its threads, and with them
    // the mappings, are gone.
    unsafe { MmapOptions::new().offset(offset).len(len).map_mut(&**file) }
}

/// The whole of a file, in memory and locked there as long as this lives.
pub fn hold_in_memory(file: &File) -> io::Result<Mmap> {
    // SAFETY: nobody looks at the bytes, whoever changes them.
    let held = unsafe { MmapOptions::new().populate().map(file) }?;
    lock_pages(&held)?;
    Ok(held)
}

/// A descriptor of a process, which stays that one's whoever gets its number (`pidfd_open(2)`).
pub fn open_process(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: takes integers only.
    let opened = unsafe { libc::syscall(libc::SYS_pidfd_open, pid as libc::pid_t, 0) };
    let descriptor = Errno::result(opened)? as RawFd;
    // SAFETY: it was opened just now, and nothing else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Sends SIGKILL to it.
pub fn kill_process(process: &OwnedFd) -> io::Result<()> {
    let none = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: takes integers and no information about the signal.
    let sent = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, process.as_raw_fd(), libc::SIGKILL, none, 0) };
    Errno::result(sent)?;
    Ok(())
}

/// Reads from a file known by its number (pread(2)), without an error into the whole of `buf`.
pub fn read_at(fd: RawFd, buf: &mut [u8], at: u64) -> nix::Result<()> {
    // SAFETY: the kernel writes at most `len` bytes into `buf`, which outlives the call.
    let len = unsafe { libc::pread(fd, buf.as_mut_ptr().cast(), buf.len(), at as libc::off_t) };
    if Errno::result(len)? as usize == buf.len() { Ok(()) } else { Err(Errno::EIO) }
}

/// Writes to a file known by its number (pwrite(2)), without an error the whole of `buf`.
pub fn write_at(fd: RawFd, buf: &[u8], at: u64) -> nix::Result<()> {
    // SAFETY: the kernel only reads `len` bytes of `buf`, which outlives the call.
    let len = unsafe { libc::pwrite(fd, buf.as_ptr().cast(), buf.len(), at as libc::off_t) };
    if Errno::result(len)? as usize == buf.len() { Ok(()) } else { Err(Errno::EIO) }
}

/// Bytes that this process has had read from devices; `None` where the kernel does not count them.
pub fn bytes_read() -> Option<u64> {
    let counts = std::fs::read_to_string("/proc/self/io").ok()?;
    counts.lines().find_map(|line| line.strip_prefix("read_bytes:"))?.trim().parse().ok()
}

/// Processors that this process may use.
pub fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, Into::into)
}

/// Forks a process that has one thread.
pub fn fork_single_threaded() -> nix::Result<ForkResult> {
    let threads = std::fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
    assert_eq!(threads, 1, "fork comes before all threads");
    // SAFETY: no other thread holds a lock or is half way through anything that the child would need.
    unsafe { fork() }
}

/// Closes all descriptors from 3 on: a daemon must not keep its caller's locks and pipes.
pub fn close_inherited() -> nix::Result<()> {
    assert!(!rings::keeps_one(), "descriptors are closed before there is any ring");
    // SAFETY: called before this process opens any descriptor that something of ours refers to.
    Errno::result(unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) }).map(drop)
}

/// Takes over a descriptor that was handed to this process by number. `None` where there is none.
pub fn adopt_descriptor(number: i32) -> Option<File> {
    // SAFETY: only asks whether the descriptor is open.
    if number <= 2 || unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
        return None;
    }
    // SAFETY: it is open, and meant for us alone: nothing else in this process knows of it.
    Some(unsafe { File::from_raw_fd(number) })
}

/// Puts the signals that stop a program to what a fresh program has, for a shell may have started
/// us with SIGINT ignored. A pipe that nobody reads any more, or a limit of the file size, is an
/// error of one write, not the end: what was found is still told, and what was begun taken away.
pub fn set_signals() {
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGALRM] {
        set_disposition(signal, SigHandler::SigDfl);
    }
    for signal in [Signal::SIGPIPE, Signal::SIGXFSZ] {
        set_disposition(signal, SigHandler::SigIgn);
    }
}

/// Signals that are held back from this thread until this is dropped.
pub struct Blocked {
    before: SigSet,
}

impl Blocked {
    /// Holds these back.
    pub fn hold(signals: &SigSet) -> nix::Result<Self> {
        signals.thread_swap_mask(SigmaskHow::SIG_BLOCK).map(|before| Self { before })
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        let _ = self.before.thread_set_mask();
    }
}

/// The time, since 1970.
pub fn since_1970() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Those of the signals that this process does not ignore. The kernel drops one that is ignored,
/// but not while it is blocked: whoever waits for it then would take it for the end.
pub fn heeded(signals: &[Signal]) -> SigSet {
    signals.iter().copied().filter(|signal| !is_ignored(*signal)).collect()
}

fn is_ignored(signal: Signal) -> bool {
    let mut now = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: changes nothing, and fills in at most one `sigaction`, which outlives the call.
    let asked = unsafe { libc::sigaction(signal as i32, std::ptr::null(), now.as_mut_ptr()) };
    // SAFETY: zeros are a valid `sigaction` (the default), whatever the kernel has filled in of it.
    asked == 0 && unsafe { now.assume_init() }.sa_sigaction == libc::SIG_IGN
}

fn set_disposition(signal: Signal, to: SigHandler) {
    // SAFETY: no function is installed as a handler; can't fail for these signals.
    let _ = unsafe { nix::sys::signal::signal(signal, to) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_capability_is_read_from_the_effective_set() {
        assert!(may_lock("CapPrm:\t0\nCapEff:\t000001ffffffffff\n"));
        assert!(may_lock("CapEff:\t0000000000004000\n"));
        assert!(!may_lock("CapPrm:\t000001ffffffffff\nCapEff:\t00000000ffffbfff\n") && !may_lock(""));
    }

    #[test]
    fn what_is_ignored_is_not_heeded() {
        let signals = [Signal::SIGUSR2, Signal::SIGWINCH];
        assert_eq!(heeded(&signals), signals.into_iter().collect());
        set_disposition(Signal::SIGUSR2, SigHandler::SigIgn);
        assert_eq!(heeded(&signals), Signal::SIGWINCH.into());
        set_disposition(Signal::SIGUSR2, SigHandler::SigDfl);
    }

    #[test]
    fn a_file_is_held_in_memory_as_it_is() {
        let mut file = tempfile::tempfile().unwrap();
        io::Write::write_all(&mut file, b"program").unwrap();
        assert_eq!(hold_in_memory(&file).unwrap()[..], *b"program");
    }

    #[test]
    fn guarded_secrets_are_in_no_core_dump() {
        guard_secrets().unwrap();
        assert_eq!(prctl::get_dumpable(), Ok(false));
        assert_eq!(getrlimit(Resource::RLIMIT_CORE), Ok((0, 0)));
    }
}
