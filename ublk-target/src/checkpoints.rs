//! The loop that moves written tags from memory and log into pages, for as long as a volume is open.

use crate::sync::{AtomicBool, AtomicWaker, Ordering};
use futures_util::FutureExt;
use std::{
    future::{Future, poll_fn},
    pin::pin,
    task::Poll,
    time::Duration,
};
use ublk_integrity::{CheckpointerWork, Latched, Storage, Volume};

/// How long written tags stay in memory and log at most before they move into pages.
const PERIOD: Duration = Duration::from_secs(15);

/// A request to end, which a future can wait for.
#[derive(Default)]
pub struct Stop {
    set: AtomicBool,
    waker: AtomicWaker,
}

impl Stop {
    /// Asks.
    pub fn set(&self) {
        self.set.store(true, Ordering::SeqCst);
        self.waker.wake();
    }

    /// Ready once it was asked. One waiter only.
    pub fn wait(&self) -> impl Future<Output = ()> + '_ {
        poll_fn(|cx| {
            self.waker.register(cx.waker());
            if self.set.load(Ordering::SeqCst) { Poll::Ready(()) } else { Poll::Pending }
        })
    }
}

/// What becomes of the volume when its checkpoints are asked to stop.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AtStop {
    /// It is [closed](Volume::close).
    Close,
    /// It goes on to be served.
    GoOn,
}

/// Makes checkpoints when they are wanted and every few seconds, until `stop` is set. `tell` hears of
/// each and of the failure that ends them.
///
/// A checkpoint that has begun is never dropped: this ends only between two.
pub async fn run<S: Storage>(
    volume: &Volume,
    io: &S,
    (stop, at_stop): (&Stop, AtStop),
    tell: impl Fn(Result<CheckpointerWork, Latched>),
) -> Result<(), Latched> {
    let mut period = pin!(io.sleep(PERIOD).fuse());
    loop {
        let due = {
            let mut wanted = pin!(volume.work_wanted().fuse());
            let mut stopped = pin!(stop.wait().fuse());
            futures_util::select_biased! {
                () = stopped => return match at_stop {
                    AtStop::Close => volume.close(io).await,
                    AtStop::GoOn => volume.checkpoint(io).await,
                },
                // Before what is wanted, for that may be something at each turn.
                _ = period => {
                    period.set(io.sleep(PERIOD).fuse());
                    CheckpointerWork::Checkpoint
                }
                work = wanted => work,
            }
        };
        if let Err(latched) = volume.work(io, due).await {
            // Verified reads go on; nothing will ever be written again.
            tell(Err(latched));
            stop.wait().await;
            return Err(latched);
        }
        tell(Ok(due));
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use std::{
        cell::RefCell,
        task::{Context, Waker},
    };
    use ublk_integrity::{
        Access, BlockIndex, BlockRange, Buf, Durability, MasterKey, MemoryStorage, OpenOptions,
        create::{FormatOptions, format, plan},
        open::open,
    };

    #[test]
    fn writes_that_wait_at_each_turn_keep_no_checkpoint_from_its_time() {
        let (size, log_size) = (Some(1 << 20), Some(512 << 10));
        let options = FormatOptions { size, log_size, ..FormatOptions::new(4096, [1; 16]) };
        // Its pauses take no time: the period is over at each turn.
        let io = MemoryStorage::new(vec![0; plan(&options).unwrap().data_device_bytes as usize], 4096);
        let key = MasterKey::new(&[7; 32]).unwrap();
        io.run(format(&io, &key, &options)).unwrap();
        let options = OpenOptions::new(Access::ReadWrite, [1; 32]);
        let options = OpenOptions { write_back_slots: 4, sync_log: true, ..options };
        let volume = io.run(open(&io, &key, &options)).unwrap();
        let (mut context, one) = (volume.context(0), BlockRange::new(BlockIndex(0), 1));
        let admitted = volume.admit(&context, one, Durability::MayBeLost).expect("there are slots");
        let mut held = pin!(volume.write_back(&io, &mut context, admitted, Buf::new(4096), || {}));
        assert!(held.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        assert!(volume.work_wanted().now_or_never() == Some(CheckpointerWork::WriteBack));
        let (stop, told) = (Stop::default(), RefCell::new(Vec::new()));
        let tell = |done| {
            told.borrow_mut().push(done);
            stop.set();
        };
        io.run(run(&volume, &io, (&stop, AtStop::GoOn), tell)).unwrap();
        assert_eq!(told.into_inner(), [Ok(CheckpointerWork::Checkpoint)]);
    }
}

/// Real threads under a model checker: see `sync.rs`.
#[cfg(all(test, shuttle))]
mod interleavings {
    use super::*;
    use crate::shared::{check, formatted, opened, range, read, write};
    use shuttle::{future::block_on, thread};
    use std::sync::Arc;

    #[test]
    fn a_stop_in_the_middle_of_writes_ends_clean() {
        check(|| {
            let io = formatted();
            let volume = opened(&io, 1);
            let stop = Arc::new(Stop::default());
            let worker = {
                let (volume, io, stop) = (volume.clone(), io.clone(), stop.clone());
                thread::spawn(move || block_on(run(&volume, &io, (&stop, AtStop::Close), |done| _ = done.unwrap())))
            };
            let writers = [0, 1].map(|block| {
                let (volume, io) = (volume.clone(), io.clone());
                thread::spawn(move || {
                    write(&volume, &io, range(block, 1), 1).unwrap();
                    write(&volume, &io, range(block, 1), 2).unwrap();
                    block_on(volume.flush(&io, &mut volume.context(0))).unwrap();
                })
            });
            stop.set();
            worker.join().unwrap().unwrap();
            writers.into_iter().for_each(|writer| writer.join().unwrap());
            // What came after the last checkpoint is in the log.
            let volume = opened(&io, 2);
            let found = volume.recovery();
            assert_eq!((found.older, found.corrupt), (0, 0), "{found:?}");
            assert!([0, 1].iter().all(|block| read(&volume, &io, range(*block, 1)) == 2));
        });
    }

    #[test]
    fn a_stop_after_the_last_request_leaves_nothing_to_recover() {
        check(|| {
            let io = formatted();
            let volume = opened(&io, 1);
            let stop = Arc::new(Stop::default());
            let worker = {
                let (volume, io, stop) = (volume.clone(), io.clone(), stop.clone());
                thread::spawn(move || block_on(run(&volume, &io, (&stop, AtStop::Close), |done| _ = done.unwrap())))
            };
            write(&volume, &io, range(0, 1), 1).unwrap();
            stop.set();
            worker.join().unwrap().unwrap();
            let volume = opened(&io, 2);
            assert_eq!(volume.recovery().records, 0, "{:?}", volume.recovery());
            assert_eq!(read(&volume, &io, range(0, 1)), 1);
        });
    }
}
