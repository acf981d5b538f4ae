//! One operation: what the kernel is asked for, and what its answer means.

use io_uring::{opcode, squeue, types};
use std::{cell::Cell, ops::Range, os::fd::RawFd, task::Waker, time::Duration};
use ublk_integrity::{Buf, ByteOffset, Durability, Errno};

/// Index of a file among those that the ring was made for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FileIndex(pub u32);

/// A file as an entry names it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum FileName {
    /// By its number in the ring's table.
    Registered(u32),
    /// By a descriptor.
    Descriptor(RawFd),
}

impl FileName {
    fn number(self) -> types::Fd {
        match self {
            Self::Registered(index) => types::Fd(index as i32),
            Self::Descriptor(number) => types::Fd(number),
        }
    }

    fn flags(self) -> squeue::Flags {
        match self {
            Self::Registered(_) => squeue::Flags::FIXED_FILE,
            Self::Descriptor(_) => squeue::Flags::empty(),
        }
    }
}

/// What an operation does.
pub enum Work {
    Read { buf: Buf, part: Range<usize>, at: ByteOffset },
    Write { buf: Buf, part: Range<usize>, at: ByteOffset, durability: Durability },
    Sync,
    Discard { at: ByteOffset, len: u64 },
    Sleep(Duration),
}

impl Work {
    /// What it counts among the operations in flight.
    pub(super) fn weight(&self) -> usize {
        usize::from(!matches!(self, Self::Sleep(_)))
    }

    /// A log record or a sync: many requests wait for one.
    pub(super) fn is_urgent(&self) -> bool {
        matches!(self, Self::Write { durability: Durability::Durable, .. } | Self::Sync)
    }
}

/// How the ring discards: each way is used until the device has refused it once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum DiscardWay {
    /// Reads as zeros afterwards. A block device that would have to write zeros refuses.
    PunchHole,
    /// Reads as anything afterwards, which is all we ask for.
    Forget,
    Unsupported,
}

const FALLOC_FL_KEEP_SIZE: i32 = 0x01;
const FALLOC_FL_PUNCH_HOLE: i32 = 0x02;
const FALLOC_FL_NO_HIDE_STALE: i32 = 0x04;

pub(super) enum State {
    Free,
    InFlight(Option<Waker>),
    /// The future is gone; the memory stays until the kernel is done with it.
    Orphan,
    Done(Result<(), Errno>),
}

pub(super) struct Op {
    pub(super) state: State,
    pub(super) file: FileIndex,
    pub(super) work: Work,
    /// Bytes of a transfer that are done.
    pub(super) moved: usize,
    /// The data of a durable write is out; its fdatasync is in flight.
    pub(super) syncing: bool,
    /// Boxed: its address must hold until the kernel has read it.
    pub(super) timeout: Box<types::Timespec>,
}

fn write_flags(durability: Durability, no_dsync: bool) -> i32 {
    if durability == Durability::Durable && !no_dsync { libc::RWF_DSYNC } else { 0 }
}

impl Op {
    /// The submission for what remains to be done; `None` where the device can't.
    pub(super) fn entry(
        &mut self,
        file: FileName,
        ring: u32,
        discard: DiscardWay,
        no_dsync: bool,
    ) -> Option<squeue::Entry> {
        let number = file.number();
        let data_sync = || opcode::Fsync::new(number).flags(types::FsyncFlags::DATASYNC).build();
        let entry = match &mut self.work {
            Work::Read { buf, part, at } => {
                let registered = registered(buf, ring);
                let rest = &mut buf[part.clone()][self.moved..];
                let (at, len, memory) = (at.0 + self.moved as u64, rest.len() as u32, rest.as_mut_ptr());
                match registered {
                    Some(index) => opcode::ReadFixed::new(number, memory, len, index).offset(at).build(),
                    None => opcode::Read::new(number, memory, len).offset(at).build(),
                }
            }
            Work::Write { .. } if self.syncing => data_sync(),
            Work::Write { buf, part, at, durability } => {
                let rest = &buf[part.clone()][self.moved..];
                let (at, len, memory) = (at.0 + self.moved as u64, rest.len() as u32, rest.as_ptr());
                let flags = write_flags(*durability, no_dsync);
                match registered(buf, ring) {
                    Some(index) => {
                        opcode::WriteFixed::new(number, memory, len, index).offset(at).rw_flags(flags).build()
                    }
                    None => opcode::Write::new(number, memory, len).offset(at).rw_flags(flags).build(),
                }
            }
            Work::Sync => data_sync(),
            Work::Discard { at, len } => {
                let mode = match discard {
                    DiscardWay::PunchHole => FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                    DiscardWay::Forget => FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE | FALLOC_FL_NO_HIDE_STALE,
                    DiscardWay::Unsupported => return None,
                };
                opcode::Fallocate::new(number, *len).offset(at.0).mode(mode).build()
            }
            // A timer takes the kernel longer than all else that a thread does to its ring.
            Work::Sleep(time) if time.is_zero() => return Some(opcode::Nop::new().build()),
            Work::Sleep(time) => {
                *self.timeout = (*time).into();
                // Is on no file.
                return Some(opcode::Timeout::new(&*self.timeout).build());
            }
        };
        Some(entry.flags(file.flags()))
    }

