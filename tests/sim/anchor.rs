//! An anchor beside the simulated disks: a store with compare-and-swap, or a counter whose bodies lie on the disk. Answers may not
//! come, and requests may arrive late or twice.

use super::{Rng, SimStorage};
use std::{
    cell::{RefCell, RefMut},
    ops::Range,
    rc::Rc,
    time::Duration,
};
use ublk_integrity::{
    Credential, MasterKey, OpenOptions, Storage, Volume,
    anchor::{
        Anchor, AnchorBytes, AnchorKeeper, AnchorNote, AnchorPurpose, AnchorUse, Beginning, BodyRoom, Counter,
        CounterAnchor, Held as Holding, KeyAreaMark, Replaced, generation,
    },
    key_slots::unlock,
    open::{OpenError, VerifiedVolume},
};

/// What the anchor holds, and how it behaves.
#[derive(Clone)]
pub struct Held {
    pub body: Option<AnchorBytes>,
    /// Of a counter: its value.
    pub value: Option<u64>,
    /// Which counter it is.
    pub era: u64,
    /// What a new counter is above of.
    pub newest: u64,
    /// Requests that are under way: what they expect, and what they would put there; `None`: one more.
    late: Vec<(u64, Option<AnchorBytes>)>,
    /// Does not answer at all.
    pub away: bool,
    /// Of a counter: somebody else increments it right before the next one who does.
    pub is_passed: bool,
    /// Of a store: this body gets there right before the next one.
    pub passed_by: Option<AnchorBytes>,
    /// In percent: answers that don't come.
    pub unreliable: u64,
    rng: Rng,
    /// Requests that have arrived late and were done.
    pub landed: u64,
}

impl Held {
    fn apply(&mut self, expected: u64, body: Option<AnchorBytes>) -> bool {
        match body {
            Some(body) if generation(self.body.as_ref()) == expected => {
                // That is what a store keeps it as, whatever the body says.
                assert!(expected == 0 || generation(Some(&body)) == expected + 1, "{expected} is followed by the next");
                self.body = Some(body);
            }
            None if self.value == Some(expected) => self.value = Some(expected + 1),
            _ => return false,
        }
        true
    }

    /// A request that changes something arrives, or not, or later; and an answer comes, or not.
    fn ask(&mut self, expected: u64, body: Option<AnchorBytes>) -> Replaced {
        let unknown = || Replaced::Unknown("no answer".into());
        if self.away {
            return unknown();
        }
        if body.is_none() && std::mem::take(&mut self.is_passed) {
            self.value = self.value.map(|value| value + 1);
        }
        if let Some(body) = self.passed_by.take() {
            self.body = Some(body);
        }
        let (fate, part) = (self.rng.below(100), self.unreliable);
        if fate < part / 2 {
            // On its way.
            self.late.push((expected, body));
            return unknown();
        }
        let done = self.apply(expected, body);
        if fate < part {
            // And once more.
            self.late.push((expected, body));
            return unknown();
        }
        if done { Replaced::Done } else { Replaced::Conflict }
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

    /// What is under way gets lost.
    pub fn lose_late(&mut self) {
        self.late.clear();
    }

    /// What moves when it is told something.
    pub fn told(&self) -> (Option<AnchorBytes>, Option<u64>) {
        (self.body, self.value)
    }
}

/// What sort of anchor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shape {
    Store,
    Counter,
}

pub fn any_shape(rng: &mut Rng) -> Shape {
    if rng.chance(50) { Shape::Counter } else { Shape::Store }
}

/// Where the bodies of a counter lie on the metadata device.
pub const BODIES: [Range<u64>; 2] = [256 << 10..260 << 10, 260 << 10..264 << 10];

/// A way to the anchor; clones share it.
#[derive(Clone)]
pub struct SimAnchor {
    io: SimStorage,
    shape: Shape,
    held: Rc<RefCell<Held>>,
}

impl SimAnchor {
    pub fn new(io: &SimStorage, seed: u64) -> Self {
        Self::of(Shape::Store, io, seed)
    }

    pub fn of(shape: Shape, io: &SimStorage, seed: u64) -> Self {
        let mut rng = Rng::new(seed ^ 0xa2c4);
        let newest = rng.below(300);
        let held = Held {
            body: None,
            value: None,
            era: 0,
            newest,
            late: Vec::new(),
            away: false,
            is_passed: false,
            passed_by: None,
            unreliable: 0,
            rng,
            landed: 0,
        };
        Self { io: io.clone(), shape, held: Rc::new(RefCell::new(held)) }
    }

