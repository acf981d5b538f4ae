//! Prefetch hints: droppable by shape. Sending returns `()`; only a counter tells of a drop.

use crate::BlockRange;

/// "These blocks were asked for just now."
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hint(pub BlockRange);

/// The sending end of the bounded hint channel.
pub type HintSender = crossbeam_channel::Sender<Hint>;
/// The worker's end.
pub type HintReceiver = crossbeam_channel::Receiver<Hint>;

/// A channel that holds `capacity` hints.
pub fn channel(capacity: usize) -> (HintSender, HintReceiver) {
    crossbeam_channel::bounded(capacity)
}
