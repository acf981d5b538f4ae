//! An anchor that is a counter: a trusted number that only grows. The bodies lie on the disk, in two slots, and the number says
//! which one counts.
//!
//! ```text
//!   a body of generation C + 1, durable in the slot that does not hold C ─> increment, from C to C + 1
//! ```
//!
//! Each counter has an *era*, drawn when it was made. Another one may count to where an older one has been, and the bodies of that time
//! are for another era.
//!
//! Cut short in between, the body is *prepared*: it speaks for the volume, and is counted before another one is prepared.

use super::{Anchor, AnchorBytes, Beginning, Held, Replaced, SLOT_BYTES, Slot, era, generation};
use crate::{Buf, ByteOffset, Device, DeviceError, Durability, Storage};
use std::{
    cell::Cell,
    future::{Future, ready},
};

/// Where they lie on the metadata device, side by side.
const SLOTS: [ByteOffset; 2] = [ByteOffset(256 << 10), ByteOffset(260 << 10)];
/// How often an increment is asked for whose fate is not known, in one go.
const TRIES: usize = 3;

/// A trusted number of each volume that only grows, by its UUID. Each call ends, as with an [`Anchor`].
pub trait Counter {
    /// Its value, if there is one. The error: why it can't be had now.
    fn read(&self, volume: &[u8; 16]) -> impl Future<Output = Result<Option<u64>, String>>;

    /// Has it be one more than `expected`, or leaves it as it is. Never is another value incremented, however late the request
    /// arrives.
    fn increment(&self, volume: &[u8; 16], expected: u64) -> impl Future<Output = Replaced>;

    /// Drawn when the one that is there was made, and never another one's; 0 where that is not known. The error: as of
    /// [`read`](Self::read).
    fn era(&self, _volume: &[u8; 16]) -> impl Future<Output = Result<u64, String>> {
        ready(Ok(0))
    }

    /// Makes one, whose value is above all that the volume's counters have had there. The error: it may be there, or not.
    fn init(&self, volume: &[u8; 16]) -> impl Future<Output = Result<u64, String>>;
}

/// Room for the bodies on the metadata device. It writes nowhere else.
pub struct BodyRoom<S> {
    io: S,
    /// Whether a write or a sync has failed: what is read may be in memory alone then.
    doubtful: Cell<bool>,
    /// Memory for a slot, taken beforehand.
    buf: Cell<Option<Buf>>,
}

/// A counter, and room for the bodies.
pub struct CounterAnchor<'a, C, S> {
    /// The counter.
    pub counter: &'a C,
    /// Where the bodies are.
    pub room: &'a BodyRoom<S>,
}

impl<S: Storage> BodyRoom<S> {
    /// On this metadata device.
    pub fn new(io: S) -> Self {
        Self { io, doubtful: Cell::new(false), buf: Cell::new(Some(Buf::new(SLOT_BYTES))) }
    }

    fn memory(&self) -> Buf {
        self.buf.take().unwrap_or_else(|| Buf::new(SLOT_BYTES))
    }

    /// The body in a slot, if there is a whole one.
    async fn read_slot(&self, slot: usize) -> Result<Option<AnchorBytes>, DeviceError> {
        let at = SLOTS[slot];
        let (read, buf) = self.io.read(Device::Meta, at, self.memory(), 0..SLOT_BYTES).await;
        let body = Slot::parse(&buf[..SLOT_BYTES]).whole();
        self.buf.set(Some(buf));
        read.map(|()| body).map_err(|errno| DeviceError::new("read", Device::Meta, at, SLOT_BYTES, errno))
    }

    /// What is in both. A write that was cut short may leave one that can't be read until it is written.
    async fn slots(&self) -> [Result<Option<AnchorBytes>, DeviceError>; 2] {
        [self.read_slot(0).await, self.read_slot(1).await]
    }

