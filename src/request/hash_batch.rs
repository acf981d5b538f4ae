//! Computing tags: in batches over the requests of a thread, here or on another thread.
//!
//! ```text
//!   few blocks ───> hash batch of the thread ─┐ full, or the batch boundary
//!   many blocks ──> the batch boundary ───────┴─> group ──> a hash worker, if one is idle and this thread has more to do
//!                                                   └─────> else this thread, at once
//! ```
//!
//! Two digests take a processor hardly longer than one (see [`sha256`](crate::crypto::sha256)), but
//! a request for one block has only one to compute. So it waits for the batch boundary of its
//! thread. The first request that goes on then computes the tags of all that wait. If
//! enough blocks have come before the boundary, they are hashed at once.
//!
//! A request for many blocks takes long to hash. It waits for the boundary, too: so the answers and
//! records that others wait for are submitted before.
//!
//! A group goes to an idle hash worker, or is queued for the next one. Hash workers wait for
//! nothing but jobs, so a request that waits for its group waits for hashing alone.

use crate::{
    BlockIndex, Buf, Io, Phase,
    crypto::{lanes::MAX_LANES, tagger::Tagger},
    format::Tag,
    sync::Mutex,
};
use arrayvec::ArrayVec;
use std::{
    fmt,
    future::poll_fn,
    iter::once,
    sync::Arc,
    task::{Poll, Waker},
};

/// Blocks that are enough for any processor's lanes. With more, the first would only wait longer,
/// and the scheduler could not end the batch in time.
const ENOUGH: usize = 2 * MAX_LANES;

/// Bytes that are worth waking another thread for.
const WORTH: usize = 32 << 10;

/// Threads that hash for those that serve requests: hash workers.
#[derive(Clone)]
pub struct HashThreads(Arc<Offer>);

/// Hands a job to a thread that [runs](HashJob::run) it; gives it back at once where none wants one.
type Offer = dyn Fn(HashJob) -> Option<HashJob> + Send + Sync;

impl HashThreads {
    /// `offer` takes a job, or gives it back at once where no thread wants one. It may queue a job,
    /// if a thread that waits for nothing else is sure to run it: the request whose blocks these
    /// are waits for that.
    pub fn new(offer: impl Fn(HashJob) -> Option<HashJob> + Send + Sync + 'static) -> Self {
        Self(Arc::new(offer))
    }
}

impl fmt::Debug for HashThreads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HashThreads")
    }
}

/// Blocks whose tags another thread makes.
pub struct HashJob {
    group: Group,
    tagger: Arc<Tagger>,
}

impl HashJob {
    /// Makes the tags and wakes the requests that wait for them. Never waits for I/O or for a
    /// request.
    pub fn run(self) {
        self.group.make_tags(&self.tagger);
    }
}

/// The blocks of one request whose tags are to be made, and where these go.
pub(crate) struct HashWork {
    pub(crate) first: BlockIndex,
    pub(crate) buf: Buf,
    /// Where in `buf` they begin.
    pub(crate) at: usize,
    /// How many.
    pub(crate) count: usize,
    /// At least as many.
    pub(crate) tags: Vec<Tag>,
}

/// How far a request of the thread is.
enum Progress {
    /// It has nothing to hash.
    Free,
    /// Its tags are still to be made.
    Waiting(HashWork),
    /// It is in a group, and this is woken when that is done.
    Away(Option<Waker>),
    /// Its tags have been made.
    Ready(HashWork),
}

/// The requests of one thread whose tags are computed together.
struct HashBatch {
    /// By request of the thread.
    progress: Vec<Progress>,
    /// The requests whose tags are still to be made, unless they alone have enough blocks.
    waiting: ArrayVec<usize, ENOUGH>,
    /// Memory of groups that are done.
    spares: Vec<HashWorks>,
}

/// Work, each with its request. On the heap, for it is moved often.
type HashWorks = Vec<(usize, HashWork)>;

/// Work that was taken out of a batch, to be done at once.
struct Group {
    batch: Arc<Mutex<HashBatch>>,
    works: HashWorks,
}

