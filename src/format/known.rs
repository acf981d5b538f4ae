//! What of the format a program knows, for another that is to follow it.

use super::{
    Feature,
    record::{KIND_FLUSH, KIND_PAYLOAD, KIND_TAGS, KIND_ZEROS},
    superblock::{VERSION_1, VERSION_2},
};
use serde::{Deserialize, Serialize};

/// What of the on-disk format a program serves: it opens no volume that says more.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct KnownFormat {
    /// Versions of the superblock.
    pub versions: Vec<u32>,
    /// Features, by their names.
    pub features: Vec<String>,
    /// Kinds of log entries, by their numbers.
    pub entry_kinds: Vec<u32>,
}

impl KnownFormat {
    /// Of this library.
    pub fn own() -> Self {
        Self {
            versions: vec![VERSION_1, VERSION_2],
            features: Feature::ALL.into_iter().filter(|feature| feature.is_served()).map(Feature::word).collect(),
            entry_kinds: vec![KIND_TAGS, KIND_ZEROS, KIND_FLUSH, KIND_PAYLOAD],
        }
    }

    /// Whether a volume that is open with a sync log can be left to such a program.
    pub fn serves_sync_log(&self) -> bool {
        self.versions.contains(&VERSION_2)
            && self.features.contains(&Feature::SyncLog.word())
            && self.entry_kinds.contains(&KIND_PAYLOAD)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_known_by_what_it_says() {
        let own = KnownFormat::own();
        assert_eq!(
            own.features,
            ["separate_metadata", "anchored", "key_area", "explicit_places", "sync_log"].map(String::from)
        );
        assert!(own.serves_sync_log());
        for less in [
            KnownFormat { versions: vec![1], ..own.clone() },
            KnownFormat { features: vec!["separate_metadata".into()], ..own.clone() },
            KnownFormat { entry_kinds: vec![1, 2, 3], ..own.clone() },
        ] {
            assert!(!less.serves_sync_log(), "{less:?}");
        }
    }
}
