//! "Fix", of a volume that was opened so: what is on the medium is accepted and signed anew, by an
//! ordinary write.

use super::{
    context::RequestContext,
    range_lock::RangeGuard,
    read::Reader,
    write::{Holder, Writer},
};
use crate::{
    BlockRange, Buf, Io, ReadError, WriteError,
    format::{LOST_TAG, ZERO_TAG},
};

/// Reads `range`, which `guard` holds exclusively, and signs each block anew that
/// does not match its tag.
pub(crate) async fn fix<S: Io>(
    reader: &Reader<'_>,
    writer: &Writer<'_>,
    io: &S,
    context: &mut RequestContext,
    guard: &RangeGuard<'_>,
    buf: Buf,
) -> (Result<(), ReadError>, Buf) {
    let range = guard.range();
    let (result, mut buf) = reader.fetch(io, context, range, buf).await;
    if let Err(e) = result {
        return (Err(e.into()), buf);
    }
    let bs = reader.metadata.block_size();
    for (i, block) in range.blocks().enumerate() {
        let tag = context.tags.tags(range.count)[i];
        if tag == ZERO_TAG {
            buf[i * bs..(i + 1) * bs].fill(0);
            continue;
        }
        if tag != LOST_TAG && reader.hasher.tagger().proves(&tag, block, &buf[i * bs..(i + 1) * bs]) {
            continue;
        }
        let one = BlockRange::new(block, 1);
        let result;
        // `old` holds the tags that remain to be looked at: the write uses `tags`.
        std::mem::swap(&mut context.tags, &mut context.old);
        (result, buf) = writer.write_part(io, context, one, buf, i * bs, &mut Holder::Request(guard)).await;
        std::mem::swap(&mut context.tags, &mut context.old);
        match result {
            Ok(()) => context.counters.fixed_blocks.add(1),
            Err(WriteError::Device(e)) => return (Err(e.into()), buf),
            Err(_) => return (Err(ReadError::Mismatch { block }), buf),
        }
    }
    (Ok(()), buf)
}