    /// The same anchor from another host.
    pub fn at_host(&self, io: &SimStorage) -> Self {
        Self { io: io.clone(), held: Rc::clone(&self.held), ..*self }
    }

    /// Another that holds the same.
    pub fn fork(&self, io: &SimStorage) -> Self {
        Self { io: io.clone(), held: Rc::new(RefCell::new(self.held().clone())), ..*self }
    }

    pub fn held(&self) -> RefMut<'_, Held> {
        self.held.borrow_mut()
    }

    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Asking takes a while: a crash may come in it, and what was sent before.
    async fn pause(&self) {
        let _ = self.io.sleep(Duration::from_millis(1)).await;
        let mut held = self.held();
        if !held.late.is_empty() && held.rng.chance(20) {
            held.land();
        }
    }

    fn room(&self) -> BodyRoom<SimStorage> {
        BodyRoom::new(self.io.clone())
    }

    async fn ask(&self, expected: u64, body: Option<AnchorBytes>) -> Replaced {
        self.pause().await;
        let answer = self.held().ask(expected, body);
        if !matches!(answer, Replaced::Unknown(_)) {
            self.pause().await;
        }
        answer
    }
}

impl Counter for SimAnchor {
    async fn read(&self, _: &[u8; 16]) -> Result<Option<u64>, String> {
        self.pause().await;
        let held = self.held();
        if held.away { Err("it does not answer".into()) } else { Ok(held.value) }
    }

    async fn increment(&self, _: &[u8; 16], expected: u64) -> Replaced {
        self.ask(expected, None).await
    }

    async fn era(&self, _: &[u8; 16]) -> Result<u64, String> {
        self.pause().await;
        let held = self.held();
        if held.away { Err("it does not answer".into()) } else { Ok(held.era) }
    }

    async fn init(&self, _: &[u8; 16]) -> Result<u64, String> {
        self.pause().await;
        let mut held = self.held();
        if held.away || held.value.is_some() {
            return Err("it does not answer, or is there".into());
        }
        held.value = Some(held.newest + 1);
        held.era = held.rng.next();
        Ok(held.newest + 1)
    }
}

impl Anchor for SimAnchor {
    async fn load(&self, volume: &[u8; 16]) -> Result<Holding, String> {
        if self.shape == Shape::Counter {
            return CounterAnchor { counter: self, room: &self.room() }.load(volume).await;
        }
        self.pause().await;
        let held = self.held();
        if held.away { Err("it does not answer".into()) } else { Ok(Holding::of(held.body)) }
    }

    async fn replace(&self, volume: &[u8; 16], expected: u64, body: &AnchorBytes) -> Replaced {
        match self.shape {
            Shape::Store => self.ask(expected, Some(*body)).await,
            Shape::Counter => CounterAnchor { counter: self, room: &self.room() }.replace(volume, expected, body).await,
        }
    }

    fn is_counter(&self) -> bool {
        self.shape == Shape::Counter
    }

    async fn era(&self, volume: &[u8; 16]) -> Result<u64, String> {
        match self.shape {
            Shape::Store => Ok(0),
            Shape::Counter => Counter::era(self, volume).await,
        }
    }

    async fn forward(&self, volume: &[u8; 16], generation: u64) -> Replaced {
        match self.shape {
            Shape::Store => Replaced::Done,
            Shape::Counter => CounterAnchor { counter: self, room: &self.room() }.forward(volume, generation).await,
        }
    }

    async fn begin(&self, volume: &[u8; 16], held: &Holding, above: u64) -> Result<Beginning, String> {
        match self.shape {
            Shape::Store => Ok(held.beginning(above)),
            Shape::Counter => CounterAnchor { counter: self, room: &self.room() }.begin(volume, held, above).await,
        }
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
    open_by(io, (key, None), options, AnchorUse { anchor, purpose, note: note() }).await
}

/// The same of a volume with key slots, by what opens one of them.
pub async fn open_unlocked(
    io: &SimStorage,
    credential: &Credential,
    options: &OpenOptions,
    (anchor, purpose): (&SimAnchor, AnchorPurpose),
) -> Result<(Volume, AnchorKeeper), OpenError> {
    let key = unlock(io, credential).await?;
    open_by(io, (&key, key.area()), options, AnchorUse { anchor, purpose, note: note() }).await
}

async fn open_by(
    io: &SimStorage,
    (key, area): (&MasterKey, Option<KeyAreaMark>),
    options: &OpenOptions,
    with: AnchorUse<'_, SimAnchor>,
) -> Result<(Volume, AnchorKeeper), OpenError> {
    VerifiedVolume::read(io, key, options).await?.unlocked_by(area).open_anchored(io, options, with).await
}
