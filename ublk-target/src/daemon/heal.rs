//! Healing blocks that have rotted from replicas that a client sends, one client at a time.
//!
//! The client reads the replicas, not the daemon: this sees no file systems but those that were mounted
//! when it began, and one that lies on its own device would hang it. It believes nothing of what it is
//! sent: a block is written only if its tag proves it (`Volume::heal`).

use super::{
    log::{Event, Log},
    memory_budget::{Available, Purpose},
    protocol::{MOST_BYTES, Offer, Offered, Refusal, failed, line},
};
use crate::{
    event_loop::{OwnRing, ring::DeviceFiles},
    failure::{Context, Exit, Failure, Outcome},
    threads::named,
};
use serde_json::{Value, json};
use std::{
    io::{self, ErrorKind, Read, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::{
        Arc, Mutex, MutexGuard, TryLockError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};
use ublk_integrity::{
    BlockIndex, BlockRange, Buf, RequestContext, Volume,
    heal::{HealError, Healed},
    read_hex,
};

/// How long a client may be silent, and take for an answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// What it takes at most, beside what a request has: its ring and its stack.
const MEMORY: u64 = 4 << 20;
/// For how long blocks that are healed one after the other make one run.
const RUN: Duration = Duration::from_secs(1);
/// How often it is looked whether the daemon is about to end.
const LOOK: Duration = Duration::from_millis(50);

/// The healing of one volume.
pub(super) struct Healing {
    volume: Arc<Volume>,
    log: Log,
    /// Whoever heals holds it.
    context: Mutex<RequestContext>,
    /// Whether somebody may.
    open: AtomicBool,
}

impl Healing {
    pub(super) fn of(volume: &Arc<Volume>, log: &Log) -> Self {
        Self {
            volume: Arc::clone(volume),
            log: log.clone(),
            context: Mutex::new(volume.context(0)),
            open: AtomicBool::new(true),
        }
    }

    /// Has a thread of its own answer the client, on `devices`. `good` hears of each block that is good now,
    /// and whether it was bad until then.
    pub(super) fn begin(
        self: Arc<Self>,
        client: UnixStream,
        (descriptors, files): (Vec<OwnedFd>, DeviceFiles),
        good: impl Fn(BlockIndex, bool) + Send + 'static,
    ) -> Outcome {
        self.refuse_under_way()?;
        Available::here(Purpose::New).refuse_less_than(MEMORY, "heal when there is more")?;
        let doing = "can't begin to heal blocks";
        let heal = move || {
            let mut client = Client { stream: client, received: Vec::new() };
            if let Err(refusal) = self.serve(&mut client, descriptors, files, good) {
                client.say(&refusal.answer());
            }
        };
        named("heal").spawn(heal).doing(doing).map(drop)
    }

    /// Nobody heals from now on. Whoever does comes to the end of a block first: whether that took no longer
    /// than this.
    pub(super) fn rest(&self, within: Duration) -> bool {
        self.open.store(false, Ordering::SeqCst);
        let begun = Instant::now();
        while self.is_under_way() {
            if begun.elapsed() >= within {
                return false;
            }
            thread::sleep(Duration::from_millis(5));
        }
        true
    }

    /// Somebody may again.
    pub(super) fn resume(&self) {
        self.open.store(true, Ordering::SeqCst);
    }

    fn is_under_way(&self) -> bool {
        matches!(self.context.try_lock(), Err(TryLockError::WouldBlock))
    }

    /// Refuses to begin something else beside it.
    pub(super) fn refuse_under_way(&self) -> Outcome {
        if self.is_under_way() { Err(under_way()) } else { Ok(()) }
    }

    fn alone(&self) -> Outcome<MutexGuard<'_, RequestContext>> {
        match self.context.try_lock() {
            Ok(context) => Ok(context),
            // It is as it was before a request.
            Err(TryLockError::Poisoned(e)) => Ok(e.into_inner()),
            Err(TryLockError::WouldBlock) => Err(under_way()),
        }
    }

    fn serve(
        &self,
        client: &mut Client,
        descriptors: Vec<OwnedFd>,
        files: DeviceFiles,
        good: impl Fn(BlockIndex, bool),
    ) -> Result<(), Refusal> {
        client.set_up().doing("can't talk to who is to be answered")?;
        let mut context = self.alone()?;
        // A ring belongs to the thread that made it.
        let ring = OwnRing::new(descriptors).doing("can't begin to heal blocks")?;
        let (io, bs) = (ring.storage(files), self.volume.block_size());
        let mut healed = Runs::new(|run| self.log.tell(Event::Healed(run)));
        let mut buf = Buf::new(bs);
        client.say(&json!({ "block_size": bs, "data_offset": self.volume.data_offset() }));
        while let Some(line) = client.next_line(&self.open)? {
            let answer = match read(&line, &mut buf) {
                Ok(block) => {
                    let heal = self.volume.heal(&io, &mut context, block, buf);
                    let outcome;
                    // With a write under way the block may not be given free: as any thread that writes.
                    (outcome, buf) = ring.block_on(heal).expect("a ring that worked goes on working");
                    if let Ok(now @ (Healed::Healed | Healed::WasGood)) = outcome {
                        good(block, now == Healed::Healed);
                    }
                    if outcome == Ok(Healed::Healed) {
                        healed.add(block, Instant::now());
                    }
                    answer(block, outcome)
                }
                Err(failure) => failed(&failure),
            };
            if !client.say(&answer) {
                break;
            }
        }
        Ok(())
    }
}

fn under_way() -> Failure {
    Failure::new(Exit::Busy, "blocks of this device are being healed by another command: wait for its end")
}

fn answer(block: BlockIndex, outcome: Result<Healed, HealError>) -> Value {
    json!(match outcome {
        Ok(outcome) => Offered::Done { block, outcome },
        Err(e) => {
            let Failure { message: failed, exit, .. } = e.into();
            Offered::Failed { block, failed, exit: exit as u8 }
        }
    })
}

/// Which block it is for; its bytes go to the front of `buf`.
fn read(line: &[u8], buf: &mut Buf) -> Outcome<BlockIndex> {
    let wrong = |why: String| Failure::new(Exit::Arguments, why);
    let Offer { block, replica } = serde_json::from_slice(line).map_err(|e| wrong(format!("heal: {e}")))?;
    let bs = buf.len();
    if replica.len() != 2 * bs {
        return Err(wrong(format!("heal: a replica of {} hexadecimal digits, not {}", replica.len(), 2 * bs)));
    }
    if read_hex(&replica, buf) { Ok(block) } else { Err(wrong("heal: a replica is hexadecimal".into())) }
}

/// Blocks that are healed, as runs: each is told once another block than its next is, or a while has gone by,
/// and the last at the end.
struct Runs<F: FnMut(BlockRange)> {
    tell: F,
    /// And when it began.
    run: Option<(BlockRange, Instant)>,
}

impl<F: FnMut(BlockRange)> Runs<F> {
    fn new(tell: F) -> Self {
        Self { tell, run: None }
    }

    fn add(&mut self, block: BlockIndex, now: Instant) {
        match &mut self.run {
            Some((run, begun)) if run.end() == block.0 && now.duration_since(*begun) < RUN => run.count += 1,
            _ => {
                self.end();
                self.run = Some((BlockRange::new(block, 1), now));
            }
        }
    }

    fn end(&mut self) {
        if let Some((run, _)) = self.run.take() {
            (self.tell)(run);
        }
    }
}

/// However the client has left.
impl<F: FnMut(BlockRange)> Drop for Runs<F> {
    fn drop(&mut self) {
        self.end();
    }
}

struct Client {
    stream: UnixStream,
    received: Vec<u8>,
}

impl Client {
    fn set_up(&self) -> io::Result<()> {
        self.stream.set_nonblocking(false)?;
        self.stream.set_read_timeout(Some(LOOK))?;
        self.stream.set_write_timeout(Some(PATIENCE))
    }

    /// Whether that could be said.
    fn say(&self, what: &Value) -> bool {
        (&self.stream).write_all(&line(what)).is_ok()
    }

    /// The next line; `None` where the client has gone. It is to say something for as long as `open`.
    fn next_line(&mut self, open: &AtomicBool) -> Result<Option<Vec<u8>>, Refusal> {
        let begun = Instant::now();
        loop {
            if !open.load(Ordering::SeqCst) {
                return Err(Refusal::Leaving);
            }
            if let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
                return Ok(Some(self.received.drain(..=end).collect()));
            }
            if self.received.len() > MOST_BYTES {
                let message = format!("a request has at most {MOST_BYTES} bytes");
                return Err(Failure::new(Exit::Arguments, message).into());
            }
            if begun.elapsed() > PATIENCE {
                let message = format!("no replica within {} s", PATIENCE.as_secs());
                return Err(Failure::new(Exit::Busy, message).into());
            }
            let mut bytes = [0; 4096];
            match (&self.stream).read(&mut bytes) {
                Ok(0) => return Ok(None),
                Ok(count) => self.received.extend_from_slice(&bytes[..count]),
                Err(e) if is_silence(&e) => {}
                Err(_) => return Ok(None),
            }
        }
    }
}