    /// What a completion means: the operation's result, or `None` where it goes on.
    pub(super) fn judge(
        &mut self,
        result: i32,
        discard: &Cell<DiscardWay>,
        no_dsync: &Cell<bool>,
    ) -> Option<Result<(), Errno>> {
        if result == -libc::EINTR || result == -libc::EAGAIN {
            return None;
        }
        let refused = result == -libc::EOPNOTSUPP;
        match &self.work {
            Work::Read { part, .. } | Work::Write { part, .. } if !self.syncing => {
                let durable = matches!(self.work, Work::Write { durability: Durability::Durable, .. });
                if refused && durable && !no_dsync.get() {
                    no_dsync.set(true);
                    return None;
                }
                match result {
                    ..0 => return Some(Err(Errno(-result))),
                    // The end of the file, or of the device, lies inside the range.
                    0 if !part.is_empty() => return Some(Err(Errno::EIO)),
                    _ => self.moved += result as usize,
                }
                if self.moved < part.len() {
                    return None;
                }
                if durable && no_dsync.get() {
                    self.syncing = true;
                    return None;
                }
                Some(Ok(()))
            }
            Work::Discard { .. } if refused => match discard.get() {
                DiscardWay::PunchHole => {
                    discard.set(DiscardWay::Forget);
                    None
                }
                _ => {
                    discard.set(DiscardWay::Unsupported);
                    Some(Err(Errno::EOPNOTSUPP))
                }
            },
            Work::Sleep(_) if result == -libc::ETIME => Some(Ok(())),
            _ if result < 0 => Some(Err(Errno(-result))),
            _ => Some(Ok(())),
        }
    }
}

/// The number by which a ring knows this buffer.
fn registered(buf: &Buf, ring: u32) -> Option<u16> {
    buf.mark().filter(|mark| mark.ring == ring).map(|mark| mark.index)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(durability: Durability) -> Op {
        Op {
            state: State::InFlight(None),
            file: FileIndex(0),
            work: Work::Write { buf: Buf::new(8192), part: 0..8192, at: ByteOffset(0), durability },
            moved: 0,
            syncing: false,
            timeout: Box::new(types::Timespec::new()),
        }
    }

    fn submits(op: &mut Op, no_dsync: bool) -> u8 {
        op.entry(FileName::Registered(0), 0, DiscardWay::PunchHole, no_dsync).unwrap().get_opcode() as u8
    }

    #[test]
    fn a_device_without_rwf_dsync_gets_an_fdatasync_after_each_durable_write() {
        let (discard, no_dsync) = (Cell::new(DiscardWay::PunchHole), Cell::new(false));
        let mut op = write(Durability::Durable);
        let judge = |op: &mut Op, result| op.judge(result, &discard, &no_dsync);
        assert_eq!(submits(&mut op, false), opcode::Write::CODE);
        assert_eq!(judge(&mut op, -libc::EOPNOTSUPP), None, "it goes on");
        assert!(no_dsync.get(), "and all later ones know");
        // The whole of it once more, without the flag; in two parts.
        assert_eq!((submits(&mut op, true), op.moved), (opcode::Write::CODE, 0));
        assert_eq!(write_flags(Durability::Durable, true), 0);
        assert_eq!(judge(&mut op, 4096), None);
        assert_eq!(submits(&mut op, true), opcode::Write::CODE);
        assert_eq!(judge(&mut op, 4096), None, "written is not durable");
        assert_eq!(submits(&mut op, true), opcode::Fsync::CODE);
        assert_eq!(judge(&mut op, -libc::EINTR), None);
        assert_eq!(submits(&mut op, true), opcode::Fsync::CODE);
        assert_eq!(judge(&mut op, 0), Some(Ok(())));
    }

    #[test]
    fn a_failed_fdatasync_fails_the_durable_write() {
        let (discard, no_dsync) = (Cell::new(DiscardWay::PunchHole), Cell::new(true));
        let mut op = write(Durability::Durable);
        assert_eq!(op.judge(8192, &discard, &no_dsync), None);
        assert_eq!(op.judge(-libc::EIO, &discard, &no_dsync), Some(Err(Errno::EIO)));
        let mut refused = write(Durability::Durable);
        let twice = refused.judge(-libc::EOPNOTSUPP, &discard, &no_dsync);
        assert_eq!(twice, Some(Err(Errno::EOPNOTSUPP)), "without the flag it is an error like any other");
    }

    #[test]
    fn other_writes_need_neither() {
        let (discard, no_dsync) = (Cell::new(DiscardWay::PunchHole), Cell::new(true));
        assert_eq!(write(Durability::MayBeLost).judge(8192, &discard, &no_dsync), Some(Ok(())));
        assert_eq!(write_flags(Durability::MayBeLost, false), 0);
        assert_eq!(write_flags(Durability::Durable, false), libc::RWF_DSYNC);
        no_dsync.set(false);
        let refused = write(Durability::MayBeLost).judge(-libc::EOPNOTSUPP, &discard, &no_dsync);
        assert_eq!((refused, no_dsync.get()), (Some(Err(Errno::EOPNOTSUPP)), false));
    }
}
