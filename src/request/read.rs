//! Reading: the data and whatever metadata is missing are fetched together, then everything is verified.

use crate::{
    BlockIndex, BlockRange, Buf, Device, DeviceError, Io, OnMismatch, PageName, ReadError, Slot, Volume, WriteError,
    crypto::{keys::equal, tagger::MAX_VERIFIED},
    format::{LOST_TAG, ZERO_TAG},
    metadata::{lookup::Into, tree::CacheUse},
    options::Access,
    request::range_lock::Mode,
};

/// What verification of a request found.
struct Verdict {
    first_bad: Option<BlockIndex>,
    /// Blocks that had something to prove.
    verified: u64,
}

impl Volume {
    /// Reads `range` into the front of `buf` and verifies every block. Fails with the first bad block
    /// unless the volume was opened to do otherwise.
    pub async fn read<S: Io>(
        &self,
        io: &S,
        slot: &mut Slot,
        range: BlockRange,
        buf: Buf,
    ) -> (Result<(), ReadError>, Buf) {
        let Some(bytes) = self.request_bytes(range, &buf) else {
            return (Err(ReadError::BadRange(range)), buf);
        };
        let counters = &self.counters[slot.queue];
        counters.reads.add(1);
        counters.read_bytes.add(bytes as u64);
        // Alone where a tag is to be chosen: nobody may look for it meanwhile.
        let undecided = self.undecided.first_in(range).is_some();
        let mode = if undecided { Mode::Exclusive } else { Mode::Shared };
        let guard = self.ranges.acquire(slot.id, range, mode).await;
        if self.accepted.has_failed(range) {
            return (Err(ReadError::NotInPlace(range)), buf);
        }
        if self.may_be_older(range) {
            return (Err(ReadError::MayBeOlder(range)), buf);
        }
        let (decided, buf) = if undecided { self.decide(io, slot, range, buf).await } else { (Ok(()), buf) };
        if let Err(e) = decided {
            return (Err(e), buf);
        }
        let (result, buf) = self.fetch(io, slot, range, buf).await;
        drop(guard);
        let bad_page = match result {
            Err(e) => return (Err(e.into()), buf),
            Ok(bad_page) => bad_page,
        };
        // Only where each block has something to prove: tags that nobody asks for would be made too.
        let tags = slot.tags.tags(range.count);
        let made = range.count > 0 && tags.iter().all(|tag| ![ZERO_TAG, LOST_TAG].contains(tag));
        let mut buf = if made { self.make_tags(io, slot, Into::Old, range, buf, 0).await } else { buf };
        let verdict = self.verify(slot, range, &mut buf[..bytes], made);
        if !made && verdict.verified > 0 {
            io.charge();
        }
        match (verdict.first_bad, self.on_mismatch) {
            (None, _) | (_, OnMismatch::Zero) => (Ok(()), buf),
            (Some(_), OnMismatch::Fix) if self.access == Access::ReadWrite => self.fix(io, slot, range, buf).await,
            (Some(block), _) => (Err(read_error(block, bad_page)), buf),
        }
    }

    /// Whether a change that could not be read may be the newest of a block: any that is not named by what is newer for sure.
    fn may_be_older(&self, range: BlockRange) -> bool {
        let newest = |block| self.pending[0].lookup(block).map(|(seq, _)| seq);
        self.newer_from.is_some_and(|from| range.blocks().any(|block| newest(block).is_none_or(|seq| seq < from)))
    }

    /// Bytes of a request, if it lies inside the volume and is no larger than a request may be.
    pub(crate) fn request_bytes(&self, range: BlockRange, buf: &Buf) -> Option<usize> {
        let most = self.max_request_bytes.min(buf.len()) / self.block_size();
        let fits = self.tree.layout.contains(range) && range.count <= most as u64;
        fits.then(|| range.count as usize * self.block_size())
    }

