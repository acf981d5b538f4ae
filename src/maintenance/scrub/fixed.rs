//! What has a place of its own: superblock copies, identity block, and the live log.

use super::{
    BETWEEN_LOOKS,
    blocks::Pass,
    findings::WaitsFor,
    report::{MetadataPart, Remedy, ScrubFinding},
};
use crate::{
    BadReason, Buf, ByteOffset, Device, Io,
    crypto::keys::Keys,
    format::{Identity, Layout, PAGE_BYTES, RawIdentity, RawSuperblock, SUPERBLOCK_BYTES, Superblock},
    io::retry::{READ, retry},
    lifecycle::identity_block::{Claimed, claimed, read_identity},
};
use std::{mem, ops::Range};
use zerocopy::{FromBytes, IntoBytes};

/// How often a superblock copy is looked at that a checkpoint may be writing. Where checkpoints never
/// rest, a damaged copy is made good by the next of them.
const LOOKS: u32 = 16;

impl<T: FnMut(ScrubFinding)> Pass<'_, T> {
    pub(super) async fn superblocks<S: Io>(&mut self, io: &S) {
        for offset in Layout::superblock_offsets() {
            if let Some(reason) = self.superblock(io, offset).await {
                let waits = WaitsFor::NewerThan(self.of.checkpoints.superblock().epoch);
                self.mend_by_checkpoint(MetadataPart::Superblock { offset }, reason, waits);
            }
        }
    }

    /// What is wrong with a copy, as two looks say between which no checkpoint has written it.
    async fn superblock<S: Io>(&mut self, io: &S, offset: ByteOffset) -> Option<BadReason> {
        let checkpoints = self.of.checkpoints;
        let mut failed = 0;
        for _ in 0..LOOKS {
            let (current, resting) = (checkpoints.superblock(), checkpoints.are_resting());
            let buf = mem::replace(self.buf(), Buf::none());
            let read;
            (read, *self.buf()) = io.read(Device::Meta, offset, buf, 0..PAGE_BYTES).await;
            let reason = match read {
                Err(errno) => BadReason::Unreadable { device: Device::Meta, errno },
                Ok(()) if self.is_right(&current, offset) => return None,
                Ok(()) => BadReason::Mismatch,
            };
            if resting && checkpoints.are_resting() && checkpoints.superblock().epoch == current.epoch {
                failed += 1;
            }
            if failed == 2 {
                return Some(reason);
            }
            self.control.sleep(io, BETWEEN_LOOKS).await;
        }
        None
    }

    /// Whether the copy that was read is this one, or that of a checkpoint since. Where nothing may be written, the
    /// second may be as a crash between the two has left it, which is no damage.
    fn is_right(&mut self, current: &Superblock, offset: ByteOffset) -> bool {
        let keys = self.of.checkpoints.keys();
        let raw = RawSuperblock::read_from_prefix(self.buf()).expect("a page is large enough").0;
        let may_be_left = !self.of.writable && offset == Layout::superblock_offsets()[1];
        match raw.verify(keys) {
            Ok(copy) if copy.uuid == current.uuid && copy.epoch > current.epoch => true,
            Ok(copy) if copy.uuid == current.uuid && copy.epoch.next() == current.epoch => may_be_left,
            Ok(_) => self.buf()[..SUPERBLOCK_BYTES] == *current.seal(keys).as_bytes(),
            Err(_) => false,
        }
    }

    /// Nobody writes it while the volume is open.
    pub(super) async fn identity<S: Io>(&mut self, io: &S) {
        let (current, keys) = (self.of.checkpoints.superblock(), self.of.checkpoints.keys());
        if !current.layout.separate_meta {
            return;
        }
        let own = Identity { uuid: current.uuid, size: current.layout.size() };
        let (mut reason, mut is_rotten) = (BadReason::Mismatch, true);
        // It is written over only if it was bad each time.
        for again in [false, true] {
            if again {
                self.control.sleep(io, BETWEEN_LOOKS).await;
            }
            let raw = match retry(io, READ, async || read_identity(io).await).await {
                Ok(raw) => raw,
                Err(e) => {
                    reason = BadReason::Unreadable { device: e.device, errno: e.errno };
                    continue;
                }
            };
            let claim = raw.claim();
            let is_own = claim == Ok(Some(own));
            // What a crash while it grew has left is no damage, where nothing may be written.
            if is_own && raw.verify(keys) || !self.of.writable && may_be_left(&current, &raw, keys) {
                return;
            }
            // What is whole and somebody else's is left alone. The MAC of our own may have rotted, too.
            let is_ours = is_own && raw.names_key_of(keys);
            (reason, is_rotten) = (BadReason::Mismatch, is_rotten && (is_ours || claim == Ok(None)));
        }
        // One that leaves looks at it again when it goes on.
        if is_rotten && !self.may_go_on().await {
            return;
        }
        let mended = is_rotten && self.mend_identity(io, &own).await;
        self.findings.metadata(MetadataPart::Identity, reason, if mended { Remedy::Mended } else { Remedy::None });
    }

    /// Reads the next piece of the live log, for read errors alone: what it says is proven at the next open.
    pub(super) async fn log<S: Io>(&mut self, io: &S, left: &mut Range<u64>) {
        let log = self.of.log;
        let (offset, to_end) = log.place(left.start);
        let len = (left.end - left.start).min(to_end).min(self.buf().len() as u64);
        left.start += len;
        for again in [true, false] {
            let buf = mem::replace(self.buf(), Buf::none());
            let read;
            (read, *self.buf()) = io.read(Device::Meta, offset, buf, 0..len as usize).await;
            match read {
                Ok(()) => break,
                // Nobody needs it any more once a checkpoint has freed it.
                Err(errno) if !again && log.live().start < left.start => {
                    let reason = BadReason::Unreadable { device: Device::Meta, errno };
                    let waits = WaitsFor::LogFree(left.start);
                    self.mend_by_checkpoint(MetadataPart::Log { offset, len }, reason, waits);
                }
                Err(_) => {}
            }
        }
    }
}

/// Whether a crash while the volume grew may have left this identity block: each open accepts it.
fn may_be_left(current: &Superblock, raw: &RawIdentity, keys: &Keys) -> bool {
    match claimed(raw, current, keys) {
        Ok(Some(Claimed::Torn)) => true,
        Ok(Some(Claimed::Size(size))) => size < current.layout.size() && raw.verify(keys),
        _ => false,
    }
}