/// A request's handle on the hash batch of its thread.
pub(crate) struct BatchHandle {
    batch: Arc<Mutex<HashBatch>>,
    index: usize,
}

impl BatchHandle {
    /// Bytes that each request takes in the batch.
    pub(crate) const MEMORY_BYTES: usize = size_of::<Progress>() + ENOUGH * size_of::<(usize, HashWork)>();

    /// The handles of so many requests on one batch.
    pub(crate) fn several(count: usize) -> impl Iterator<Item = Self> {
        let batch = Arc::new(Mutex::new(HashBatch::new(count)));
        (0..count).map(move |index| Self { batch: Arc::clone(&batch), index })
    }
}

impl HashBatch {
    fn new(requests: usize) -> Self {
        Self {
            progress: (0..requests).map(|_| Progress::Free).collect(),
            waiting: ArrayVec::new(),
            // A group has one request at least, so there are never more groups.
            spares: (0..requests).map(|_| Vec::with_capacity(ENOUGH)).collect(),
        }
    }

    /// Adds the work of a request; returns how many blocks can be hashed together now. `alone`: its
    /// own are enough. The work comes back where that of an earlier request with this index, which
    /// was dropped, is still in a group.
    fn submit(&mut self, index: usize, work: HashWork, alone: bool) -> Result<usize, HashWork> {
        match &self.progress[index] {
            Progress::Away(_) => return Err(work),
            // A request that was dropped while it waited may still be in the list.
            Progress::Waiting(_) => self.waiting.retain(|i| *i != index),
            _ => {}
        }
        self.progress[index] = Progress::Waiting(work);
        if alone {
            return Ok(ENOUGH);
        }
        self.waiting.push(index);
        let blocks = |i: &usize| if let Progress::Waiting(work) = &self.progress[*i] { work.count } else { 0 };
        Ok(self.waiting.iter().map(blocks).sum())
    }

    /// Takes the work of this request, and that of all in the list if it is one of them. Nothing,
    /// if it does not wait any more.
    fn take_for(&mut self, index: usize) -> HashWorks {
        let Self { progress, waiting, spares } = self;
        if !matches!(progress[index], Progress::Waiting(_)) {
            return HashWorks::new();
        }
        let mut works = spares.pop().expect("as many as there are requests");
        let mut take = |i: usize| match std::mem::replace(&mut progress[i], Progress::Away(None)) {
            Progress::Waiting(work) => (i, work),
            _ => unreachable!("it is in the list, or was found waiting"),
        };
        match waiting.contains(&index) {
            true => works.extend(waiting.drain(..).map(take)),
            false => works.push(take(index)),
        }
        works
    }

    /// The work with its tags, or pending: then the waker is called when the tags are made.
    fn poll_ready(&mut self, index: usize, waker: &Waker) -> Poll<HashWork> {
        let progress = &mut self.progress[index];
        match progress {
            Progress::Away(waiter) => {
                *waiter = Some(waker.clone());
                Poll::Pending
            }
            _ => match std::mem::replace(progress, Progress::Free) {
                Progress::Ready(work) => Poll::Ready(work),
                _ => unreachable!("it was submitted, and is polled until it is ready"),
            },
        }
    }
}

impl Group {
    fn make_tags(mut self, tagger: &Tagger) {
        tag_all(tagger, self.works.iter_mut().map(|(_, work)| work));
        let mut wakers = ArrayVec::<Waker, ENOUGH>::new();
        let mut batch = self.batch.lock();
        for (index, work) in self.works.drain(..) {
            if let Progress::Away(Some(waker)) = std::mem::replace(&mut batch.progress[index], Progress::Ready(work)) {
                wakers.push(waker);
            }
        }
        batch.spares.push(self.works);
        drop(batch);
        wakers.into_iter().for_each(Waker::wake);
    }
}

