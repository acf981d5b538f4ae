//! Why an anchor's word can't be had, or is against what the devices hold.

use crate::{
    DeviceError, RecordNumber,
    format::{AnchorBody, BodyError, Unknown, uuid_text},
};

/// Why an anchor's word can't be had, or is against what the devices hold. Of none of these anything was written, but for
/// [`Taken`](Self::Taken) and [`Away`](Self::Away) at the end of an open: then the next open goes on where this one was.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum AnchorError {
    /// The superblock says that there is one, and none was named.
    #[error(
        "the volume on the metadata device has an anchor, without which nobody knows whether it is the newest state"
    )]
    Needed,
    /// It does not answer.
    #[error("the anchor can't be asked: {0}")]
    Away(String),
    /// It holds nothing.
    #[error("the anchor holds nothing of this volume")]
    Absent,
    /// It holds something already.
    #[error("the anchor holds a state already: generation {generation}{}", by(.host, *.seconds))]
    Present {
        /// Of the body.
        generation: u64,
        /// Who wrote it.
        host: String,
        /// When, in seconds since 1970.
        seconds: u64,
    },
    /// The volume has one already, or its first one was cut short.
    #[error("the volume on the metadata device says that it has an anchor already")]
    Begun,
    /// What it holds is no body, or its MAC does not hold.
    #[error("what the anchor holds is damaged or forged")]
    Damaged,
    /// What it holds is another volume's.
    #[error("the anchor is that of volume {0}")]
    OtherVolume(String),
    /// What it holds was written with another key.
    #[error("the anchor was written with another key of this volume")]
    OtherKey,
    /// What it holds is a newer program's.
    #[error(transparent)]
    Unknown(Unknown),
    /// It was moved to another place, or ended.
    #[error("the anchor was moved away or ended{}", by(.host, *.seconds))]
    MovedAway {
        /// By whom.
        host: String,
        /// When, in seconds since 1970.
        seconds: u64,
    },
    /// The anchor is a counter, and the disk does not hold the body that belongs to its value.
    #[error(
        "the metadata device holds an older or another state of the volume than its anchor says: the counter is at {counter}, and {}",
        bare(.newest.as_ref())
    )]
    Bare {
        /// What the counter says.
        counter: u64,
        /// The newest body that the disk holds of this volume: its generation, who wrote it, and when, in seconds since 1970.
        newest: Option<(u64, String, u64)>,
    },
    /// The devices hold an older state than the anchor says, or one that went another way.
    #[error(
        "the metadata device holds an older or another state of the volume than its anchor says{}: record {} was the next when the anchor was written{}",
        behind(*.followed_to), .least, by(.host, *.seconds)
    )]
    Older {
        /// The number that the next record has by the anchor.
        least: RecordNumber,
        /// The same by the devices, where they are at the same life of the volume.
        followed_to: Option<RecordNumber>,
        /// Who wrote the anchor.
        host: String,
        /// When, in seconds since 1970.
        seconds: u64,
    },
    /// The key that opens the volume was had from another key area than the anchor says: slots that were removed since may be in it.
    #[error(
        "the key area on the metadata device is an older or another one than its anchor says: {}, and {} when the anchor was written{}",
        area(*.found), area(Some(*.anchored)), by(.host, *.seconds)
    )]
    KeyArea {
        /// Its generation by the anchor.
        anchored: u64,
        /// That of the one that was found; `None`: the key was not had from one.
        found: Option<u64>,
        /// Who wrote the anchor.
        host: String,
        /// When, in seconds since 1970.
        seconds: u64,
    },
    /// The bodies of a counter can't be written to the metadata device.
    #[error("the anchor's body can't be written: {0}")]
    Device(DeviceError),
    /// The log has got as far as could be read, and its rest may have what the anchor says.
    #[error(
        "a record of the tag log can't be read, so nothing proves that this is the state that the anchor speaks of: {0}"
    )]
    Unread(DeviceError),
    /// Somebody else has opened the volume since.
    #[error("somebody else has opened the volume since{}", by(.host, *.seconds))]
    Taken {
        /// Who.
        host: String,
        /// When the anchor was written, in seconds since 1970.
        seconds: u64,
    },
}

/// Words for a record that the devices have got to.
fn behind(followed_to: Option<RecordNumber>) -> String {
    followed_to.map(|number| format!(", it has got to record {number}")).unwrap_or_default()
}

/// Words for which key area it is.
fn area(generation: Option<u64>) -> String {
    generation.map_or("the key was not had from one".into(), |generation| format!("it was of generation {generation}"))
}

/// Words for the bodies that the disk has instead.
fn bare(newest: Option<&(u64, String, u64)>) -> String {
    match newest {
        Some((generation, host, seconds)) => {
            format!("the newest body there is of generation {generation}{}", by(host, *seconds))
        }
        None => "no body of it is there".into(),
    }
}

/// Nothing where it is not known.
fn by(host: &str, seconds: u64) -> String {
    if seconds == 0 {
        return String::new();
    }
    let host = if host.is_empty() { String::new() } else { format!(" by {host}") };
    format!("{host} at {}", utc(seconds))
}

/// A moment as text, in UTC (civil-from-days of Howard Hinnant).
fn utc(seconds: u64) -> String {
    let (days, rest) = ((seconds / 86_400) as i64 + 719_468, seconds % 86_400);
    let (era, of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year}-{month:02}-{day:02} {:02}:{:02}:{:02} UTC", rest / 3600, rest / 60 % 60, rest % 60)
}

impl AnchorError {
    pub(super) fn bare(counter: u64, older: Option<&AnchorBody>) -> Self {
        let newest = older.map(|body| (body.generation, body.host.to_string(), body.written_seconds));
        Self::Bare { counter, newest }
    }

    pub(super) fn taken(by: &AnchorBody) -> Self {
        Self::Taken { host: by.host.to_string(), seconds: by.written_seconds }
    }
}

impl From<BodyError> for AnchorError {
    fn from(e: BodyError) -> Self {
        match e {
            BodyError::Damaged => Self::Damaged,
            BodyError::OtherVolume(uuid) => Self::OtherVolume(uuid_text(&uuid)),
            BodyError::OtherKey => Self::OtherKey,
            BodyError::Unknown(unknown) => Self::Unknown(unknown),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_told_as_people_write_them() {
        assert_eq!(utc(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(utc(951_782_400), "2000-02-29 00:00:00 UTC");
        assert_eq!(utc(1_796_009_347), "2026-11-30 03:29:07 UTC");
        assert_eq!(utc(4_107_542_399), "2100-02-28 23:59:59 UTC");
    }
}
