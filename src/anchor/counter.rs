//! An anchor that is a counter: a trusted number that only grows. The bodies lie on the disk, in two slots, and the number says
//! which one counts.
//!
//! ```text
//!   a body of generation C + 1, durable in the slot that does not hold C ─> increment, from C to C + 1
//! ```
//!
//! Cut short in between, the body is *prepared*: it speaks for the volume, and is counted before another one is prepared.

use super::{Anchor, AnchorBytes, Beginning, Held, Replaced, checksum, generation};
use crate::{Buf, ByteOffset, Device, DeviceError, Durability, Storage, format::ANCHOR_BODY_BYTES};
use std::{cell::Cell, future::Future};

/// Bytes of a slot.
const SLOT: usize = 4096;
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

    /// Makes one, whose value is above all that the volume's counters have had there. The error: it may be there, or not.
    fn init(&self, volume: &[u8; 16]) -> impl Future<Output = Result<u64, String>>;
}

/// Room for the bodies on the metadata device. It writes nowhere else.
pub struct BodyRoom<S> {
    io: S,
    /// Memory for both slots, taken beforehand.
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
        Self { io, buf: Cell::new(Some(Buf::new(2 * SLOT))) }
    }

    /// The bodies that are whole.
    async fn read(&self) -> Result<[Option<AnchorBytes>; 2], String> {
        let buf = self.buf.take().unwrap_or_else(|| Buf::new(2 * SLOT));
        let (read, buf) = self.io.read(Device::Meta, SLOTS[0], buf, 0..2 * SLOT).await;
        let bodies = [&buf[..SLOT], &buf[SLOT..]].map(parse);
        self.buf.set(Some(buf));
        read.map_err(|errno| DeviceError::new("read", Device::Meta, SLOTS[0], 2 * SLOT, errno).to_string())?;
        Ok(bodies)
    }

    /// Durable when it has ended.
    async fn write(&self, slot: usize, body: &AnchorBytes) -> Result<(), String> {
        let (at, mut buf) = (SLOTS[slot], self.buf.take().unwrap_or_else(|| Buf::new(2 * SLOT)));
        buf[..SLOT].fill(0);
        buf[..ANCHOR_BODY_BYTES].copy_from_slice(body);
        buf[ANCHOR_BODY_BYTES..][..32].copy_from_slice(&checksum(body));
        let (written, buf) = self.io.write(Device::Meta, at, buf, 0..SLOT, Durability::Durable).await;
        self.buf.set(Some(buf));
        written.map_err(|errno| DeviceError::new("write", Device::Meta, at, SLOT, errno).to_string())
    }

    /// What was written before, by whomever, is durable.
    async fn sync(&self) -> Result<(), String> {
        self.io.sync(Device::Meta).await.map_err(|errno| DeviceError::sync(Device::Meta, errno).to_string())
    }
}

/// The body in a slot, if it is whole.
fn parse(slot: &[u8]) -> Option<AnchorBytes> {
    let (body, rest) = slot.split_first_chunk()?;
    let is_whole = rest[..32] == checksum(body) && rest[32..].iter().all(|byte| *byte == 0);
    is_whole.then_some(*body)
}

/// What a counter of this value and such bodies say together.
fn held(value: u64, bodies: [Option<AnchorBytes>; 2]) -> Held {
    let is_of = |generation_of: u64| bodies.iter().flatten().find(|body| generation(Some(body)) == generation_of);
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

fn first_behind(value: u64) -> Beginning {
    Beginning { expected: value, generation: value.saturating_add(1) }
}

impl<C: Counter, S: Storage> CounterAnchor<'_, C, S> {
    /// The body is durable: in the slot that does not hold the one that counts.
    async fn prepare(&self, counts: u64, body: &AnchorBytes) -> Result<(), String> {
        let bodies = self.room.read().await?;
        if bodies.contains(&Some(*body)) {
            // It was sent before. Written again it could tear, while the increment of before is still on its way.
            return self.room.sync().await;
        }
        let holds = |slot: usize| bodies[slot].is_some_and(|body| generation(Some(&body)) == counts);
        self.room.write(if holds(0) { 1 } else { 0 }, body).await
    }
}

