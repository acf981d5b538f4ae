//! Looking at the data: one tag for each block that the log names, or none yet.

use super::{
    candidates::{BlockCandidates, Settling},
    judge::{Row, judge},
    patience::Patience,
};
use crate::{
    Buf, Device, DeviceError, Errno, Storage,
    crypto::tagger::Tagger,
    info::{MAX_REPORTED_BLOCKS, RecoveryReport},
    lifecycle::open_error::OpenError,
    metadata::{
        lookup::READ_TRIES,
        pending::PendingSet,
        tree::{LoadError, PageBufs, Tree},
    },
    options::UnreadableBlocks,
};

/// Blocks read at a time.
const BATCH: usize = 32;

/// What blocks are judged with, and the memory for it.
pub(crate) struct Settle<'a, S: Storage> {
    io: &'a S,
    tree: &'a Tree,
    tagger: &'a Tagger,
    pages: PageBufs,
    bufs: Vec<Buf>,
    /// With the data device, and with the one that holds the pages.
    data: Patience<S>,
    meta: Patience<S>,
}

impl<'a, S: Storage> Settle<'a, S> {
    pub(crate) fn new(io: &'a S, tree: &'a Tree, tagger: &'a Tagger) -> Self {
        Self {
            io,
            tree,
            tagger,
            pages: PageBufs::new(tree.layout.levels(), 1),
            bufs: (0..BATCH).map(|_| Buf::new(tagger.block_size())).collect(),
            data: Patience::new(),
            meta: Patience::new(),
        }
    }

    /// Chooses a tag for every block that the log names, and puts it into `set`. Returns those of which nothing can be
    /// said: no decision is made without evidence (row F) unless `rule` says so.
    pub(crate) async fn all(
        mut self,
        settling: &Settling,
        set: &PendingSet,
        rule: UnreadableBlocks,
        report: &mut RecoveryReport,
    ) -> Result<Vec<BlockCandidates<'static>>, OpenError> {
        let mut undecided = Vec::new();
        let mut blocks = settling.blocks(set).peekable();
        while blocks.peek().is_some() {
            let batch: Vec<_> = blocks.by_ref().take(BATCH).collect();
            let reads = self.read(&batch).await?;
            for (i, (c, read)) in batch.into_iter().zip(reads).enumerate() {
                let row = match read {
                    None => Some(Row::A),
                    Some(Ok(())) => self.judge(i, &c).await?,
                    Some(Err(_)) => None,
                };
                report.count(c.block.0, row);
                match (row, rule) {
                    (Some(row), _) => {
                        let (seq, tag) = row.choice(&c);
                        set.insert(c.block, seq, &tag);
                    }
                    (None, UnreadableBlocks::TakeNewest) => {
                        set.insert(c.block, c.newest().seq, &c.newest().tag);
                    }
                    (None, UnreadableBlocks::KeepUndecided) => undecided.push(c.into_owned()),
                }
            }
        }
        Ok(undecided)
    }

    /// Reads the blocks of a batch that have something to be settled, all at once; those that fail again, together too.
    async fn read(&mut self, batch: &[BlockCandidates<'_>]) -> Result<Vec<Option<Result<(), Errno>>>, OpenError> {
        let wanted = |c: &BlockCandidates<'_>| (!c.is_single()).then_some(Err(Errno::EIO));
        let mut results: Vec<_> = batch.iter().map(wanted).collect();
        for attempt in 0..READ_TRIES {
            let missing = |result: &Option<Result<_, _>>| matches!(result, Some(Err(_)));
            if !results.iter().any(missing) || (attempt > 0 && !self.data.pause(self.io).await?) {
                break;
            }
            let mut reads: Vec<_> = batch.iter().map(|_| None).collect();
            for i in (0..batch.len()).filter(|i| missing(&results[*i])) {
                let buf = std::mem::replace(&mut self.bufs[i], Buf::none());
                let (offset, part) = (self.tree.layout.block_offset(batch[i].block), 0..buf.len());
                reads[i] = Some((offset, self.io.read(Device::Data, offset, buf, part)));
            }
            for (i, read) in reads.into_iter().enumerate() {
                let Some((offset, read)) = read else { continue };
                let result;
                (result, self.bufs[i]) = self.data.within(read).await?;
                let len = self.tagger.block_size() as u64;
                match result {
                    Ok(()) => self.data.succeeded(),
                    Err(errno) => {
                        let why = DeviceError::new("read", Device::Data, offset, len as usize, errno);
                        self.data.failed(self.io, why);
                    }
                }
                results[i] = Some(result);
            }
        }
        results.iter().flatten().filter(|result| result.is_err()).try_for_each(|_| self.data.give_up())?;
        Ok(results)
    }

    /// The row of a block that has been read to buffer `i`; `None` while the page that might decide can't be had.
    async fn judge(&mut self, i: usize, c: &BlockCandidates<'_>) -> Result<Option<Row>, OpenError> {
        for attempt in 0..READ_TRIES {
            let judged = judge(self.io, self.tree, self.tagger, &mut self.pages, c, &self.bufs[i]);
            match self.meta.within(judged).await? {
                Ok(row) => {
                    self.meta.succeeded();
                    return Ok(Some(row));
                }
                // Read once more: what came over the wire may have been at fault.
                Err(LoadError::Bad(_)) if attempt == 0 => {}
                Err(LoadError::Bad(_)) => break,
                Err(LoadError::Device(why)) => {
                    self.meta.failed(self.io, why);
                    if attempt + 1 == READ_TRIES || !self.meta.pause(self.io).await? {
                        self.meta.give_up()?;
                        break;
                    }
                }
            }
        }
        Ok(None)
    }
}

impl RecoveryReport {
    /// Counts one block; `None` is row F.
    fn count(&mut self, block: u64, row: Option<Row>) {
        let (count, list) = match row {
            Some(Row::A | Row::B) => (&mut self.settled, None),
            Some(Row::C(..) | Row::D) => (&mut self.older, Some(&mut self.older_blocks)),
            Some(Row::E) => (&mut self.corrupt, Some(&mut self.corrupt_blocks)),
            None => (&mut self.unreadable, Some(&mut self.unreadable_blocks)),
        };
        *count += 1;
        self.blocks += 1;
        if let Some(list) = list.filter(|list| list.len() < MAX_REPORTED_BLOCKS) {
            list.push(block);
        }
    }
}
