//! Looking at the data: the recovery table, row by row.

use super::candidates::{BlockCandidates, Oldest, Settling};
use crate::{
    BlockRange, Buf, Device, DeviceError, Errno, Slot, Storage,
    format::{Tag, ZERO_TAG},
    lookup::{Into, READ_PAUSE, READ_TRIES},
    open::{MAX_REPORTED_BLOCKS, RecoveryReport},
    pending::PendingSet,
    volume::Volume,
};

/// Blocks read at a time.
const BATCH: usize = 32;

/// A row of the recovery table, see `docs/crash-safety.md`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Row {
    /// One candidate only: settled without reading.
    A,
    /// The data proves the newest candidate.
    B,
    /// The data proves an older candidate: the newer writes never arrived.
    C(Tag),
    /// The data proves none and the oldest candidate is zeros: the data never arrived.
    D,
    /// The data proves none: corrupt, lost or rolled back.
    E,
    /// The data can't be read.
    F,
}

/// Chooses a tag for every block that the log names, and puts it into `set`. Returns why the choice
/// must not be written down, if so: metadata that might have proved a block could not be read.
///
/// `volume` gives tagger and tree; its pending sets are empty.
pub(crate) async fn settle<S: Storage>(
    io: &S,
    volume: &Volume,
    slot: &mut Slot,
    settling: &Settling,
    set: &PendingSet,
    report: &mut RecoveryReport,
) -> Option<DeviceError> {
    let mut unread = None;
    let bs = volume.block_size();
    let mut bufs: Vec<_> = (0..BATCH).map(|_| Some(Buf::new(bs))).collect();
    let blocks: Vec<_> = settling.blocks(set).collect();
    for batch in blocks.chunks(BATCH) {
        let mut reads = [const { None }; BATCH];
        for (i, c) in batch.iter().enumerate().filter(|(_, c)| !c.is_single()) {
            let buf = bufs[i].take().expect("one batch at a time");
            reads[i] = Some(io.read(Device::Data, volume.tree.layout.block_offset(c.block), buf, 0..bs));
        }
        for (i, c) in batch.iter().enumerate() {
            let row = match reads[i].take() {
                None => Row::A,
                Some(read) => {
                    let (result, buf) = read.await;
                    let (result, buf) = retry(io, volume, c, result, buf).await;
                    let row = match result {
                        Ok(()) => judge(io, volume, slot, c, &buf).await.unwrap_or_else(|e| {
                            unread = Some(e);
                            Row::F
                        }),
                        Err(_) => Row::F,
                    };
                    bufs[i] = Some(buf);
                    row
                }
            };
            let newest = c.newest();
            set.insert(c.block, newest.seq, &row.tag(newest.tag));
            row.count(c.block.0, report);
        }
    }
    unread
}

async fn retry<S: Storage>(
    io: &S,
    volume: &Volume,
    c: &BlockCandidates<'_>,
    mut result: Result<(), Errno>,
    mut buf: Buf,
) -> (Result<(), Errno>, Buf) {
    for _ in 1..READ_TRIES {
        if result.is_ok() {
            break;
        }
        let _ = io.sleep(READ_PAUSE).await;
        let part = 0..buf.len();
        (result, buf) = io.read(Device::Data, volume.tree.layout.block_offset(c.block), buf, part).await;
    }
    (result, buf)
}

async fn judge<S: Storage>(
    io: &S,
    volume: &Volume,
    slot: &mut Slot,
    c: &BlockCandidates<'_>,
    data: &[u8],
) -> Result<Row, DeviceError> {
    let (newest, older) = c.logged.split_last().expect("a block is here because it was logged");
    let proves = |tag: &Tag| volume.tagger.proves(tag, c.block, data);
    if proves(&newest.tag) {
        return Ok(Row::B);
    }
    if let Some(t) = older.iter().rev().find(|t| proves(&t.tag)) {
        return Ok(Row::C(t.tag));
    }
    let oldest = match c.oldest {
        Oldest::Logged => return Ok(Row::E),
        Oldest::Zeros => ZERO_TAG,
        Oldest::Checkpointed => checkpointed(io, volume, slot, c).await?,
    };
    Ok(match oldest {
        ZERO_TAG => Row::D,
        tag if proves(&tag) => Row::C(tag),
        _ => Row::E,
    })
}

/// The tag in the tree. One whose page is damaged proves nothing; one that can't be read might, so
/// nothing may be decided without it.
async fn checkpointed<S: Storage>(
    io: &S,
    volume: &Volume,
    slot: &mut Slot,
    c: &BlockCandidates<'_>,
) -> Result<Tag, DeviceError> {
    let one = BlockRange::new(c.block, 1);
    volume.lookup_patiently(io, slot, one, Into::Tags).await?;
    Ok(slot.tags.tags(1)[0])
}

impl BlockCandidates<'_> {
    fn newest(&self) -> &super::candidates::Logged {
        self.logged.last().expect("a block is here because it was logged")
    }
    fn is_single(&self) -> bool {
        self.oldest == Oldest::Logged && self.logged.len() == 1
    }
}

impl Row {
    /// The block's tag from now on.
    fn tag(self, newest: Tag) -> Tag {
        match self {
            Row::A | Row::B | Row::E | Row::F => newest,
            Row::C(older) => older,
            Row::D => ZERO_TAG,
        }
    }

    fn count(self, block: u64, report: &mut RecoveryReport) {
        let (count, list) = match self {
            Row::A | Row::B => (&mut report.settled, None),
            Row::C(_) | Row::D => (&mut report.older, Some(&mut report.older_blocks)),
            Row::E => (&mut report.corrupt, Some(&mut report.corrupt_blocks)),
            Row::F => (&mut report.unreadable, Some(&mut report.unreadable_blocks)),
        };
        *count += 1;
        if let Some(list) = list.filter(|list| list.len() < MAX_REPORTED_BLOCKS) {
            list.push(block);
        }
    }
}