impl<C: Counter, S: Storage> Anchor for CounterAnchor<'_, C, S> {
    async fn load(&self, volume: &[u8; 16]) -> Result<Held, String> {
        match self.counter.read(volume).await? {
            None => Ok(Held::Nothing),
            Some(value) => Ok(held(value, self.room.read().await?)),
        }
    }

    async fn replace(&self, volume: &[u8; 16], expected: u64, body: &AnchorBytes) -> Replaced {
        match self.counter.read(volume).await {
            Ok(Some(value)) if value == expected => {}
            Ok(_) => return Replaced::Conflict,
            Err(why) => return Replaced::Unknown(why),
        }
        if expected.checked_add(1) != Some(generation(Some(body))) {
            return Replaced::Conflict;
        }
        match self.prepare(expected, body).await {
            Ok(()) => self.counter.increment(volume, expected).await,
            Err(why) => Replaced::Unknown(why),
        }
    }

    fn is_counter(&self) -> bool {
        true
    }

    async fn forward(&self, volume: &[u8; 16], generation: u64) -> Replaced {
        // It was read, which does not make it durable.
        match self.room.sync().await {
            Ok(()) => self.counter.increment(volume, generation.saturating_sub(1)).await,
            Err(why) => Replaced::Unknown(why),
        }
    }

    /// Bodies may have been prepared for the next value, and be kept by who has the disk. So the first is for the one behind
    /// that, for which nobody can have prepared any.
    async fn begin(&self, volume: &[u8; 16], held: &Held, _above: u64) -> Result<Beginning, String> {
        let value = match held {
            Held::Nothing => self.counter.init(volume).await?,
            held => held.counted(),
        };
        let mut last = "somebody else uses it".to_owned();
        for _ in 0..TRIES {
            match self.counter.increment(volume, value).await {
                Replaced::Done => return Ok(first_behind(value.saturating_add(1))),
                Replaced::Conflict => {}
                Replaced::Unknown(why) => last = why,
            }
            match self.counter.read(volume).await? {
                Some(now) if now == value => {}
                Some(now) => return Ok(first_behind(now)),
                None => return Err("the counter is gone".into()),
            }
        }
        Err(last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(generation: u64) -> AnchorBytes {
        let mut body = [generation as u8; ANCHOR_BODY_BYTES];
        body[32..40].copy_from_slice(&generation.to_le_bytes());
        body
    }

    #[test]
    fn the_counter_says_which_body_counts() {
        let of = |value, a: u64, b: u64| held(value, [Some(body(a)), Some(body(b))]);
        assert_eq!(of(7, 6, 7), Held::Body(body(7)));
        assert_eq!(of(7, 8, 7), Held::Prepared(body(8)));
        assert_eq!(of(7, 8, 3), Held::Prepared(body(8)));
        assert_eq!(of(7, 6, 5), Held::Bare { value: 7, older: Some(body(6)) });
        assert_eq!(of(7, 9, 5), Held::Bare { value: 7, older: Some(body(9)) }, "nobody prepares more than the next");
        assert_eq!(held(7, [None, None]), Held::Bare { value: 7, older: None });
        assert_eq!(held(u64::MAX, [None, Some(body(0))]), Held::Bare { value: u64::MAX, older: Some(body(0)) });
        assert_eq!([of(7, 6, 7), of(7, 8, 7), of(7, 1, 2)].map(|held| held.counted()), [7, 7, 7]);
    }

    #[test]
    fn a_slot_with_anything_else_in_it_is_no_body() {
        let room = BodyRoom::new(crate::MemoryStorage::new(vec![0; 512 << 10], 512));
        let disk = &room.io;
        disk.run(room.write(1, &body(5))).unwrap();
        assert_eq!(disk.run(room.read()), Ok([None, Some(body(5))]));
        let image = disk.image();
        assert!(image[..SLOTS[1].0 as usize].iter().all(|byte| *byte == 0), "it writes nowhere else");
        assert!(image[SLOTS[1].0 as usize + SLOT..].iter().all(|byte| *byte == 0));
        for at in [0, 511, 512, 543, 544, 4095] {
            disk.tamper(|bytes| bytes[SLOTS[1].0 as usize + at] ^= 1);
            assert_eq!(disk.run(room.read()), Ok([None, None]), "byte {at}");
            disk.tamper(|bytes| bytes[SLOTS[1].0 as usize + at] ^= 1);
        }
    }
}
