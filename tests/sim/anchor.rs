//! An anchor beside the simulated disks: a store with compare-and-swap, whose answers may not come, and whose requests may arrive
//! late or twice.

use super::{Rng, SimStorage};
use std::{
    cell::{RefCell, RefMut},
    rc::Rc,
    time::Duration,
};
use ublk_integrity::{
    MasterKey, OpenOptions, Storage, Volume,
    anchor::{Anchor, AnchorBytes, AnchorKeeper, AnchorNote, AnchorPurpose, AnchorUse, Replaced, generation},
    open::{OpenError, VerifiedVolume},
};

/// What the anchor holds, and how it behaves.
#[derive(Clone)]
pub struct Held {
    pub body: Option<AnchorBytes>,
    /// Requests that are under way: what they expect, and what they would put there.
    late: Vec<(u64, AnchorBytes)>,
    /// Does not answer at all.
    pub away: bool,
    /// In percent: answers that don't come.
    pub unreliable: u64,
    rng: Rng,
    /// Requests that have arrived late and were done.
    pub landed: u64,
}

impl Held {
    fn apply(&mut self, expected: u64, body: AnchorBytes) -> bool {
        let fits = generation(self.body.as_ref()) == expected;
        if fits {
            self.body = Some(body);
        }
        fits
    }

    /// Some of the requests that are under way arrive.
    pub fn land(&mut self) {
        let mut late = std::mem::take(&mut self.late);
        late.retain(|(expected, body)| {
            let arrives = self.rng.chance(50);
            self.landed += u64::from(arrives && self.apply(*expected, *body));
            !arrives
        });
        self.late = late;
    }
}

/// A way to the anchor; clones share it.
#[derive(Clone)]
pub struct SimAnchor {
    io: SimStorage,
    held: Rc<RefCell<Held>>,
}

impl SimAnchor {
    pub fn new(io: &SimStorage, seed: u64) -> Self {
        let rng = Rng::new(seed ^ 0xa2c4);
        let held = Held { body: None, late: Vec::new(), away: false, unreliable: 0, rng, landed: 0 };
        Self { io: io.clone(), held: Rc::new(RefCell::new(held)) }
    }

    /// The same anchor from another host.
    pub fn at_host(&self, io: &SimStorage) -> Self {
        Self { io: io.clone(), held: Rc::clone(&self.held) }
    }

    /// Another that holds the same.
    pub fn fork(&self, io: &SimStorage) -> Self {
        Self { io: io.clone(), held: Rc::new(RefCell::new(self.held().clone())) }
    }

    pub fn held(&self) -> RefMut<'_, Held> {
        self.held.borrow_mut()
    }

    /// Asking takes a while: a crash may come in it.
    async fn pause(&self) {
        let _ = self.io.sleep(Duration::from_millis(1)).await;
    }
}

impl Anchor for SimAnchor {
    async fn load(&self, _: &[u8; 16]) -> Result<Option<AnchorBytes>, String> {
        self.pause().await;
        let held = self.held();
        if held.away { Err("it does not answer".into()) } else { Ok(held.body) }
    }

    async fn replace(&self, _: &[u8; 16], expected: u64, body: &AnchorBytes) -> Replaced {
        self.pause().await;
        let unknown = || Replaced::Unknown("no answer".into());
        let answer = {
            let mut held = self.held();
            if held.away {
                return unknown();
            }
            let (fate, part) = (held.rng.below(100), held.unreliable);
            if fate < part / 2 {
                // On its way.
                held.late.push((expected, *body));
                return unknown();
            }
            let done = held.apply(expected, *body);
            if fate < part {
                // And once more.
                held.late.push((expected, *body));
                return unknown();
            }
            if done { Replaced::Done } else { Replaced::Conflict }
        };
        self.pause().await;
        answer
    }
}

pub fn note() -> AnchorNote {
    AnchorNote { seconds: 1_700_000_000, host: "alpha".into() }
}

/// Opens a volume with its anchor.
pub async fn open_anchored(
    io: &SimStorage,
    key: &MasterKey,
    options: &OpenOptions,
    (anchor, purpose): (&SimAnchor, AnchorPurpose),
) -> Result<(Volume, AnchorKeeper), OpenError> {
    let verified = VerifiedVolume::read(io, key, options).await?;
    verified.open_anchored(io, options, AnchorUse { anchor, purpose, note: note() }).await
}
