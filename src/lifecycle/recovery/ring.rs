//! The ring as recovery reads it: once, from the live log's beginning on, a window at a time.
//!
//! What can't be read is told apart from what is there: nobody may take it for the end of the log.

use super::patience::{Effort, Patience};
use crate::{
    Buf, ByteOffset, Device, DeviceError, Storage,
    format::Layout,
    io::retry::READ,
    lifecycle::{open_error::OpenError, superblocks::Newest},
};
use std::ops::Range;

/// Bytes that are read at a time, and held.
const WINDOW: usize = 1 << 20;

/// A window on the ring; moves forward only.
pub(super) struct Ring<'a, S: Storage> {
    io: &'a S,
    layout: Layout,
    /// What can't be read is told apart in pieces of this many bytes: no record shares one with
    /// another.
    piece: usize,
    /// Place in the ring of the window's first byte, and how many bytes it holds.
    at: u64,
    held: usize,
    window: Buf,
    /// Places in the ring that can't be read, of the window.
    unreadable: Vec<(Range<u64>, DeviceError)>,
    /// The first of all.
    first: Option<DeviceError>,
    patience: Patience<S>,
}

impl<'a, S: Storage> Ring<'a, S> {
    pub(super) fn new(io: &'a S, newest: &Newest, effort: Effort) -> Self {
        let superblock = &newest.superblock;
        let layout = superblock.layout;
        Self {
            io,
            layout,
            piece: superblock.physical_block.max(io.geometry(Device::Meta).logical_block) as usize,
            at: 0,
            held: 0,
            window: Buf::new(WINDOW.min(layout.log_size as usize)),
            unreadable: Vec::new(),
            first: None,
            patience: Patience::new(Device::Meta, newest, effort),
        }
    }

    /// Bytes of the ring.
    pub(super) fn size(&self) -> u64 {
        self.layout.log_size
    }

    /// The bytes from place `at` on that a record which begins there may have. What
    /// can't be read is zeros.
    pub(super) async fn from(&mut self, at: u64) -> Result<&[u8], OpenError> {
        if at < self.at || at + self.most(at) as u64 > self.at + self.held as u64 {
            self.move_to(at).await?;
        }
        Ok(self.read_before(at))
    }

    /// The same bytes once more, of the place that was read last.
    pub(super) fn read_before(&self, at: u64) -> &[u8] {
        let begin = (at - self.at) as usize;
        &self.window[begin..begin + self.most(at)]
    }

    fn most(&self, at: u64) -> usize {
        (self.layout.max_record() as u64).min(self.size() - at) as usize
    }

    /// What is read next comes from the device.
    pub(super) fn forget(&mut self) {
        self.held = 0;
    }

    /// Why one of these bytes of the window can't be read, if so.
    pub(super) fn unreadable(&self, bytes: Range<u64>) -> Option<DeviceError> {
        let hit = |bad: &Range<u64>| bad.start < bytes.end && bytes.start < bad.end;
        self.unreadable.iter().find(|(bad, _)| hit(bad)).map(|(_, why)| *why)
    }

    /// Why the first place that could not be read could not, if there was any.
    pub(super) fn first_unreadable(&self) -> Option<DeviceError> {
        self.first
    }

    /// Whether reads that failed have taken so long that the rest is not tried.
    pub(super) fn has_had_enough(&self) -> bool {
        self.patience.has_had_enough()
    }

    async fn move_to(&mut self, at: u64) -> Result<(), OpenError> {
        // From where the device can read, and no earlier: what lies before is nobody's.
        let at = at / self.piece as u64 * self.piece as u64;
        let len = (self.window.len() as u64).min(self.size() - at) as usize;
        (self.at, self.held) = (at, len);
        self.unreadable.clear();
        if !self.has_had_enough() && self.read(0..len, 1).await?.is_ok() {
            return Ok(());
        }
        // One bad sector must not take its neighbours along.
        for begin in (0..len).step_by(self.piece) {
            let part = begin..(begin + self.piece).min(len);
            if let Err(why) = self.read(part.clone(), READ.most).await? {
                let enough = self.has_had_enough();
                self.is_unreadable(if enough { begin..len } else { part }, why);
                if enough {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Of the window.
    fn is_unreadable(&mut self, part: Range<usize>, why: DeviceError) {
        self.unreadable.push((self.at + part.start as u64..self.at + part.end as u64, why));
        self.window[part].fill(0);
        self.first.get_or_insert(why);
    }

    async fn read(&mut self, part: Range<usize>, tries: u32) -> Result<Result<(), DeviceError>, OpenError> {
        let Self { io, layout, at, window, patience, .. } = self;
        let offset = ByteOffset(layout.log_offset().0 + *at + part.start as u64);
        let read = async |buf| io.read(Device::Meta, offset, buf, part.clone()).await;
        let result;
        (result, *window) =
            patience.tries(io, (offset, part.len()), tries, std::mem::replace(window, Buf::none()), read).await?;
        Ok(result)
    }
}
