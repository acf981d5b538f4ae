//! Multi-buffer hashing: single blocks of several requests of one thread, tagged side by side.
//!
//! Two digests take a processor hardly longer than one (see [`sha256`](crate::sha256)), but a request for one block has
//! only one to make. So it waits for the end of its thread's turn, and the first that goes on then makes the tags of all
//! that have come together, unless there were enough before.

use crate::{BlockIndex, BlockRange, Buf, Slot, Storage, Volume, format::Tag, sync::Mutex, tag::Tagger};
use std::sync::Arc;

/// As many as make full use of any processor's lanes: more would only keep the first of them waiting, and hide from the turn
/// how long it takes.
const ENOUGH: usize = 16;

/// Where the requests of one thread meet.
struct Meeting {
    /// By member.
    work: Vec<Option<Work>>,
    /// By member: made and not yet taken.
    tags: Vec<Option<Tag>>,
    /// Members whose tags are still to be made.
    waiting: Vec<usize>,
}

/// A block on its way to its tag.
struct Work {
    block: BlockIndex,
    buf: Buf,
    /// Where in `buf` it begins.
    at: usize,
}

/// A request's place in it.
pub(crate) struct Member {
    meeting: Arc<Mutex<Meeting>>,
    index: usize,
}

impl Member {
    /// Bytes that each takes in the meeting.
    pub(crate) const MEMORY_BYTES: usize = size_of::<Option<Work>>() + size_of::<Option<Tag>>() + size_of::<usize>();
}

impl Slot {
    /// Lets requests share work that is done faster for several than for each: for slots of one
    /// volume that one thread uses.
    pub fn work_together<'a>(slots: impl IntoIterator<Item = &'a mut Slot>) {
        let slots: Vec<_> = slots.into_iter().collect();
        let meeting = Arc::new(Mutex::new(Meeting::new(slots.len())));
        for (index, slot) in slots.into_iter().enumerate() {
            slot.member = Some(Member { meeting: Arc::clone(&meeting), index });
        }
    }
}

impl Meeting {
    fn new(members: usize) -> Self {
        Self {
            work: (0..members).map(|_| None).collect(),
            tags: vec![None; members],
            waiting: Vec::with_capacity(members),
        }
    }

    fn come(&mut self, index: usize, work: Work, tagger: &Tagger) {
        // Of a request that was dropped while it waited, the place in the list is still there.
        let waits = self.work[index].replace(work).is_some() && self.tags[index].is_none();
        self.tags[index] = None;
        if !waits {
            self.waiting.push(index);
        }
        if self.waiting.len() >= ENOUGH {
            self.make_tags(tagger);
        }
    }

    fn leave(&mut self, index: usize, tagger: &Tagger) -> (Tag, Buf) {
        if self.tags[index].is_none() {
            self.make_tags(tagger);
        }
        let (tag, work) = (self.tags[index].take(), self.work[index].take());
        tag.zip(work).map(|(tag, work)| (tag, work.buf)).expect("whoever came is there until it leaves")
    }

    fn make_tags(&mut self, tagger: &Tagger) {
        let Self { work, tags, waiting } = self;
        let block = |i: usize| {
            let Work { block, buf, at } = work[i].as_ref().expect("it waits");
            (*block, &buf[*at..*at + tagger.block_size()])
        };
        tagger.each(waiting.drain(..), block, |i, tag| tags[i] = Some(tag));
    }
}

impl Volume {
    /// The tag of the block at `at` in `buf`, made together with those of other requests; `None` where nothing is
    /// gained by that.
    pub(crate) async fn tag_in_company<S: Storage>(
        &self,
        io: &S,
        slot: &Slot,
        range: BlockRange,
        buf: Buf,
        at: usize,
    ) -> (Option<Tag>, Buf) {
        let Some(Member { meeting, index }) = &slot.member else { return (None, buf) };
        if range.count != 1 || !self.tagger.gains_by_company() {
            return (None, buf);
        }
        meeting.lock().come(*index, Work { block: range.first, buf, at }, &self.tagger);
        io.end_of_turn().await;
        let (tag, buf) = meeting.lock().leave(*index, &self.tagger);
        (Some(tag), buf)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{TagAlgorithm, tag::tests::tagger};
    use proptest::prelude::*;

    const BLOCK: usize = 512;

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Come {
            index: usize,
            fill: u8,
            block: u64,
        },
        Leave(usize),
        /// The request is dropped where it waits.
        Vanish(usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = (0..3, 0..20usize, any::<u8>(), 0..1000u64).prop_map(|(kind, index, fill, block)| match kind {
            0 => Step::Come { index, fill, block },
            1 => Step::Leave(index),
            _ => Step::Vanish(index),
        });
        prop::collection::vec(step, 1..60)
    }

    proptest! {
        #[test]
        fn each_gets_its_own_tag_and_buffer_whoever_comes_and_goes(steps in steps()) {
            let tagger = tagger(TagAlgorithm::HmacSha256, BLOCK as u32);
            let mut meeting = Meeting::new(20);
            let mut here = [None; 20];
            for step in steps {
                match step {
                    Step::Come { index, fill, block } if here[index].is_none() => {
                        let (block, at) = (BlockIndex(block), BLOCK * (fill as usize % 2));
                        let mut buf = Buf::new(2 * BLOCK);
                        buf[at..at + BLOCK].fill(fill);
                        let mut tag = [Tag::default()];
                        tagger.tags(block, &buf[at..at + BLOCK], &mut tag);
                        here[index] = Some((tag[0], buf.as_ptr()));
                        meeting.come(index, Work { block, buf, at }, &tagger);
                    }
                    Step::Leave(index) => {
                        if let Some(expected) = here[index].take() {
                            let (tag, buf) = meeting.leave(index, &tagger);
                            prop_assert_eq!((tag, buf.as_ptr()), expected);
                        }
                    }
                    Step::Vanish(index) => here[index] = None,
                    Step::Come { .. } => {}
                }
                prop_assert!(meeting.waiting.len() < ENOUGH, "enough are tagged at once");
            }
        }
    }
}