    /// The bodies that are whole.
    async fn read(&self) -> Result<[Option<AnchorBytes>; 2], String> {
        match self.slots().await {
            [Err(e), Err(_)] => Err(e.to_string()),
            slots => Ok(slots.map(|slot| slot.ok().flatten())),
        }
    }

    /// Durable when it has ended.
    async fn write(&self, slot: usize, body: &AnchorBytes) -> Result<(), DeviceError> {
        let (at, mut buf) = (SLOTS[slot], self.memory());
        Slot::fill(&mut buf[..SLOT_BYTES], body);
        let (written, buf) = self.io.write(Device::Meta, at, buf, 0..SLOT_BYTES, Durability::Durable).await;
        self.buf.set(Some(buf));
        self.doubtful.set(written.is_err());
        written.map_err(|errno| DeviceError::new("write", Device::Meta, at, SLOT_BYTES, errno))
    }

    /// This body, which was read from the slot, is durable.
    async fn keep(&self, slot: usize, body: &AnchorBytes) -> Result<(), DeviceError> {
        if self.doubtful.get() {
            // A sync that fails is told once: a later one says nothing.
            return self.write(slot, body).await;
        }
        // Written again it could tear, while an increment that was asked for before is still on its way.
        let synced = self.io.sync(Device::Meta).await;
        self.doubtful.set(synced.is_err());
        synced.map_err(|errno| DeviceError::sync(Device::Meta, errno))
    }
}

/// What a counter of this value and era, and such bodies, say together.
fn held((value, era_of): (u64, u64), bodies: [Option<AnchorBytes>; 2]) -> Held {
    let is_of = |generation_of| bodies.iter().flatten().find(|body| is_for(body, (generation_of, era_of)));
    // The only one that may be prepared is the next.
    if let Some(prepared) = value.checked_add(1).and_then(is_of) {
        return Held::Prepared(*prepared);
    }
    match is_of(value) {
        Some(body) => Held::Body(*body),
        None => {
            let newest = bodies.into_iter().flatten().max_by_key(|body| generation(Some(body)));
            Held::Bare { value, older: newest }
        }
    }
}

fn is_for(body: &AnchorBytes, (generation_of, era_of): (u64, u64)) -> bool {
    generation(Some(body)) == generation_of && era(body) == era_of
}

fn first_behind(value: u64, era: u64) -> Beginning {
    Beginning { expected: value, generation: value.saturating_add(1), era }
}

impl<C: Counter, S: Storage> CounterAnchor<'_, C, S> {
    /// The body is durable: in the slot that does not hold the one that counts.
    async fn prepare(&self, counts: (u64, u64), body: &AnchorBytes) -> Result<(), DeviceError> {
        let slots = self.room.slots().await;
        if let Some(slot) = slots.iter().position(|slot| *slot == Ok(Some(*body))) {
            // It was sent before.
            return self.room.keep(slot, body).await;
        }
        let counts = |slot: &Result<Option<AnchorBytes>, _>| matches!(slot, Ok(Some(body)) if is_for(body, counts));
        // One that can't be read may hold it, too, unless the other does.
        let free = |slot: &&Result<_, _>| slot.is_ok() && !counts(slot);
        let slot = if counts(&slots[0]) || (slots[0].is_err() && slots.iter().any(|slot| free(&slot))) { 1 } else { 0 };
        self.room.write(slot, body).await
    }
}

