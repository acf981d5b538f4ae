//! Reading: the data and whatever metadata is missing are fetched together, then
//! everything is verified.

use super::{
    context::RequestContext,
    hash_batch::{HashWork, Hasher},
};
use crate::{
    BlockIndex, BlockRange, Buf, Device, DeviceError, Io, OnMismatch, PageName, ReadError,
    crypto::{keys::equal, tagger::MAX_VERIFIED},
    format::{LOST_TAG, ZERO_TAG},
    lifecycle::recovery::in_log::{InLog, LogSectors},
    metadata::{Metadata, tree::CacheUse},
};

/// The parts of the volume that a read needs.
pub(crate) struct Reader<'v> {
    pub(crate) metadata: &'v Metadata,
    pub(crate) hasher: &'v Hasher,
    /// Blocks that are not in place yet.
    pub(crate) in_log: &'v InLog,
    pub(crate) on_mismatch: OnMismatch,
}

/// What was fetched for a read: the data is in the buffer, the tags are in the context.
pub(crate) struct Fetched {
    /// The first damaged page that was found.
    bad_page: Option<PageName>,
}

/// What verification of a request found.
struct Verdict {
    first_bad: Option<BlockIndex>,
    /// Blocks that had something to prove.
    verified: u64,
    /// Blocks that are bad.
    mismatches: u64,
}