/// Makes the tags of all blocks, as many side by side as the processor has lanes.
fn tag_all<'w>(tagger: &Tagger, works: impl Iterator<Item = &'w mut HashWork>) {
    let (mut blocks, mut tags) = (ArrayVec::<_, ENOUGH>::new(), ArrayVec::<_, ENOUGH>::new());
    for HashWork { first, buf, at, count, tags: out } in works {
        let bytes = *at..*at + *count * tagger.block_size();
        blocks.push((*count, tagger.consecutive(*first, &buf[bytes])));
        tags.push(out);
    }
    let counts = blocks.iter().map(|(count, _)| *count).enumerate();
    let which = counts.flat_map(|(i, count)| (0..count).map(move |n| (i, n)));
    tagger.each(which, |(i, n)| blocks[i].1(n), |(i, n), tag| tags[i][n] = tag);
}

/// Makes the tags of blocks: here, side by side with those of other requests, or on another thread.
pub(crate) struct Hasher {
    tagger: Arc<Tagger>,
    threads: Option<HashThreads>,
}

impl Hasher {
    pub(crate) fn new(tagger: Arc<Tagger>, threads: Option<HashThreads>) -> Self {
        Self { tagger, threads }
    }

    pub(crate) fn tagger(&self) -> &Tagger {
        &self.tagger
    }

    /// Makes the tags, together with other requests in `batch` where that pays.
    pub(crate) async fn make_tags<S: Io>(&self, io: &S, batch: Option<&BatchHandle>, mut work: HashWork) -> HashWork {
        let count = work.count;
        if !self.tagger.is_short_batch(count) {
            io.batch_boundary(Phase::Hash).await;
        }
        let alone = self.threads.is_some() && count * self.tagger.block_size() >= WORTH && io.runnable() > 0;
        let together = alone || self.tagger.benefits_from_batching(count);
        match batch {
            Some(batch) if together => self.tag_together(io, batch, work, alone).await,
            _ => {
                self.tag_here(io, &mut work);
                work
            }
        }
    }

    fn tag_here<S: Io>(&self, io: &S, work: &mut HashWork) {
        tag_all(&self.tagger, once(work));
        io.charge();
    }

    async fn tag_together<S: Io>(&self, io: &S, handle: &BatchHandle, work: HashWork, alone: bool) -> HashWork {
        let BatchHandle { batch, index } = handle;
        let submitted = batch.lock().submit(*index, work, alone);
        match submitted {
            Ok(blocks) if !self.tagger.is_short_batch(blocks) => self.run_batch(io, handle),
            Ok(_) => {
                io.batch_boundary(Phase::Hash).await;
                self.run_batch(io, handle);
            }
            Err(mut work) => {
                self.tag_here(io, &mut work);
                return work;
            }
        }
        poll_fn(|cx| batch.lock().poll_ready(*index, cx.waker())).await
    }

