//! `known-format`, not in the help: what of the on-disk format this program serves. Another one asks
//! that is to follow it, and must leave it a volume that it can open.

use crate::{failure::Outcome, output::Output};
use ublk_integrity::open::KnownFormat;

pub fn run() -> Outcome {
    Output::json(&KnownFormat::own()).print()
}