impl Reader<'_> {
    /// Reads and verifies without holding the range, while writes of it may be under way that have
    /// not been answered. `true`: each block is what it was at some moment meanwhile, for its tag
    /// was the current one then. Otherwise nothing is known.
    pub(crate) async fn try_read<S: Io>(
        &self,
        io: &S,
        context: &mut RequestContext,
        range: BlockRange,
        buf: Buf,
    ) -> (bool, Buf) {
        let (fetched, buf) = self.fetch(io, context, range, buf).await;
        if fetched.is_err() {
            return (false, buf);
        }
        let (verdict, buf) = self.judge(io, context, range, buf).await;
        let proven = verdict.first_bad.is_none();
        if proven {
            context.counters.blocks_verified.add(verdict.verified);
        }
        (proven, buf)
    }

    /// Compares what was fetched with its tags. Fails with the first bad block, unless bad blocks
    /// read as zeros.
    pub(crate) async fn verify<S: Io>(
        &self,
        io: &S,
        context: &mut RequestContext,
        range: BlockRange,
        buf: Buf,
        fetched: Fetched,
    ) -> (Result<(), ReadError>, Buf) {
        let (verdict, buf) = self.judge(io, context, range, buf).await;
        context.counters.blocks_verified.add(verdict.verified);
        context.counters.mismatches.add(verdict.mismatches);
        match (verdict.first_bad, self.on_mismatch) {
            (None, _) | (_, OnMismatch::Zero) => (Ok(()), buf),
            (Some(block), _) => (Err(read_error(block, fetched.bad_page)), buf),
        }
    }

    async fn judge<S: Io>(
        &self,
        io: &S,
        context: &mut RequestContext,
        range: BlockRange,
        mut buf: Buf,
    ) -> (Verdict, Buf) {
        // Only where each block has something to prove: tags that nobody asks for would be made too.
        let tags = context.tags.tags(range.count);
        let made = range.count > 0 && tags.iter().all(|tag| ![ZERO_TAG, LOST_TAG].contains(tag));
        if made {
            let work =
                HashWork { first: range.first, buf, at: 0, count: range.count as usize, tags: context.old.lend() };
            let work = self.hasher.make_tags(io, context.batch.as_ref(), work).await;
            context.old.give_back(work.tags);
            buf = work.buf;
        }
        let bytes = range.count as usize * self.metadata.block_size();
        let verdict = self.compare(context, range, &mut buf[..bytes], made);
        if !made && verdict.verified > 0 {
            io.charge();
        }
        (verdict, buf)
    }

    /// Brings the data into `buf` and the tags into the context.
    pub(crate) async fn fetch<S: Io>(
        &self,
        io: &S,
        context: &mut RequestContext,
        range: BlockRange,
        mut buf: Buf,
    ) -> (Result<Fetched, DeviceError>, Buf) {
        let bytes = range.count as usize * self.metadata.block_size();
        let mut uses = CacheUse::default();
        let complete = self.metadata.lookup_cached(context, range, &mut uses);
        // The first look says what was in the cache: a second one finds what that has brought.
        if !std::mem::replace(&mut context.is_counted, true) {
            context.counters.cache_hits.add(uses.hits);
            context.counters.cache_misses.add(uses.misses);
            context.counters.hints_used.add(uses.hints_used);
        }
        if complete && context.tags.tags(range.count).iter().all(|t| *t == ZERO_TAG) {
            buf[..bytes].fill(0);
            return (Ok(Fetched { bad_page: None }), buf);
        }
        if self.in_log.within(range).next().is_some() {
            return self.fetch_with_log(io, context, range, complete, buf).await;
        }
        let offset = self.metadata.layout().block_offset(range.first);
        let data = io.read(Device::Data, offset, buf, 0..bytes);
        // The data read is in flight: only now is there time for hints.
        if uses.misses + uses.hints_used > 0 {
            self.metadata.hint(range, &context.counters);
        }
        let pages = match complete {
            true => Ok(None),
            false => self.metadata.lookup_missing(io, context, range).await,
        };
        let (data, buf) = data.await;
        let data = data.map_err(|errno| {
            DeviceError::new("read", Device::Data, self.metadata.layout().block_offset(range.first), bytes, errno)
        });
        // Blocks of zeros need no data: with all tags known and zero, a failed read is none.
        let needed = pages.is_err() || context.tags.tags(range.count).iter().any(|t| *t != ZERO_TAG);
        let result = match data {
            Err(e) if needed => Err(e),
            _ => pages.map(|bad_page| Fetched { bad_page }),
        };
        (result, buf)
    }

    /// The same where some of the blocks are not in place yet: each of those comes from the log, and a
    /// bad sector in its place is nobody's.
    async fn fetch_with_log<S: Io>(
        &self,
        io: &S,
        context: &mut RequestContext,
        range: BlockRange,
        complete: bool,
        mut buf: Buf,
    ) -> (Result<Fetched, DeviceError>, Buf) {
        let pages = match complete {
            true => Ok(None),
            false => self.metadata.lookup_missing(io, context, range).await,
        };
        let bs = self.metadata.block_size();
        let mut result = pages.map(|bad_page| Fetched { bad_page });
        let mut from = range.first.0;
        let in_log = self.in_log.within(range).map(|(block, at)| (block.0, Some(at)));
        for (block, at) in in_log.chain([(range.end(), None)]) {
            let part = (from - range.first.0) as usize..(block - range.first.0) as usize;
            let needed = context.tags.tags(range.count)[part.clone()].iter().any(|tag| *tag != ZERO_TAG);
            if needed {
                let offset = self.metadata.layout().block_offset(BlockIndex(from));
                let (read, bytes) = (part.start * bs..part.end * bs, part.len() * bs);
                let data;
                (data, buf) = io.read(Device::Data, offset, buf, read).await;
                let failed = |errno| DeviceError::new("read", Device::Data, offset, bytes, errno);
                result = data.map_err(failed).and(result);
            }
            if let Some(at) = at {
                let sectors = LogSectors::of(io, at, bs);
                let (read, page) = sectors.read(io, context.pages.lend()).await;
                buf[part.end * bs..(part.end + 1) * bs].copy_from_slice(&page[sectors.block.clone()]);
                context.pages.give_back(page);
                let failed = |errno| DeviceError::new("read", Device::Meta, sectors.offset, sectors.len, errno);
                result = read.map_err(failed).and(result);
            }
            from = block + 1;
        }
        (result, buf)
    }

    /// Compares all blocks with their tags, and clears those that read as zeros or must not be
    /// seen. `made`: the context's old tags are those of the data.
    fn compare(&self, context: &RequestContext, range: BlockRange, data: &mut [u8], made: bool) -> Verdict {
        let (mut verified, mut mismatches, mut first_bad) = (0, 0, None);
        let bs = self.metadata.block_size();
        let firsts = range.blocks().step_by(MAX_VERIFIED);
        let tags = context.tags.tags(range.count).chunks(MAX_VERIFIED);
        let mut made = made.then(|| context.old.tags(range.count).chunks(MAX_VERIFIED));
        for ((first, tags), data) in firsts.zip(tags).zip(data.chunks_mut(MAX_VERIFIED * bs)) {
            let bad = match made.as_mut().and_then(Iterator::next) {
                Some(made) => tags.iter().zip(made).rev().fold(0, |bad, (a, b)| bad << 1 | u64::from(!equal(a, b))),
                None => self.hasher.tagger().mismatches(first, data, tags),
            };
            for (i, (tag, bytes)) in tags.iter().zip(data.chunks_exact_mut(bs)).enumerate() {
                let is_bad = bad >> i & 1 != 0;
                if *tag == ZERO_TAG || is_bad && self.on_mismatch == OnMismatch::Zero {
                    bytes.fill(0);
                }
                if is_bad {
                    first_bad.get_or_insert(BlockIndex(first.0 + i as u64));
                }
                verified += u64::from(*tag != ZERO_TAG);
            }
            mismatches += u64::from(bad.count_ones());
        }
        Verdict { first_bad, verified, mismatches }
    }
}

fn read_error(block: BlockIndex, bad_page: Option<PageName>) -> ReadError {
    match bad_page {
        Some(page) => ReadError::BadPage { block, page },
        None => ReadError::Mismatch { block },
    }
}
