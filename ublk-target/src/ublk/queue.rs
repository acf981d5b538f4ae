//! One thread for each ublk queue, or several that share its tags; one task for each tag.
//!
//! A task fetches a request, serves it on the queue's own ring, and commits the result, which fetches
//! the next. Whatever happens it commits *something*: a request that is never completed hangs its
//! caller and the device's teardown for ever.

use super::{
    load::Load,
    request::Request,
    shared::{Memory, Shared},
    stopwatch::Stopwatch,
    transfer::{Transfer, is_asked},
    write_back::WriteBack,
};
use crate::{
    event_loop::{
        Batch, EventLoop, Executor,
        ring::{Ops, Port, RingStorage, TARGET_BIT, build, register},
    },
    output,
    rings::RingLife,
};
use libublk::{
    UblkError,
    io::{UblkDev, UblkQueue, io_thread_idx},
    ublk_init_task_ring,
    uring_async::{ublk_reap_io_events_with_update_queue, ublk_wake_task},
    with_task_io_ring_mut,
};
use nix::sys::prctl::set_name;
use std::{cell::RefCell, ffi::CString, process, rc::Rc};
use ublk_integrity::{BlockTarget, Buf};

/// Operations that one request may have in flight at a time before the table grows: data, and a few
/// pages of metadata.
const OPS_PER_REQUEST: usize = 16;

/// Neighbouring tags that one of the threads of a queue serves: as many blocks as the widest
/// processor hashes at once.
const RUN: u16 = 8;

/// A thread of a queue. Returns when the device has been stopped.
pub(super) fn run<T: BlockTarget>(id: u16, device: &UblkDev, shared: &Shared<T>) {
    if let Err(e) = serve(id, device, shared) {
        // START_DEV waits for every queue, and requests would hang: there is no way to go on
        // without one.
        output::tell(format_args!("queue {id} can't run: {e}"));
        process::abort();
    }
}

fn serve<T: BlockTarget>(id: u16, device: &UblkDev, shared: &Shared<T>) -> Result<(), UblkError> {
    let (share, shares) = (io_thread_idx(), device.io_threads_per_queue());
    let thread = usize::from(id) * usize::from(shares) + usize::from(share);
    let name = if shares == 1 { format!("queue {id}") } else { format!("queue {id}.{share}") };
    // For people who look at threads; nothing depends on it.
    let _ = CString::new(name).map(|name| set_name(&name));
    init_ring(device)?;
    let queue = UblkQueue::new(id, device)?;
    let tags = queue.nr_tags() as usize;
    // A buffer that is named to the driver is overwritten with the next request.
    let file = shared.write_back_file.as_ref().filter(|_| is_asked(device.dev_info.flags));
    let mut write_back = WriteBack::new(shared, thread, tags, file.and_then(|file| file.take(thread)));
    let tasks = tags + write_back.writer_count();
    let (ops, batch) =
        (Ops::new(Port::Kept(|f| with_task_io_ring_mut(f)), tasks * OPS_PER_REQUEST)?, Batch::new(tasks));
    let io = RingStorage::new(Rc::clone(&ops), Rc::clone(&batch), shared.files);
    let load = Load::of(shared.gate.of_thread(thread));
    let mut memories: Vec<_> = Buf::several(tags, device.dev_info.max_io_buf_bytes as usize)
        .into_iter()
        .map(|buf| Memory { context: shared.target.context(thread), buf })
        .collect();
    T::work_together(memories.iter_mut().chain(write_back.memories()).map(|memory| &mut memory.context));
    // Refused, it only costs time. A ramfs that an older version has left mounted is: then the
    // others alone.
    let all = memories.iter_mut().chain(write_back.memories()).map(|memory| &mut memory.buf);
    let _ = register(&ops, all).or_else(|_| register(&ops, memories.iter_mut().map(|memory| &mut memory.buf)));
    let stopwatch = Stopwatch::new(&batch, shared.latencies.of_thread(thread), tags);
    let here = Thread { queue: &queue, io: &io, shared, load: &load, stopwatch: &stopwatch, write_back: &write_back };
    let mut executor = Executor::new(tasks, ops.doorbell(), &batch);
    for (tag, memory) in tags_of(share, shares, queue.get_depth() as u16).zip(memories) {
        executor.spawn(here.serve_tag(tag, memory));
    }
    (0..write_back.writer_count()).for_each(|writer| executor.spawn(write_back.write(writer, &io, shared, &load)));
    // Submits the fetch commands, for which START_DEV waits.
    executor.run_ready();
    device.notify_buffer_registration_complete(false);
    let reap = || {
        // Can't fail: it only takes completions.
        let _ = ublk_reap_io_events_with_update_queue(&queue, false, None, |cqe| {
            if cqe.user_data() & TARGET_BIT != 0 {
                ops.complete(cqe.user_data(), cqe.result());
            } else {
                ublk_wake_task(cqe.user_data(), cqe);
            }
        });
    };
    let expected = || load.expected(ops.in_flight());
    let (sending, hash_pool) = (&|| stopwatch.sending(), Some(&shared.hashing));
    EventLoop { executor: &executor, ops: &ops, reap, expected, sending, hash_pool }.drive()?;
    Ok(())
}

