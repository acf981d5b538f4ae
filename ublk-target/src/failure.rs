//! How a command fails: one line for a person, one exit code for a script.

mod anchored;

use self::anchored::{about_anchor, exit_of_anchor};
use crate::{key_hint::newline_hint, size::Size};
use nix::sys::resource::{Resource, getrlimit};
use serde::Serialize;
use std::{fmt, io, path::Path, process::ExitCode};
use ublk_integrity::{
    AnchorLoss, Device, DeviceError, Errno, KeyLength, Latched, ReadError, WriteError,
    create::FormatError,
    heal::HealError,
    key_slots::SlotError,
    open::{GrowError, OpenError},
};

/// Exit codes, those of cryptsetup and one more.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum Exit {
    /// The arguments make no sense.
    Arguments = 1,
    /// The key is wrong, or permission is missing.
    KeyOrPermission = 2,
    /// Memory does not suffice.
    Memory = 3,
    /// The device is not there, not ours, broken, or the kernel has no ublk.
    Device = 4,
    /// In use, or there already.
    Busy = 5,
    /// Something does not match its tag.
    Integrity = 6,
    /// A signal ended it before it was done.
    Interrupted = 7,
    /// What it had to say can't be written.
    Output = 8,
}

impl Exit {
    /// The code as it travels from the daemon to the command that started it.
    pub fn from_code(code: u8) -> Self {
        match code {
            1 => Self::Arguments,
            2 => Self::KeyOrPermission,
            3 => Self::Memory,
            5 => Self::Busy,
            6 => Self::Integrity,
            7 => Self::Interrupted,
            8 => Self::Output,
            _ => Self::Device,
        }
    }

