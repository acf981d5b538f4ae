//! How a command fails: one line for a person, one exit code for a script.

use std::{fmt, io, process::ExitCode};
use ublk_integrity::{
    DeviceError, Errno, KeyLength, Latched, ReadError, WriteError, create::FormatError, open::OpenError,
};

/// Exit codes, those of cryptsetup and one more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
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
#[derive(Debug)]
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
        Self::new(Exit::Device, e)
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
            FormatError::Device(d) => Exit::of_errno(d.errno.0),
            FormatError::TooSmall { .. } => Exit::Device,
            _ => Exit::Arguments,
        };
        Self::new(exit, e)
    }
}

impl From<OpenError> for Failure {
    fn from(e: OpenError) -> Self {
        let exit = match &e {
            OpenError::WrongKey { .. } => Exit::KeyOrPermission,
            OpenError::Tampered { .. } => Exit::Integrity,
            OpenError::Options(_) => Exit::Arguments,
            OpenError::Memory { .. } => Exit::Memory,
            OpenError::Device(d) => Exit::of_errno(d.errno.0),
            OpenError::NotAVolume
            | OpenError::Unknown(_)
            | OpenError::NotServed { .. }
            | OpenError::Damaged
            | OpenError::Foreign(_)
            | OpenError::OtherVolume { .. }
            | OpenError::LogUnreadable(_)
            | OpenError::Away(_)
            | OpenError::BelowSector(_)
            | OpenError::TooSmall { .. } => Exit::Device,
        };
        Self::new(exit, e)
    }
}
