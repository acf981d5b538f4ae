//! Why a volume can't be opened.

use crate::{
    BelowSector, DeviceError, RecordNumber, anchor::AnchorError, format::Unknown, lifecycle::grow_error::GrowError,
};

/// Why a volume can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// No superblock anywhere.
    #[error("no ublk-integrity volume on the metadata device")]
    NotAVolume,
    /// Something on the devices is whole, and not what this program knows.
    #[error(transparent)]
    Unknown(#[from] Unknown),
    /// The volume has features that this program can show, but not serve.
    #[error(
        "the volume on the metadata device needs what this program does not do ({features}): `dump` shows it, a newer program opens it"
    )]
    NotServed {
        /// Those that are not served, in words.
        features: String,
    },
    /// Both copies fail their checksums.
    #[error("both superblock copies on the metadata device are damaged")]
    Damaged,
    /// The key is not this volume's.
    #[error("wrong key for volume {uuid} on the metadata device")]
    WrongKey {
        /// The volume.
        uuid: String,
    },
    /// No key slot is opened by what was given.
    #[error("no key slot of volume {uuid} on the metadata device is opened by this key or passphrase")]
    NoSlotOpens {
        /// The volume.
        uuid: String,
    },
    /// A passphrase, and the volume has no slot that it could open.
    #[error("the volume on the metadata device has no key slots: it is opened by its key, not by a passphrase")]
    NoKeySlots,
    /// Both copies of the key area are damaged.
    #[error("both copies of the key area of volume {uuid} on the metadata device are damaged: its key can't be had")]
    KeyAreaDamaged {
        /// The volume.
        uuid: String,
    },
    /// There is not the memory for a guess at a passphrase.
    #[error("trying the passphrase takes {needed} bytes of memory, which can't be had")]
    PassphraseMemory {
        /// What a guess takes.
        needed: u64,
    },
    /// Right key, but a MAC does not hold, or copies contradict each other, or the log is newer
    /// than the superblock.
    #[error("the {what} was tampered with")]
    Tampered {
        /// What.
        what: &'static str,
    },
    /// The data device is not the one that belongs to this metadata, or the other way round.
    #[error("{0}")]
    Foreign(String),
    /// The device is smaller than the volume.
    #[error("the {device} has {have} bytes, the volume needs {need}")]
    TooSmall {
        /// Which.
        device: crate::Device,
        /// Its size.
        have: u64,
        /// What the volume needs.
        need: u64,
    },
    /// The device transfers more at least than the volume reads and writes.
    #[error(transparent)]
    BelowSector(#[from] BelowSector),
    /// It was to grow, and can't.
    #[error(transparent)]
    Grow(#[from] GrowError),
    /// More memory than [`OpenOptions::max_memory_bytes`](crate::OpenOptions::max_memory_bytes), or
    /// than there is.
    #[error("opening the volume takes {needed} bytes of memory at least, {available} can be had")]
    Memory {
        /// What it takes, as far as is known.
        needed: u64,
        /// What it may take.
        available: u64,
    },
    /// An option makes no sense.
    #[error("{0}")]
    Options(String),
    /// Another volume than the one that was asked for.
    #[error("the metadata device holds volume {found}, not {expected}: nothing was done")]
    OtherVolume {
        /// The UUID that was asked for.
        expected: String,
        /// The one that is there.
        found: String,
    },
    /// The log ends before a record that is known to have been there.
    #[error(
        "the devices hold an older state of the volume: its log goes on with record {next}, and had got to {least}"
    )]
    OlderState {
        /// The number that its next record would have.
        next: RecordNumber,
        /// The number that it has at least, by what is known
        /// ([`OpenOptions::first_not_durable`](crate::OpenOptions::first_not_durable)).
        least: RecordNumber,
    },
    /// A part of the log can't be read, and the newest changes may lie there.
    #[error("the tag log can't be read, the newest changes may be in it: {0}")]
    LogUnreadable(DeviceError),
    /// After a failed read of the device none has succeeded, neither of what the open reads nor of
    /// the places that it probes: for 9 s, or for 40 s where everything is tried
    /// ([`UnreadableBlocks::TakeNewest`](crate::open::UnreadableBlocks::TakeNewest), a rescue).
    #[error("not one read succeeds any more, that device seems to be away; nothing was done: {0}")]
    Away(DeviceError),
    /// The anchor can't be asked, or is against what the devices hold.
    #[error(transparent)]
    Anchor(#[from] AnchorError),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}