fn is_silence(e: &io::Error) -> bool {
    matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::offline::{Opening, scratch};
    use std::{
        io::{BufRead, BufReader},
        sync::atomic::AtomicU64,
    };
    use ublk_integrity::Access;

    struct Test {
        healing: Arc<Healing>,
        devices: Box<dyn Fn() -> (Vec<OwnedFd>, DeviceFiles)>,
        good: Arc<AtomicU64>,
        _file: tempfile::NamedTempFile,
    }

    impl Test {
        fn new() -> Self {
            let (file, offline, key) = scratch();
            let volume = Arc::new(offline.open_volume(&key, Opening::new(Access::ReadWrite, None)).unwrap());
            let backings = offline.into_backings();
            let healing = Arc::new(Healing::of(&volume, &Log::of_test()));
            let devices = Box::new(move || (backings.descriptors().unwrap(), backings.files(0)));
            Self { healing, devices, good: Arc::default(), _file: file }
        }

        /// A client, and how it was answered first.
        fn client(&self) -> (BufReader<UnixStream>, Value) {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let good = Arc::clone(&self.good);
            let count = move |_, _| {
                good.fetch_add(1, Ordering::SeqCst);
            };
            let begun = Arc::clone(&self.healing).begin(theirs, (self.devices)(), count);
            let mut ours = BufReader::new(ours);
            let answer = begun.err().map_or_else(|| next(&mut ours), |failure| failed(&failure));
            (ours, answer)
        }
    }

    fn next(client: &mut BufReader<UnixStream>) -> Value {
        let mut text = String::new();
        client.read_line(&mut text).unwrap();
        serde_json::from_str(&text).unwrap_or_default()
    }

    fn offer(client: &mut BufReader<UnixStream>, line: &str) -> Value {
        client.get_mut().write_all(format!("{line}\n").as_bytes()).unwrap();
        next(client)
    }

    #[test]
    fn one_line_for_each_block_and_what_is_wrong_is_said() {
        let test = Test::new();
        let (mut client, ready) = test.client();
        let bs = ready["block_size"].as_u64().unwrap() as usize;
        assert!(ready["data_offset"].as_u64().unwrap() > 0);
        let replica = "5a".repeat(bs);
        // It reads as zeros: whatever the replica is.
        let good = offer(&mut client, &format!("{{\"block\":3,\"replica\":\"{replica}\"}}"));
        assert_eq!((good["block"].as_u64(), good["outcome"].as_str()), (Some(3), Some("was_good")));
        assert_eq!(test.good.load(Ordering::SeqCst), 1);
        let outside = offer(&mut client, &format!("{{\"block\":99999999,\"replica\":\"{replica}\"}}"));
        assert!(outside["block"] == 99999999 && outside["failed"].as_str().unwrap().contains("outside"), "{outside}");
        for wrong in ["", "{}", "{\"block\":1,\"replica\":\"5a\"}", "{\"block\":1,\"replica\":\"\",\"more\":1}"] {
            assert_eq!(offer(&mut client, wrong)["exit"], Exit::Arguments as u8, "{wrong}");
        }
        let odd = format!("{{\"block\":3,\"replica\":\"{}zz\"}}", "5a".repeat(bs - 1));
        assert!(offer(&mut client, &odd)["error"].as_str().unwrap().contains("hexadecimal"));
        assert_eq!(test.good.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn one_heals_at_a_time_and_none_while_the_daemon_ends() {
        let test = Test::new();
        let (mut first, _) = test.client();
        let (_, second) = test.client();
        assert_eq!(second["exit"], Exit::Busy as u8);
        assert!(test.healing.refuse_under_way().is_err());
        // It waits for its client alone: that ends at once.
        let begun = Instant::now();
        assert!(test.healing.rest(PATIENCE));
        assert!(begun.elapsed() < PATIENCE);
        assert!(Refusal::is_of_leaving(&next(&mut first)));
        assert!(!Refusal::is_of_leaving(&second), "it may have been any client");
        let (_, refused) = test.client();
        assert!(refused["block_size"].as_u64().is_some(), "it hears so when it asks");
        assert!(test.healing.rest(PATIENCE));
        test.healing.resume();
        let (again, ready) = test.client();
        assert!(ready["block_size"].is_u64());
        drop(again);
        while test.healing.is_under_way() {
            thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn what_is_healed_is_told_in_runs_and_each_block_of_it_once() {
        let mut told = Vec::new();
        let mut runs = Runs::new(|run| told.push(run));
        let begun = Instant::now();
        for block in [5, 6, 7, 9, 10, 3] {
            runs.add(BlockIndex(block), begun);
        }
        // Whoever heals many is heard of meanwhile.
        runs.add(BlockIndex(4), begun + RUN);
        runs.add(BlockIndex(5), begun + RUN);
        drop(runs);
        let run = |first, count| BlockRange::new(BlockIndex(first), count);
        assert_eq!(told, [run(5, 3), run(9, 2), run(3, 1), run(4, 2)]);
    }

    #[test]
    fn a_line_without_end_is_refused() {
        let test = Test::new();
        let (mut client, _) = test.client();
        let _ = client.get_mut().write_all(&vec![b'x'; MOST_BYTES + 8192]);
        let mut text = String::new();
        let _ = client.read_line(&mut text);
        assert!(text.is_empty() || text.contains("65536"), "{text}");
    }
}