impl<C: Counter, S: Storage> Anchor for CounterAnchor<'_, C, S> {
    async fn load(&self, volume: &[u8; 16]) -> Result<Held, String> {
        match self.counter.read(volume).await? {
            None => Ok(Held::Nothing),
            Some(mut value) => loop {
                let era = self.counter.era(volume).await?;
                let held = held((value, era), self.room.read().await?);
                // Somebody who counts on meanwhile writes over what was just asked for.
                let is_bare = matches!(held, Held::Bare { .. });
                match if is_bare { self.counter.read(volume).await? } else { Some(value) } {
                    Some(now) if now == value => return Ok(held),
                    Some(now) => value = now,
                    None => return Ok(Held::Nothing),
                }
            },
        }
    }

    async fn replace(&self, volume: &[u8; 16], expected: u64, body: &AnchorBytes) -> Replaced {
        match self.counter.read(volume).await {
            Ok(Some(value)) if value == expected => {}
            Ok(_) => return Replaced::Conflict,
            Err(why) => return Replaced::Unknown(why),
        }
        let counted = match self.counter.era(volume).await {
            Ok(era) => (expected, era),
            Err(why) => return Replaced::Unknown(why),
        };
        if expected == u64::MAX || !is_for(body, (expected + 1, counted.1)) {
            return Replaced::Conflict;
        }
        match self.prepare(counted, body).await {
            Ok(()) => self.counter.increment(volume, expected).await,
            Err(e) => Replaced::Failed(e),
        }
    }

    fn is_counter(&self) -> bool {
        true
    }

    async fn era(&self, volume: &[u8; 16]) -> Result<u64, String> {
        self.counter.era(volume).await
    }

    async fn forward(&self, volume: &[u8; 16], generation: u64) -> Replaced {
        let era = match self.counter.era(volume).await {
            Ok(era) => era,
            Err(why) => return Replaced::Unknown(why),
        };
        let slots = self.room.slots().await;
        let prepared = slots.into_iter().enumerate().find_map(|(slot, body)| {
            let body = body.ok().flatten()?;
            is_for(&body, (generation, era)).then_some((slot, body))
        });
        // It was read, which does not make it durable.
        let Some((slot, body)) = prepared else { return Replaced::Unknown("it is not on the disk any more".into()) };
        match self.room.keep(slot, &body).await {
            Ok(()) => self.counter.increment(volume, generation.saturating_sub(1)).await,
            Err(e) => Replaced::Failed(e),
        }
    }

    /// Bodies may have been prepared for the next value, and be kept by who has the disk. So the first is for the one behind
    /// that, for which nobody can have prepared any.
    async fn begin(&self, volume: &[u8; 16], held: &Held, _above: u64) -> Result<Beginning, String> {
        let value = match held {
            Held::Nothing => self.counter.init(volume).await?,
            held => held.counted(),
        };
        let (behind, era) = (value.saturating_add(1), self.counter.era(volume).await?);
        let (mut last, mut is_again) = (String::new(), false);
        for _ in 0..TRIES {
            match self.counter.increment(volume, value).await {
                Replaced::Done => return Ok(first_behind(behind, era)),
                Replaced::Conflict => {}
                Replaced::Unknown(why) => (last, is_again) = (why, true),
                Replaced::Failed(e) => return Err(e.to_string()),
            }
            match self.counter.read(volume).await? {
                Some(now) if now == value => {}
                // Where nothing of ours can be under way it was somebody else, who prepares bodies for what comes now.
                Some(now) if now == behind && is_again => return Ok(first_behind(behind, era)),
                Some(_) => {
                    return Err("somebody else increments the counter: nobody else may have the volume open".into());
                }
                None => return Err("the counter is gone".into()),
            }
        }
        Err(last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Errno, Geometry, anchor::ANCHOR_BODY_BYTES};
    use std::{
        future::{Ready, ready},
        ops::Range,
        time::Duration,
    };

    fn body(generation: u64) -> AnchorBytes {
        let mut body = [generation as u8; ANCHOR_BODY_BYTES];
        body[32..40].copy_from_slice(&generation.to_le_bytes());
        body[336..344].fill(0);
        body
    }

    /// For the counter of this era.
    fn of_era(era: u64, mut body: AnchorBytes) -> AnchorBytes {
        body[336..344].copy_from_slice(&era.to_le_bytes());
        body
    }

    #[test]
    fn the_counter_says_which_body_counts() {
        let of = |value, a: u64, b: u64| held((value, 0), [Some(body(a)), Some(body(b))]);
        assert_eq!(of(7, 6, 7), Held::Body(body(7)));
        assert_eq!(of(7, 8, 7), Held::Prepared(body(8)));
        assert_eq!(of(7, 8, 3), Held::Prepared(body(8)));
        assert_eq!(of(7, 6, 5), Held::Bare { value: 7, older: Some(body(6)) });
        assert_eq!(of(7, 9, 5), Held::Bare { value: 7, older: Some(body(9)) }, "nobody prepares more than the next");
        assert_eq!(held((7, 0), [None, None]), Held::Bare { value: 7, older: None });
        assert_eq!(held((u64::MAX, 0), [None, Some(body(0))]), Held::Bare { value: u64::MAX, older: Some(body(0)) });
        assert_eq!([of(7, 6, 7), of(7, 8, 7), of(7, 1, 2)].map(|held| held.counted()), [7, 7, 7]);
        // Bodies for another counter that has been there.
        let ours = of_era(5, body(7));
        assert_eq!(held((7, 5), [Some(body(8)), Some(ours)]), Held::Body(ours));
        assert_eq!(held((7, 5), [Some(of_era(4, body(7))), Some(ours)]), Held::Body(ours));
        assert_eq!(held((7, 5), [Some(body(7)), None]), Held::Bare { value: 7, older: Some(body(7)) });
        assert_eq!(held((7, 0), [Some(ours), None]), Held::Bare { value: 7, older: Some(ours) });
    }

    #[test]
    fn a_slot_with_anything_else_in_it_is_no_body() {
        let room = BodyRoom::new(crate::MemoryStorage::new(vec![0; 512 << 10], 512));
        let disk = &room.io;
        disk.run(room.write(1, &body(5))).unwrap();
        assert_eq!(disk.run(room.read()), Ok([None, Some(body(5))]));
        let image = disk.image();
        assert!(image[..SLOTS[1].0 as usize].iter().all(|byte| *byte == 0), "it writes nowhere else");
        assert!(image[SLOTS[1].0 as usize + SLOT_BYTES..].iter().all(|byte| *byte == 0));
        for at in [0, 511, 512, 543, 544, 4095] {
            disk.tamper(|bytes| bytes[SLOTS[1].0 as usize + at] ^= 1);
            assert_eq!(disk.run(room.read()), Ok([None, None]), "byte {at}");
            disk.tamper(|bytes| bytes[SLOTS[1].0 as usize + at] ^= 1);
        }
    }

    /// A disk with a slot that can't be read until it is written, and whose next writes or syncs fail though they are done.
    struct Sick {
        disk: crate::MemoryStorage,
        unreadable: Cell<Option<ByteOffset>>,
        fails: Cell<u32>,
        writes: Cell<u32>,
    }

    impl Sick {
        fn fate(&self) -> Result<(), Errno> {
            let fails = self.fails.get();
            self.fails.set(fails.saturating_sub(1));
            if fails == 0 { Ok(()) } else { Err(Errno::EIO) }
        }
    }

    impl Storage for &Sick {
        type Transfer = Ready<(Result<(), Errno>, Buf)>;
        type Command = Ready<Result<(), Errno>>;

        fn geometry(&self, device: Device) -> Geometry {
            self.disk.geometry(device)
        }
        fn read(&self, device: Device, at: ByteOffset, buf: Buf, part: Range<usize>) -> Self::Transfer {
            match self.unreadable.get() {
                Some(bad) if bad == at => ready((Err(Errno::EIO), buf)),
                _ => self.disk.read(device, at, buf, part),
            }
        }
        fn write(
            &self,
            device: Device,
            at: ByteOffset,
            buf: Buf,
            part: Range<usize>,
            how: Durability,
        ) -> Self::Transfer {
            self.writes.set(self.writes.get() + 1);
            self.unreadable.set(self.unreadable.get().filter(|bad| *bad != at));
            let (done, buf) = self.disk.write(device, at, buf, part, how).into_inner();
            ready((done.and_then(|()| self.fate()), buf))
        }
        fn sync(&self, _: Device) -> Self::Command {
            ready(self.fate())
        }
        fn discard(&self, device: Device, at: ByteOffset, bytes: u64) -> Self::Command {
            self.disk.discard(device, at, bytes)
        }
        fn sleep(&self, time: Duration) -> Self::Command {
            self.disk.sleep(time)
        }
    }

    /// Counts, unless somebody else was faster.
    struct Number(Cell<u64>, Cell<bool>);

    impl Counter for Number {
        async fn read(&self, _: &[u8; 16]) -> Result<Option<u64>, String> {
            Ok(Some(self.0.get()))
        }
        async fn increment(&self, _: &[u8; 16], expected: u64) -> Replaced {
            let is_passed = self.1.take();
            self.0.set(self.0.get() + u64::from(is_passed));
            let fits = self.0.get() == expected;
            self.0.set(self.0.get() + u64::from(fits));
            if fits { Replaced::Done } else { Replaced::Conflict }
        }
        async fn init(&self, _: &[u8; 16]) -> Result<u64, String> {
            Err("it is there".into())
        }
    }

    #[test]
    fn a_slot_that_cant_be_read_is_written_and_a_write_that_failed_is_made_again() {
        let disk = crate::MemoryStorage::new(vec![0; 512 << 10], 512);
        let sick = Sick { disk, unreadable: Cell::new(None), fails: Cell::new(0), writes: Cell::new(0) };
        let (room, number) = (BodyRoom::new(&sick), Number(Cell::new(6), Cell::new(false)));
        let anchor = CounterAnchor { counter: &number, room: &room };
        let run = |expected, of| sick.disk.run(anchor.replace(&[0; 16], expected, &body(of)));
        assert_eq!(run(6, 7), Replaced::Done);
        sick.unreadable.set(Some(SLOTS[1]));
        assert_eq!(sick.disk.run(anchor.load(&[0; 16])), Ok(Held::Body(body(7))));
        assert_eq!(run(7, 8), Replaced::Done);
        assert_eq!(sick.disk.run(room.read()), Ok([Some(body(7)), Some(body(8))]));
        // The one that can't be read does not count, but might.
        sick.unreadable.set(Some(SLOTS[1]));
        assert!(matches!(sick.disk.run(anchor.load(&[0; 16])), Ok(Held::Bare { value: 8, .. })));
        assert_eq!(run(8, 9), Replaced::Done);
        sick.unreadable.set(None);
        assert_eq!(sick.disk.run(room.read()), Ok([Some(body(9)), Some(body(8))]));
        // Done, and the disk says that it failed: that is all it will say.
        sick.fails.set(1);
        assert!(matches!(run(9, 10), Replaced::Failed(_)) && number.0.get() == 9);
        let before = sick.writes.get();
        assert_eq!(run(9, 10), Replaced::Done);
        assert_eq!(sick.writes.get(), before + 1, "what was read back was believed");
        assert_eq!(sick.disk.run(anchor.load(&[0; 16])), Ok(Held::Body(body(10))));
    }

    #[test]
    fn a_beginning_beside_somebody_who_counts_is_none() {
        let disk = crate::MemoryStorage::new(vec![0; 512 << 10], 512);
        let (room, number) = (BodyRoom::new(disk), Number(Cell::new(6), Cell::new(true)));
        let anchor = CounterAnchor { counter: &number, room: &room };
        let held = Held::Bare { value: 6, older: None };
        assert!(room.io.run(anchor.begin(&[0; 16], &held, 0)).unwrap_err().contains("somebody else"));
        let held = Held::Bare { value: 7, older: None };
        assert_eq!(room.io.run(anchor.begin(&[0; 16], &held, 0)), Ok(first_behind(8, 0)));
    }
}