    fn of_errno(errno: i32) -> Self {
        match errno {
            libc::EACCES | libc::EPERM => Self::KeyOrPermission,
            libc::ENOMEM => Self::Memory,
            libc::EBUSY | libc::EEXIST | libc::ETXTBSY | libc::EWOULDBLOCK => Self::Busy,
            libc::EILSEQ => Self::Integrity,
            _ => Self::Device,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Why a command failed.
#[derive(Clone, Debug)]
pub struct Failure {
    /// What the process exits with.
    pub exit: Exit,
    /// What is wrong, with which value, and what to do; one line.
    pub message: String,
}

/// What a command comes back with.
pub type Outcome<T = ()> = Result<T, Failure>;

impl Failure {
    /// A failure with its exit code.
    pub fn new(exit: Exit, message: impl fmt::Display) -> Self {
        Self { exit, message: message.to_string() }
    }

    /// A failed system call: `what` was being done.
    pub fn io(what: impl fmt::Display, error: &io::Error) -> Self {
        let exit = match error.kind() {
            io::ErrorKind::PermissionDenied => Exit::KeyOrPermission,
            io::ErrorKind::OutOfMemory => Exit::Memory,
            _ => error.raw_os_error().map_or(Exit::Device, Exit::of_errno),
        };
        Self::new(exit, format_args!("{what}: {}", plain(error)))
    }

    /// The same failure, with another exit code.
    pub fn exiting(self, exit: Exit) -> Self {
        Self { exit, ..self }
    }

    /// The same failure, which has been told to the user already.
    pub fn told(self) -> Self {
        Self { message: String::new(), ..self }
    }

    /// Puts words in front of the message.
    pub fn context(self, what: impl fmt::Display) -> Self {
        Self { message: format!("{what}: {}", self.message), ..self }
    }
}

/// The library's words for a device with the path in their place: it knows neither the paths nor
/// that there may be one device only, whose data and metadata it calls by different names.
pub fn with_paths(text: &str, data: &Path, meta: Option<&Path>) -> String {
    let put =
        |text: &str, device: Device, path: &Path| text.replace(&format!("the {device}"), &path.display().to_string());
    put(&put(text, Device::Meta, meta.unwrap_or(data)), Device::Data, data)
}

/// io_uring that is not to be had: who forbids it, or which limit is met.
pub fn no_ring(e: &io::Error) -> Failure {
    let failure = Failure::io("can't set up io_uring", e);
    let setting = || std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
    let limit = getrlimit(Resource::RLIMIT_MEMLOCK).map_or(u64::MAX, |(soft, _)| soft);
    match why_no_ring(e.raw_os_error().unwrap_or(0), setting().trim(), limit) {
        Some(why) => Failure { message: format!("{failure}: {why}"), ..failure },
        None => failure,
    }
}

fn why_no_ring(errno: i32, setting: &str, memlock: u64) -> Option<String> {
    match (errno, setting) {
        (libc::EPERM, "1" | "2") => Some(format!(
            "kernel.io_uring_disabled is {setting}: `sysctl kernel.io_uring_disabled=0` allows it to all, 1 to root"
        )),
        (libc::EPERM, _) => Some("a seccomp filter forbids it, as those of containers do".into()),
        (libc::ENOSYS, _) => Some("the kernel is built without it, or a container's filter hides it".into()),
        (libc::ENOMEM, _) if memlock != libc::RLIM_INFINITY => {
            Some(format!("the limit of locked memory is {}: raise it (`ulimit -l`, LimitMEMLOCK=)", Size(memlock)))
        }
        _ => None,
    }
}

/// The error without "(os error 2)", which tells nobody anything.
pub fn plain(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(code) => nix::errno::Errno::from_raw(code).desc().to_owned(),
        None => error.to_string(),
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// Names what was being done when an error came up.
pub trait Context<T> {
    /// `what: error`.
    fn doing(self, what: impl fmt::Display) -> Outcome<T>;
}

impl<T> Context<T> for io::Result<T> {
    fn doing(self, what: impl fmt::Display) -> Outcome<T> {
        self.map_err(|e| Failure::io(what, &e))
    }
}

impl<T> Context<T> for nix::Result<T> {
    fn doing(self, what: impl fmt::Display) -> Outcome<T> {
        self.map_err(|e| Failure::io(what, &e.into()))
    }
}

impl<T> Context<T> for Outcome<T> {
    fn doing(self, what: impl fmt::Display) -> Outcome<T> {
        self.map_err(|e| e.context(what))
    }
}

impl From<DeviceError> for Failure {
    fn from(e: DeviceError) -> Self {
        Self::new(Exit::of_errno(e.errno.0), e)
    }
}

impl From<KeyLength> for Failure {
    fn from(e: KeyLength) -> Self {
        Self::new(Exit::KeyOrPermission, e)
    }
}

impl From<Latched> for Failure {
    fn from(e: Latched) -> Self {
        Self::new(Exit::Device, format_args!("{e}; {}", way_out(e)))
    }
}

/// What to do about a volume that nothing can be written to.
pub fn way_out(why: Latched) -> &'static str {
    match why {
        Latched::Undecided(_) => "it goes on once that can be read, and `add --decide-unreadable` gives such blocks up",
        Latched::Abandoned | Latched::Closed => "`del` and `add` open it anew",
        Latched::Anchor(AnchorLoss::Taken) => "`del` ends it here; who has opened it since goes on",
        Latched::Anchor(AnchorLoss::Away) => "once the anchor is there, `del` and `add` open it anew",
        Latched::Device(_) | Latched::WriteBack(_) | Latched::UnknownBlock(_) | Latched::Superblock(_) => {
            "mend or replace that device, and open it anew"
        }
    }
}

impl From<ReadError> for Failure {
    fn from(e: ReadError) -> Self {
        Self::new(if e.errno() == Errno::EILSEQ { Exit::Integrity } else { Exit::Device }, e)
    }
}

impl From<WriteError> for Failure {
    fn from(e: WriteError) -> Self {
        Self::new(Exit::Device, e)
    }
}

impl From<FormatError> for Failure {
    fn from(e: FormatError) -> Self {
        let exit = match &e {
            FormatError::Slot(e) => return Self::new(exit_of_slot(e), e),
            FormatError::Device(d) => Exit::of_errno(d.errno.0),
            FormatError::TooSmall { .. } => Exit::Device,
            _ => Exit::Arguments,
        };
        Self::new(exit, e)
    }
}

impl From<SlotError> for Failure {
    fn from(e: SlotError) -> Self {
        match e {
            SlotError::Open(e) => e.into(),
            e => Self::new(exit_of_slot(&e), e),
        }
    }
}

fn exit_of_slot(e: &SlotError) -> Exit {
    match e {
        SlotError::Full(_) | SlotError::Empty(_) | SlotError::Own(_) => Exit::Arguments,
        SlotError::Memory(_) => Exit::Memory,
        SlotError::Changed => Exit::Busy,
        SlotError::Open(_) => Exit::Device,
        SlotError::Settle(d) | SlotError::FirstCopy(d) | SlotError::SecondCopy(d) => Exit::of_errno(d.errno.0),
    }
}

impl From<HealError> for Failure {
    fn from(e: HealError) -> Self {
        match e {
            HealError::Refused(e) => e.into(),
            HealError::TagLost { .. } => Self::new(Exit::Integrity, e),
            HealError::NotInPlace(_) => Self::new(Exit::Busy, e),
            HealError::StillBad(..) => Self::new(Exit::Device, e),
        }
    }
}

impl From<OpenError> for Failure {
    fn from(e: OpenError) -> Self {
        let exit = match &e {
            OpenError::WrongKey { .. } | OpenError::NoSlotOpens { .. } => {
                return Self::new(Exit::KeyOrPermission, format_args!("{e}{}", newline_hint()));
            }
            OpenError::NoKeySlots => Exit::KeyOrPermission,
            OpenError::PassphraseMemory { .. } => Exit::Memory,
            OpenError::Tampered { .. } => Exit::Integrity,
            OpenError::LogUnreadable(_) => {
                return Self::new(Exit::Device, format_args!("{e} (`export --rescue` takes out what can be had)"));
            }
            OpenError::Grow(GrowError::NoRoom { .. }) => Exit::Device,
            OpenError::Options(_) | OpenError::Grow(_) => Exit::Arguments,
            OpenError::Anchor(e) => exit_of_anchor(e),
            OpenError::Memory { .. } => Exit::Memory,
            OpenError::Device(d) => Exit::of_errno(d.errno.0),
            OpenError::NotAVolume
            | OpenError::Unknown(_)
            | OpenError::NotServed { .. }
            | OpenError::Damaged
            | OpenError::KeyAreaDamaged { .. }
            | OpenError::Foreign(_)
            | OpenError::OtherVolume { .. }
            | OpenError::OlderState { .. }
            | OpenError::Away(_)
            | OpenError::BelowSector(_)
            | OpenError::TooSmall { .. } => Exit::Device,
        };
        Self::new(exit, format_args!("{e}{}", what_to_do(&e)))
    }
}

/// What to do about a volume that can't be opened, where the error does not say.
fn what_to_do(e: &OpenError) -> &'static str {
    match e {
        OpenError::NotAVolume => ": is it another device? `format` makes a volume",
        OpenError::Damaged => ": put back a copy of its first MiB, or try another path to the device",
        OpenError::Tampered { .. } => ": what it vouches for can't be told from a forgery; use a backup",
        OpenError::TooSmall { .. } => ": is it another device, or cut short?",
        OpenError::OtherVolume { .. } => ", is it another device?",
        OpenError::Anchor(e) => about_anchor(e),
        OpenError::Device(_) => ": mend or replace that device",
        OpenError::Away(_) => "; try again when it is back",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_forbids_io_uring_is_named() {
        let why = |errno, setting, limit| why_no_ring(errno, setting, limit).unwrap_or_default();
        assert!(why(libc::EPERM, "2", 0).contains("kernel.io_uring_disabled is 2"));
        assert!(why(libc::EPERM, "0", 0).contains("seccomp") && why(libc::EPERM, "", 0).contains("seccomp"));
        assert!(why(libc::ENOMEM, "0", 64 << 10).contains("64.00 KiB"));
        assert_eq!(why_no_ring(libc::ENOMEM, "0", libc::RLIM_INFINITY), None);
        assert_eq!(no_ring(&io::Error::from_raw_os_error(libc::EPERM)).exit, Exit::KeyOrPermission);
    }

    #[test]
    fn paths_stand_for_the_librarys_words() {
        let (data, meta) = (Path::new("/dev/a"), Path::new("/dev/b"));
        let error = |device| OpenError::TooSmall { device, have: 1, need: 2 }.to_string();
        assert_eq!(with_paths(&error(Device::Meta), data, Some(meta)), "/dev/b has 1 bytes, the volume needs 2");
        assert_eq!(with_paths(&error(Device::Meta), data, None), "/dev/a has 1 bytes, the volume needs 2");
        assert_eq!(with_paths(&error(Device::Data), data, Some(meta)), "/dev/a has 1 bytes, the volume needs 2");
    }
}