    /// Makes the tags of the request and of those that wait with it, unless another request has
    /// done so. They are made by a hash worker where one is idle, the blocks are worth it and this
    /// thread has more to do than this group; else here.
    fn run_batch<S: Io>(&self, io: &S, BatchHandle { batch, index }: &BatchHandle) {
        let works = batch.lock().take_for(*index);
        if works.is_empty() {
            return;
        }
        let blocks: usize = works.iter().map(|(_, work)| work.count).sum();
        // The requests of the group count as runnable, too: they can go on as soon as it is done.
        let worth = blocks * self.tagger.block_size() >= WORTH && io.runnable() >= works.len();
        let group = Group { batch: Arc::clone(batch), works };
        let job = HashJob { group, tagger: Arc::clone(&self.tagger) };
        let left = match &self.threads {
            Some(HashThreads(offer)) if worth => offer(job),
            _ => Some(job),
        };
        if let Some(job) = left {
            job.run();
            io.charge();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{TagAlgorithm, crypto::tagger::tests::tagger, format::ZERO_TAG};
    use proptest::prelude::*;

    const BLOCK: usize = 512;
    const REQUESTS: usize = 20;
    const MOST: usize = 20;

    #[derive(Clone, Copy, Debug)]
    enum Step {
        /// A request submits work, and has it done or waits for others.
        Submit { index: usize, fill: u8, first: u64, count: usize },
        /// It goes on after the batch boundary, and ends if its tags are made.
        GoOn(usize),
        /// One of the groups at work elsewhere is done.
        Done(usize),
        /// The request is dropped.
        Drop(usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let counts = prop_oneof![3 => Just(1), 1 => 1..=MOST];
        let step = (0..8, 0..REQUESTS, any::<u8>(), 0..1000u64, counts).prop_map(
            |(kind, index, fill, first, count)| match kind {
                0..=3 => Step::Submit { index, fill, first, count },
                4 | 5 => Step::GoOn(index),
                6 => Step::Done(index),
                _ => Step::Drop(index),
            },
        );
        prop::collection::vec(step, 1..80)
    }

    /// The tags that a request waits for, and where its buffer lies.
    type Expected = (Vec<Tag>, *const u8);

    struct Test {
        tagger: Tagger,
        batch: Arc<Mutex<HashBatch>>,
        /// Groups at work elsewhere.
        elsewhere: Vec<Group>,
        here: [Option<Expected>; REQUESTS],
    }

    impl Test {
        fn submit(&mut self, index: usize, fill: u8, first: u64, count: usize) {
            let (first, at) = (BlockIndex(first), BLOCK * (fill as usize % 2));
            let mut buf = Buf::new((MOST + 1) * BLOCK);
            let bytes = at..at + count * BLOCK;
            buf[bytes.clone()].iter_mut().enumerate().for_each(|(i, byte)| *byte = fill ^ (i / BLOCK) as u8);
            let mut tags = vec![ZERO_TAG; count];
            self.tagger.tags(first, &buf[bytes], &mut tags);
            let address = buf.as_ptr();
            let work = HashWork { first, buf, at, count, tags: vec![ZERO_TAG; MOST] };
            let submitted = self.batch.lock().submit(index, work, count >= ENOUGH);
            match submitted {
                Ok(blocks) => {
                    self.here[index] = Some((tags, address));
                    if blocks >= ENOUGH {
                        self.run_batch(index);
                    }
                }
                Err(mut work) => {
                    tag_all(&self.tagger, once(&mut work));
                    assert_eq!(work.tags[..count], tags);
                }
            }
        }

        fn run_batch(&mut self, index: usize) {
            let works = self.batch.lock().take_for(index);
            if !works.is_empty() {
                self.elsewhere.push(Group { batch: Arc::clone(&self.batch), works });
            }
        }

        fn poll_ready(&mut self, index: usize) {
            let Some((tags, address)) = &self.here[index] else { return };
            let left = self.batch.lock().poll_ready(index, Waker::noop());
            if let Poll::Ready(work) = left {
                assert_eq!((&work.tags[..tags.len()], work.buf.as_ptr()), (&tags[..], *address));
                self.here[index] = None;
            }
        }
    }

    proptest! {
        #[test]
        fn each_gets_its_own_tags_and_buffer_in_any_order_of_requests(steps in steps()) {
            let mut test = Test {
                tagger: tagger(TagAlgorithm::HmacSha256, BLOCK as u32),
                batch: Arc::new(Mutex::new(HashBatch::new(REQUESTS))),
                elsewhere: Vec::new(),
                here: [const { None }; REQUESTS],
            };
            for step in steps {
                match step {
                    Step::Submit { index, fill, first, count } if test.here[index].is_none() => {
                        test.submit(index, fill, first, count);
                    }
                    Step::GoOn(index) if test.here[index].is_some() => {
                        test.run_batch(index);
                        test.poll_ready(index);
                    }
                    Step::Done(which) if !test.elsewhere.is_empty() => {
                        let which = which % test.elsewhere.len();
                        test.elsewhere.swap_remove(which).make_tags(&test.tagger);
                    }
                    Step::Drop(index) => test.here[index] = None,
                    _ => {}
                }
            }
            (0..REQUESTS).filter(|i| test.here[*i].is_some()).collect::<Vec<_>>().into_iter().for_each(|i| test.run_batch(i));
            std::mem::take(&mut test.elsewhere).into_iter().for_each(|group| group.make_tags(&test.tagger));
            (0..REQUESTS).for_each(|i| test.poll_ready(i));
            prop_assert!(test.here.iter().all(Option::is_none), "everybody's tags are made in the end");
        }
    }
}
