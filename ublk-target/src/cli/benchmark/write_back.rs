//! Small writes as the daemon does them (`ublk/write_back.rs`): answered once their bytes are in a
//! slot, written back by the slot's own task.

use super::lane::Lane;
use crate::failure::Outcome;
use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    task::{Poll, Waker},
};
use ublk_integrity::{Admitted, BlockRange, Durability, Io, Volume, WriteBackId};

/// The slots of one thread.
pub struct WriteBack<'r> {
    slots: Vec<RefCell<Slot<'r>>>,
    idle: RefCell<Vec<usize>>,
    /// Lanes that may still write.
    lanes: Cell<usize>,
}

struct Slot<'r> {
    /// Here while the slot is idle, or about to be written back.
    memory: Option<&'r mut Lane>,
    admitted: Option<Admitted<'r>>,
    waker: Waker,
}

impl<'r> WriteBack<'r> {
    /// For writes of so many lanes.
    pub fn new(memory: &'r mut [Lane], lanes: usize) -> Self {
        let slot = |memory| Slot { memory: Some(memory), admitted: None, waker: Waker::noop().clone() };
        let slots: Vec<_> = memory.iter_mut().map(slot).map(RefCell::new).collect();
        Self { idle: RefCell::new((0..slots.len()).rev().collect()), slots, lanes: Cell::new(lanes) }
    }

    pub fn slots(&self) -> std::ops::Range<usize> {
        0..self.slots.len()
    }

    /// Copies the bytes and admits the write, if its range and a slot are free: it counts as
    /// answered, or does so once it is safe.
    pub fn admit(
        &self,
        volume: &'r Volume,
        range: BlockRange,
        bytes: &[u8],
        durability: Durability,
    ) -> Option<WriteBackId> {
        let index = self.idle.borrow().last().copied()?;
        let mut slot = self.slots[index].borrow_mut();
        let memory = slot.memory.as_mut().expect("an idle slot's memory is here");
        let admitted = volume.admit(memory.context(), range, durability)?;
        let id = admitted.id();
        memory.buf[..bytes.len()].copy_from_slice(bytes);
        slot.admitted = Some(admitted);
        slot.waker.wake_by_ref();
        self.idle.borrow_mut().pop();
        Some(id)
    }

    /// The task of a slot.
    pub async fn write(&self, index: usize, volume: &'r Volume, io: &impl Io) -> Outcome {
        while let Some((admitted, memory)) = self.next(index).await {
            let buf = memory.take_buf();
            let (result, buf) = volume.write_back(io, memory.context(), admitted, buf, || ()).await;
            memory.buf = buf;
            result?;
            self.slots[index].borrow_mut().memory = Some(memory);
            self.idle.borrow_mut().push(index);
        }
        Ok(())
    }

    /// The next write of a slot. `None`: there will be no more.
    async fn next(&self, index: usize) -> Option<(Admitted<'r>, &'r mut Lane)> {
        poll_fn(|cx| {
            let mut slot = self.slots[index].borrow_mut();
            if let Some(admitted) = slot.admitted.take() {
                return Poll::Ready(slot.memory.take().map(|memory| (admitted, memory)));
            }
            if self.lanes.get() == 0 {
                return Poll::Ready(None);
            }
            slot.waker.clone_from(cx.waker());
            Poll::Pending
        })
        .await
    }

    /// A lane writes no more. After the last of them each slot's task ends once it is done.
    pub fn lane_ends(&self) {
        self.lanes.set(self.lanes.get() - 1);
        if self.lanes.get() == 0 {
            self.slots.iter().for_each(|slot| slot.borrow().waker.wake_by_ref());
        }
    }
}
