//! Healing blocks that have rotted from replicas that a client sends, one client at a time.
//!
//! The client reads the replicas, not the daemon: this sees no file systems but those that were mounted
//! when it began, and one that lies on its own device would hang it. It believes nothing of what it is
//! sent: a block is written only if its tag proves it (`Volume::heal`).

use super::{
    log::{Event, Log},
    protocol::{MOST_BYTES, failed, line},
};
use crate::{
    event_loop::{OwnRing, ring::DeviceFiles},
    failure::{Context, Exit, Failure, Outcome},
    threads::named,
};
use serde::Deserialize;
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
    BlockIndex, Buf, RequestContext, Volume,
    heal::{HealError, Healed},
};

/// How long a client may be silent, and take for an answer.
const PATIENCE: Duration = Duration::from_secs(5);
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

/// A block as it should be, as a client says: a line of JSON.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Offer {
    block: u64,
    /// Its bytes, hexadecimal.
    replica: String,
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

    /// Has a thread of its own answer the client, on `devices`. `healed` hears of each block that is bad no
    /// more.
    pub(super) fn begin(
        self: Arc<Self>,
        client: UnixStream,
        (descriptors, files): (Vec<OwnedFd>, DeviceFiles),
        healed: impl Fn(BlockIndex) + Send + 'static,
    ) -> Outcome {
        let doing = "can't begin to heal blocks";
        client.set_nonblocking(false).doing(doing)?;
        client.set_read_timeout(Some(LOOK)).doing(doing)?;
        client.set_write_timeout(Some(PATIENCE)).doing(doing)?;
        let heal = move || {
            let mut client = Client { stream: client, received: Vec::new() };
            // A ring belongs to the thread that made it.
            let ring = OwnRing::new(descriptors).doing(doing);
            if let Err(failure) = ring.and_then(|ring| self.serve(&mut client, &ring, files, healed)) {
                client.say(&failed(&failure));
            }
        };
        named("heal").spawn(heal).doing(doing).map(drop)
    }

    /// Nobody heals from now on: whoever does comes to the end of a block first, if that takes no longer
    /// than this.
    pub(super) fn rest(&self, within: Duration) {
        self.open.store(false, Ordering::SeqCst);
        let begun = Instant::now();
        while self.context.try_lock().is_err_and(|e| matches!(e, TryLockError::WouldBlock)) {
            if begun.elapsed() >= within {
                return;
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Somebody may again.
    pub(super) fn resume(&self) {
        self.open.store(true, Ordering::SeqCst);
    }

    fn alone(&self) -> Outcome<MutexGuard<'_, RequestContext>> {
        match self.context.try_lock() {
            Ok(context) => Ok(context),
            Err(TryLockError::Poisoned(e)) => Ok(e.into_inner()),
            Err(TryLockError::WouldBlock) => Err(Failure::new(
                Exit::Busy,
                "blocks of this device are being healed by another command: wait for its end",
            )),
        }
    }

    fn serve(&self, client: &mut Client, ring: &OwnRing, files: DeviceFiles, healed: impl Fn(BlockIndex)) -> Outcome {
        let mut context = self.alone()?;
        let (io, bs) = (ring.storage(files), self.volume.block_size());
        let mut buf = Buf::new(bs);
        client.say(&json!({ "block_size": bs, "data_offset": self.volume.data_offset() }));
        while let Some(line) = client.next_line(&self.open)? {
            let answer = match read(&line, &mut buf) {
                Ok(block) => {
                    let heal = self.volume.heal(&io, &mut context, block, buf);
                    let outcome;
                    (outcome, buf) = ring.block_on(heal).doing("io_uring failed")?;
                    if outcome == Ok(Healed::Healed) {
                        self.log.tell(Event::Healed(block));
                        healed(block);
                    }
                    answer(outcome)
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

fn answer(outcome: Result<Healed, HealError>) -> Value {
    let word = match outcome {
        Ok(Healed::Healed) => "healed",
        Ok(Healed::WasGood) => "was_good",
        Ok(Healed::NotInReplica) => "not_in_replica",
        Err(e) => return failed(&e.into()),
    };
    json!({ "outcome": word })
}

/// Which block it is for; its bytes go to the front of `buf`.
fn read(line: &[u8], buf: &mut Buf) -> Outcome<BlockIndex> {
    let wrong = |why: String| Failure::new(Exit::Arguments, why);
    let Offer { block, replica } = serde_json::from_slice(line).map_err(|e| wrong(format!("heal: {e}")))?;
    let bs = buf.len();
    let digits = replica.as_bytes();
    if digits.len() != 2 * bs {
        return Err(wrong(format!("heal: a replica of {} hexadecimal digits, not {}", digits.len(), 2 * bs)));
    }
    for (byte, digits) in buf.iter_mut().zip(digits.chunks_exact(2)) {
        let digit = |digit: u8| char::from(digit).to_digit(16);
        let (Some(high), Some(low)) = (digit(digits[0]), digit(digits[1])) else {
            return Err(wrong("heal: a replica is hexadecimal".into()));
        };
        *byte = (high << 4 | low) as u8;
    }
    Ok(BlockIndex(block))
}

struct Client {
    stream: UnixStream,
    received: Vec<u8>,
}

impl Client {
    /// Whether that could be said.
    fn say(&self, what: &Value) -> bool {
        (&self.stream).write_all(&line(what)).is_ok()
    }

    /// The next line; `None` where the client has gone. It is to say something for as long as `open`.
    fn next_line(&mut self, open: &AtomicBool) -> Outcome<Option<Vec<u8>>> {
        let begun = Instant::now();
        loop {
            if !open.load(Ordering::SeqCst) {
                return Err(Failure::new(Exit::Busy, "the device is being stopped or handed over: try again"));
            }
            if let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
                return Ok(Some(self.received.drain(..=end).collect()));
            }
            if self.received.len() > MOST_BYTES {
                return Err(Failure::new(Exit::Arguments, format_args!("a request has at most {MOST_BYTES} bytes")));
            }
            if begun.elapsed() > PATIENCE {
                return Err(Failure::new(Exit::Busy, format_args!("no replica within {} s", PATIENCE.as_secs())));
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
