//! An anchor of whichever kind.

use super::{AgentAnchor, FileAnchor};
use ublk_integrity::anchor::{Anchor, AnchorBytes, Replaced};

/// An anchor of whichever kind. Its calls block, and end within a limit.
pub enum AnyAnchor {
    /// In a file.
    File(FileAnchor),
    /// With an agent.
    Agent(AgentAnchor),
}

impl Anchor for AnyAnchor {
    async fn load(&self, volume: &[u8; 16]) -> Result<Option<AnchorBytes>, String> {
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
}