/// Gives libublk the kind of ring that we use everywhere, before it makes one of its
/// own for this thread.
fn init_ring(device: &UblkDev) -> Result<(), UblkError> {
    let ring = build(device.tgt.sq_depth.into(), device.tgt.cq_depth.into(), RingLife::Thread)?;
    ublk_init_task_ring(|cell| {
        // Set already only if this thread had served a queue before.
        let _ = cell.set(RefCell::new(ring));
        Ok(())
    })
}

/// The tags of the `share`-th of the threads that share a queue. Each thread gets as many as by
/// libublk's round robin, which counts on that, but other ones.
///
/// The kernel hands tags out in order, so requests that come together have tags side by side.
/// Round robin would deal these out one by one, which wakes every thread for a few requests. Here
/// each gets a run of them, and has more to do at once.
fn tags_of(share: u16, shares: u16, depth: u16) -> impl Iterator<Item = u16> {
    // The tags that do not fill a run for each thread are dealt out one by one, so that no thread
    // has two more than another.
    let even = depth - depth % (RUN * shares);
    let whose = move |tag| if tag < even { tag / RUN } else { tag };
    (0..depth).filter(move |tag| whose(*tag) % shares == share)
}

/// What the tasks of a thread have together.
struct Thread<'a, 't, T: BlockTarget + 't> {
    queue: &'a UblkQueue<'a>,
    io: &'a RingStorage,
    shared: &'t Shared<T>,
    load: &'a Load<'a>,
    stopwatch: &'a Stopwatch<'a>,
    write_back: &'a WriteBack<'t, T>,
}

impl<T: BlockTarget> Thread<'_, '_, T> {
    async fn serve_tag(&self, tag: u16, mut memory: Memory<T>) {
        let Self { queue, io, shared, load, stopwatch, write_back } = *self;
        let transfer = Transfer::of(queue, tag);
        let mut fetched = queue.submit_io_prep_cmd(tag, transfer.named(&memory.buf), -1, None).await;
        while fetched.is_ok() {
            let seen = stopwatch.seen();
            shared.gate.enter(load).await;
            let request = Request::parse(queue.get_iod(tag), shared.shift);
            let code = shared.answer(request, transfer, io, &mut memory, load, write_back).await;
            load.answered();
            stopwatch.answered(request.ok().and_then(|request| request.measured()), seen);
            fetched = queue.submit_io_commit_cmd(tag, transfer.named(&memory.buf), code).await;
        }
        write_back.tag_ends(shared);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_threads_of_a_queue_share_its_tags_as_libublk_counts_them() {
        for (depth, shares) in [(1, 1), (2, 2), (7, 3), (16, 2), (24, 2), (100, 3), (128, 2), (4096, 5)] {
            let mut seen = vec![false; depth.into()];
            for share in 0..shares {
                let tags: Vec<_> = tags_of(share, shares, depth).collect();
                assert_eq!(tags.len(), usize::from((depth - share).div_ceil(shares)), "{depth} tags, {shares} threads");
                for tag in tags {
                    assert!(!std::mem::replace(&mut seen[usize::from(tag)], true), "tag {tag} twice");
                }
            }
            assert!(!seen.contains(&false));
        }
        assert!(tags_of(1, 2, 128).take(16).eq((8..16).chain(24..32)));
    }
}