    /// Brings the data into `buf` and the tags into the slot. Returns the first damaged page met.
    async fn fetch<S: Io>(
        &self,
        io: &S,
        slot: &mut Slot,
        range: BlockRange,
        mut buf: Buf,
    ) -> (Result<Option<PageName>, DeviceError>, Buf) {
        let bytes = range.count as usize * self.block_size();
        let mut uses = CacheUse::default();
        let complete = self.lookup_cached(slot, range, &mut uses);
        let counters = &self.counters[slot.queue];
        counters.cache_hits.add(uses.hits);
        counters.cache_misses.add(uses.misses);
        counters.hints_used.add(uses.hints_used);
        if complete && slot.tags.tags(range.count).iter().all(|t| *t == ZERO_TAG) {
            buf[..bytes].fill(0);
            return (Ok(None), buf);
        }
        let offset = self.tree.layout.block_offset(range.first);
        let data = io.read(Device::Data, offset, buf, 0..bytes);
        // The data read is on its way: only now is there time for hints.
        if uses.misses + uses.hints_used > 0 {
            self.hints.iter().for_each(|hints| hints.offer(range, counters));
        }
        let pages = match complete {
            true => Ok(None),
            false => self.lookup_missing(io, slot, range, Into::Tags).await,
        };
        let (data, buf) = data.await;
        let data = data.map_err(|errno| {
            DeviceError::new("read", Device::Data, self.tree.layout.block_offset(range.first), bytes, errno)
        });
        // Blocks of zeros need no data: with all tags known and zero, a failed read is none.
        let needed = pages.is_err() || slot.tags.tags(range.count).iter().any(|t| *t != ZERO_TAG);
        let result = match data {
            Err(e) if needed => Err(e),
            _ => pages,
        };
        (result, buf)
    }

    /// Compares all blocks with their tags, and clears those that read as zeros or must not be seen. `made`: the slot's old
    /// tags are those of the data.
    fn verify(&self, slot: &Slot, range: BlockRange, data: &mut [u8], made: bool) -> Verdict {
        let counters = &self.counters[slot.queue];
        let (mut verified, mut mismatches, mut first_bad) = (0, 0, None);
        let bs = self.block_size();
        let firsts = range.blocks().step_by(MAX_VERIFIED);
        let tags = slot.tags.tags(range.count).chunks(MAX_VERIFIED);
        let mut made = made.then(|| slot.old.tags(range.count).chunks(MAX_VERIFIED));
        for ((first, tags), data) in firsts.zip(tags).zip(data.chunks_mut(MAX_VERIFIED * bs)) {
            let bad = match made.as_mut().and_then(Iterator::next) {
                Some(made) => tags.iter().zip(made).rev().fold(0, |bad, (a, b)| bad << 1 | u64::from(!equal(a, b))),
                None => self.tagger.mismatches(first, data, tags),
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
        counters.blocks_verified.add(verified);
        counters.mismatches.add(mismatches);
        Verdict { first_bad, verified }
    }

    /// "Fix": what is on the medium is accepted and signed anew, through the ordinary write path.
    async fn fix<S: Io>(&self, io: &S, slot: &mut Slot, range: BlockRange, buf: Buf) -> (Result<(), ReadError>, Buf) {
        let _guard = self.ranges.acquire(slot.id, range, Mode::Exclusive).await;
        let (result, mut buf) = self.fetch(io, slot, range, buf).await;
        if let Err(e) = result {
            return (Err(e.into()), buf);
        }
        let bs = self.block_size();
        for (i, block) in range.blocks().enumerate() {
            let tag = slot.tags.tags(range.count)[i];
            if tag == ZERO_TAG {
                buf[i * bs..(i + 1) * bs].fill(0);
                continue;
            }
            if tag != LOST_TAG && self.tagger.proves(&tag, block, &buf[i * bs..(i + 1) * bs]) {
                continue;
            }
            let one = BlockRange::new(block, 1);
            let result;
            // `old` holds the tags that remain to be looked at: the write uses `tags`.
            std::mem::swap(&mut slot.tags, &mut slot.old);
            (result, buf) = self.write_part(io, slot, one, buf, i * bs).await;
            std::mem::swap(&mut slot.tags, &mut slot.old);
            match result {
                Ok(()) => self.counters[slot.queue].fixed_blocks.add(1),
                Err(WriteError::Device(e)) => return (Err(e.into()), buf),
                Err(_) => return (Err(ReadError::Mismatch { block }), buf),
            }
        }
        (Ok(()), buf)
    }
}

fn read_error(block: BlockIndex, bad_page: Option<PageName>) -> ReadError {
    match bad_page {
        Some(page) => ReadError::BadPage { block, page },
        None => ReadError::Mismatch { block },
    }
}
