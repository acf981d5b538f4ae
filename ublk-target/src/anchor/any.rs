//! An anchor of whichever kind.

use super::{AgentAnchor, FileAnchor, note};
use ublk_integrity::anchor::{Anchor, AnchorBytes, AnchorPurpose, AnchorUse, Beginning, Held, Replaced};

/// An anchor of whichever kind. Its calls block, and end within a limit.
pub enum AnyAnchor {
    /// In a file.
    File(FileAnchor),
    /// With an agent.
    Agent(AgentAnchor),
}

impl AnyAnchor {
    /// Whether a file has no body in it yet. An agent has one place for each volume.
    pub async fn holds_nothing(&self) -> bool {
        match self {
            Self::File(anchor) => anchor.load(&[0; 16]).await == Ok(Held::Nothing),
            Self::Agent(_) => true,
        }
    }

    /// For an open.
    pub fn used(&self, purpose: AnchorPurpose) -> AnchorUse<'_, Self> {
        AnchorUse { anchor: self, purpose, note: note() }
    }
}

impl Anchor for AnyAnchor {
    async fn load(&self, volume: &[u8; 16]) -> Result<Held, String> {
        match self {
            Self::File(anchor) => anchor.load(volume).await,
            Self::Agent(anchor) => anchor.load(volume).await,
        }
    }

    async fn replace(&self, volume: &[u8; 16], expected: u64, body: &AnchorBytes) -> Replaced {
        match self {
            Self::File(anchor) => anchor.replace(volume, expected, body).await,
            Self::Agent(anchor) => anchor.replace(volume, expected, body).await,
        }
    }

    fn is_counter(&self) -> bool {
        matches!(self, Self::Agent(anchor) if anchor.is_counter())
    }

    async fn era(&self, volume: &[u8; 16]) -> Result<u64, String> {
        match self {
            Self::File(anchor) => Anchor::era(anchor, volume).await,
            Self::Agent(anchor) => Anchor::era(anchor, volume).await,
        }
    }

    async fn forward(&self, volume: &[u8; 16], generation: u64) -> Replaced {
        match self {
            Self::File(anchor) => anchor.forward(volume, generation).await,
            Self::Agent(anchor) => anchor.forward(volume, generation).await,
        }
    }

    async fn retire(&self, volume: &[u8; 16], generation: u64) -> Result<(), String> {
        match self {
            Self::File(anchor) => anchor.retire(volume, generation).await,
            Self::Agent(anchor) => anchor.retire(volume, generation).await,
        }
    }

    async fn begin(&self, volume: &[u8; 16], held: &Held, above: u64) -> Result<Beginning, String> {
        match self {
            Self::File(anchor) => anchor.begin(volume, held, above).await,
            Self::Agent(anchor) => anchor.begin(volume, held, above).await,
        }
    }
}
