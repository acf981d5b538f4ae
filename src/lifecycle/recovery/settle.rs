//! Looking at the data: one tag for each block that the log names, or none yet.

use super::{
    candidates::{BlockCandidates, Budget, Oldest, Settling},
    in_log::InLog,
    judge::{Row, checkpointed, judge, judge_by_log},
    patience::{Effort, Patience},
};
use crate::{
    BlockIndex, Buf, Device, DeviceError, Errno, Storage,
    crypto::tagger::Tagger,
    format::Tag,
    info::{MAX_REPORTED_BLOCKS, RecoveryReport},
    lifecycle::{open_error::OpenError, superblocks::Newest},
    metadata::{
        load::PageBufs,
        pending::PendingSet,
        tree::{LoadError, Tree},
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
    rule: UnreadableBlocks,
    pages: PageBufs,
    bufs: Vec<Buf>,
    /// For what is read once more.
    again: Vec<Buf>,
    /// With the data device, and with the one that holds the pages.
    data: Patience<S>,
    meta: Patience<S>,
}

impl<'a, S: Storage> Settle<'a, S> {
    /// What can't be settled stays so, or the newest is taken, as `rule` says.
    pub(crate) fn new(io: &'a S, tree: &'a Tree, tagger: &'a Tagger, newest: &Newest, rule: UnreadableBlocks) -> Self {
        let effort = match rule {
            UnreadableBlocks::KeepUndecided => Effort::Bounded,
            UnreadableBlocks::TakeNewest => Effort::Thorough,
        };
        let bufs = || (0..BATCH).map(|_| Buf::new(tagger.block_size())).collect();
        Self {
            io,
            tree,
            tagger,
            rule,
            pages: PageBufs::new(tree.layout.levels(), 1),
            bufs: bufs(),
            again: bufs(),
            data: Patience::new(Device::Data, newest, effort),
            meta: Patience::new(Device::Meta, newest, effort),
        }
    }

    /// Chooses a tag for every block that the log names, and puts it into `set`. Returns those of
    /// which nothing can be said: no decision is made without evidence (row F) unless the rule says
    /// so. `memory` is taken for them. And those that are to be had from the log.
    pub(crate) async fn all(
        &mut self,
        settling: &Settling,
        set: &PendingSet,
        memory: &mut Budget,
        report: &mut RecoveryReport,
    ) -> Result<(Vec<BlockCandidates<'static>>, InLog), OpenError> {
        let (mut undecided, mut in_log) = (Vec::new(), settling.in_log());
        let mut blocks = settling.blocks(set).peekable();
        while blocks.peek().is_some() {
            // Where each may take long to fail, no more are waited for than must be.
            let together = if self.data.fails_slowly() { 1 } else { BATCH };
            let batch: Vec<_> = blocks.by_ref().take(together).collect();
            let rows = self.rows(&batch).await?;
            for (c, row) in batch.into_iter().zip(rows) {
                report.count(c.block.0, row);
                match (row, self.rule) {
                    (Some(row), _) => {
                        let (seq, tag) = row.choice(&c);
                        set.insert(c.block, seq, &tag);
                        if let Some(at) = row.in_log(&c) {
                            in_log.push(c.block, Some(at));
                        }
                    }
                    (None, UnreadableBlocks::TakeNewest) => {
                        set.insert(c.block, c.newest().seq, &c.newest().tag);
                    }
                    (None, UnreadableBlocks::KeepUndecided) => {
                        memory.take(c.memory_bytes())?;
                        if matches!(c.oldest, Oldest::Payload(_)) {
                            in_log.push(c.block, None);
                        }
                        undecided.push(c.into_owned());
                    }
                }
            }
        }
        Ok((undecided, in_log))
    }

    /// Whether the medium proves one of these tags, and the block is to have another: the record
    /// that says so was durable once, for data is sent afterwards. A block that can't be had proves
    /// nothing.
    pub(crate) async fn proves_any(&mut self, tags: &[(BlockIndex, Tag)], set: &PendingSet) -> bool {
        let Self { io, tree, tagger, pages, bufs, .. } = self;
        for (block, tag) in tags {
            let chosen = match set.lookup(*block) {
                Some((_, chosen)) => chosen,
                None => match checkpointed(*io, tree, pages, *block).await {
                    Ok(chosen) => chosen,
                    Err(_) => return false,
                },
            };
            let (buf, bs) = (std::mem::replace(&mut bufs[0], Buf::none()), tagger.block_size());
            let read;
            (read, bufs[0]) = io.read(Device::Data, tree.layout.block_offset(*block), buf, 0..bs).await;
            if read.is_err() {
                return false;
            }
            if chosen != *tag && tagger.proves(tag, *block, &bufs[0]) {
                return true;
            }
        }
        false
    }

    /// The row of each block; `None` is row F.
    async fn rows(&mut self, batch: &[BlockCandidates<'_>]) -> Result<Vec<Option<Row>>, OpenError> {
        let mut bufs = std::mem::take(&mut self.bufs);
        let reads = self.read(batch, |i| !batch[i].is_single(), &mut bufs).await?;
        let mut rows = Vec::with_capacity(batch.len());
        for (i, read) in reads.into_iter().enumerate() {
            rows.push(match read {
                None => Row::of_single(&batch[i]),
                Some(Ok(())) => self.judge(&bufs[i], &batch[i]).await?,
                Some(Err(_)) => None,
            });
        }
        self.confirm(batch, &bufs, &mut rows).await?;
        self.bufs = bufs;
        Ok(rows)
    }

    /// Data that proves nothing is evidence only if it is what lies there. So it is read once more
    /// before rows D and E are written down: where other bytes come, and prove nothing either,
    /// nothing is known.
    async fn confirm(
        &mut self,
        batch: &[BlockCandidates<'_>],
        bufs: &[Buf],
        rows: &mut [Option<Row>],
    ) -> Result<(), OpenError> {
        let proves_nothing: Vec<_> = rows.iter().map(|row| row.is_some_and(Row::proves_nothing)).collect();
        if !proves_nothing.contains(&true) {
            return Ok(());
        }
        let mut again = std::mem::take(&mut self.again);
        let reads = self.read(batch, |i| proves_nothing[i], &mut again).await?;
        for (i, read) in reads.into_iter().enumerate() {
            match read {
                None => {}
                Some(Ok(())) if again[i][..] == bufs[i][..] => {}
                Some(Ok(())) => {
                    let row = self.judge(&again[i], &batch[i]).await?;
                    rows[i] = row.filter(|row| !row.proves_nothing());
                }
                Some(Err(_)) => rows[i] = None,
            }
        }
        self.again = again;
        Ok(())
    }

    /// Reads those blocks of a batch that are wanted, all at once; those that fail
    /// again, together too.
    async fn read(
        &mut self,
        batch: &[BlockCandidates<'_>],
        wanted: impl Fn(usize) -> bool,
        bufs: &mut [Buf],
    ) -> Result<Vec<Option<Result<(), Errno>>>, OpenError> {
        let mut results: Vec<_> = (0..batch.len()).map(|i| wanted(i).then_some(Err(Errno::EIO))).collect();
        if self.data.has_had_enough() {
            return Ok(results);
        }
        for tries in 0.. {
            let missing = |result: &Option<Result<_, _>>| matches!(result, Some(Err(_)));
            if !results.iter().any(missing) || (tries > 0 && !self.data.may_try_again(self.io, tries).await) {
                break;
            }
            let mut reads = Vec::with_capacity(batch.len());
            for i in (0..batch.len()).filter(|i| missing(&results[*i])) {
                let buf = std::mem::replace(&mut bufs[i], Buf::none());
                let (offset, part) = (self.tree.layout.block_offset(batch[i].block), 0..buf.len());
                reads.push((i, offset, self.io.read(Device::Data, offset, buf, part)));
            }
            let all = async {
                let mut ended = Vec::with_capacity(reads.len());
                for (i, offset, read) in reads {
                    ended.push((i, offset, read.await));
                }
                ended
            };
            let mut failed = None;
            for (i, offset, (result, buf)) in self.data.reads(self.io, all).await {
                match result {
                    Ok(()) => self.data.succeeded(offset, buf.len()),
                    Err(errno) => {
                        failed.get_or_insert(DeviceError::new("read", Device::Data, offset, buf.len(), errno));
                    }
                }
                (results[i], bufs[i]) = (Some(result), buf);
            }
            // Not before all of them have ended: see `patience`.
            if let Some(why) = failed {
                self.data.failed(self.io, why).await?;
            }
        }
        Ok(results)
    }

    /// The row of a block that has been read; `None` while the page that might decide can't be had.
    async fn judge(&mut self, data: &[u8], c: &BlockCandidates<'_>) -> Result<Option<Row>, OpenError> {
        if self.meta.has_had_enough() {
            return Ok(judge_by_log(self.tagger, c, data));
        }
        for tries in 1.. {
            let judged = judge(self.io, self.tree, self.tagger, &mut self.pages, c, data);
            match self.meta.reads(self.io, judged).await {
                Ok(row) => return Ok(Some(row)),
                // Read once more: what came over the wire may have been at fault.
                Err(LoadError::Bad(_)) if tries == 1 => {}
                Err(LoadError::Bad(_)) => break,
                Err(LoadError::Device(why)) => {
                    self.meta.failed(self.io, why).await?;
                    if !self.meta.may_try_again(self.io, tries).await {
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
            Some(Row::A | Row::P1 | Row::B) => (&mut self.settled, None),
            Some(Row::C(..) | Row::D | Row::P2) => (&mut self.older, Some(&mut self.older_blocks)),
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
