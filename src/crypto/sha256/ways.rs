//! Which of its ways to SHA-256 a processor takes: by what was measured, else by its instructions.
//!
//! Which way is the fastest does not follow from the instructions. Sixteen lanes of AVX-512 are
//! half again as fast as the SHA instructions on one maker's processors, and no faster on
//! another's. The library has no clock, so who has one measures ([`Way::digest`]) and says what it
//! found ([`choose`]).

use super::Engine;
use crate::crypto::lanes::{Groups, MAX_LANES};
use std::{sync::OnceLock, time::Duration};

/// The choice of this process. It changes no digest, only the time that they take.
static CHOSEN: OnceLock<Ways> = OnceLock::new();
/// What its instructions suggest, until then.
static SUGGESTED: OnceLock<Ways> = OnceLock::new();

/// One way of this processor to SHA-256.
#[derive(Clone, Copy, Debug)]
pub struct Way(Engine);

impl Way {
    /// All that this processor has.
    pub fn all() -> Vec<Self> {
        Engine::all().into_iter().map(Self).collect()
    }
    /// Its name, for people.
    pub fn name(self) -> &'static str {
        self.0.name()
    }
    /// How many messages it hashes side by side.
    pub fn lanes(self) -> usize {
        self.0.lanes()
    }
    /// The SHA-256 of each message, to be timed: one message, or as many as it has lanes.
    ///
    /// # Panics
    /// Where it is another number, or the messages are not all of one length, a multiple of 64 bytes.
    pub fn digest(self, messages: &[&[u8]]) -> Vec<[u8; 32]> {
        fn digests<const N: usize>(engine: Engine, messages: &[&[u8]]) -> Vec<[u8; 32]> {
            engine.digests::<N>(messages.try_into().expect("so many")).into()
        }
        assert!([1, self.lanes()].contains(&messages.len()), "one message, or one a lane");
        match messages.len() {
            1 => digests::<1>(self.0, messages),
            2 => digests::<2>(self.0, messages),
            8 => digests::<8>(self.0, messages),
            _ => digests::<MAX_LANES>(self.0, messages),
        }
    }
    /// All work by this one.
    pub(crate) fn alone(self) -> Ways {
        Ways { few: self.0, many: self.0, least: 2 }
    }
}

/// How long a [`Way`] took.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Which.
    pub way: Way,
    /// For one message.
    pub one: Duration,
    /// For one message a lane, together.
    pub group: Duration,
}

/// Takes the ways that these timings, of messages of one length, show to be the fastest, for all
/// tags and digests of this process. The first choice stays. Returns the way for single messages
/// and that for many. Without a timing nothing is chosen.
pub fn choose(timings: &[Timing]) -> Option<(Way, Way)> {
    let costs: Vec<_> = timings.iter().map(|t| Cost { lanes: t.way.lanes(), one: t.one, group: t.group }).collect();
    let Fastest { few, many, least } = fastest(&costs)?;
    let ways = CHOSEN.get_or_init(|| Ways { few: timings[few].way.0, many: timings[many].way.0, least });
    Some((Way(ways.few), Way(ways.many)))
}

/// A way for few messages and one for many, which may be the same.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ways {
    few: Engine,
    many: Engine,
    /// So many messages are worth a group of `many`.
    least: usize,
}

impl Ways {
    /// What was chosen for this process; what its instructions suggest before that.
    pub(crate) fn here() -> Self {
        *CHOSEN.get().unwrap_or_else(|| SUGGESTED.get_or_init(Self::by_instructions))
    }

    fn by_instructions() -> Self {
        let all = Engine::all();
        #[cfg(target_arch = "x86_64")]
        if let Some(sha) = all.iter().find(|engine| matches!(engine, Engine::ShaNi(_))) {
            return Way(*sha).alone();
        }
        let many = *all.last().expect("the portable one");
        // Lanes without a message cost as much as those with one: less than a third full they are
        // not worth it.
        Self { few: Engine::Portable, many, least: many.lanes().div_ceil(3).max(2) }
    }

    pub(crate) fn groups(self) -> Groups {
        Groups { few: self.few.lanes(), many: self.many.lanes(), least: self.least }
    }

    /// What hashes groups of so many messages.
    pub(crate) fn of(self, messages: usize) -> Engine {
        if messages > 1 && messages == self.many.lanes() { self.many } else { self.few }
    }

    /// The name of what hashes so many messages at once, or most of them.
    pub(crate) fn name(self, messages: usize) -> &'static str {
        if messages >= self.least { self.many.name() } else { self.few.name() }
    }
}

/// What a way costs.
#[derive(Clone, Copy)]
struct Cost {
    lanes: usize,
    one: Duration,
    group: Duration,
}

impl Cost {
    /// Of so many messages, by this way alone.
    fn of(self, messages: usize) -> Duration {
        let rest = match messages % self.lanes {
            0 => Duration::ZERO,
            1 => self.one,
            _ => self.group,
        };
        self.group * (messages / self.lanes) as u32 + rest
    }
}

#[derive(Debug, PartialEq)]
struct Fastest {
    few: usize,
    many: usize,
    least: usize,
}

/// So many percent faster must a way be, to have requests wait until there are many messages.
const WORTH_PERCENT: u32 = 5;

fn fastest(costs: &[Cost]) -> Option<Fastest> {
    let by = |price: &dyn Fn(Cost) -> Duration| (0..costs.len()).min_by_key(|i| price(costs[*i]));
    // What falls short of a large group comes in ones and twos. A way of many lanes hashes those as
    // the crate does: it gains nothing there, and must not be taken for a nanosecond of noise.
    let narrow = (0..costs.len()).filter(|i| costs[*i].lanes <= 2);
    let few = narrow.min_by_key(|i| costs[*i].of(1) + costs[*i].of(2))?;
    let each = |cost: Cost| cost.of(MAX_LANES);
    let many = by(&each)?;
    let many = if each(costs[many]) * (100 + WORTH_PERCENT) < each(costs[few]) * 100 { many } else { few };
    let (short, long) = (costs[few], costs[many]);
    let least = (2..long.lanes).find(|n| long.group < short.of(*n)).unwrap_or(long.lanes.max(2));
    Some(Fastest { few, many, least })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn costs<const N: usize>(costs: [(usize, u64, u64); N]) -> [Cost; N] {
        costs.map(|(lanes, one, group)| Cost {
            lanes,
            one: Duration::from_nanos(one),
            group: Duration::from_nanos(group),
        })
    }

    /// Nanoseconds for 4 KiB: the crate, two SHA streams, eight lanes, sixteen lanes.
    #[test]
    fn a_slower_way_is_never_chosen() {
        // SHA instructions as fast as sixteen lanes: nobody waits for sixteen.
        let amd = costs([(1, 2544, 2544), (2, 2500, 2360), (8, 2544, 14_000), (16, 2544, 18_900)]);
        assert_eq!(fastest(&amd), Some(Fastest { few: 1, many: 1, least: 2 }));
        // Sixteen lanes much faster, as soon as they are more than half full.
        let intel = costs([(1, 2840, 2840), (2, 2840, 4730), (8, 2840, 20_000), (16, 2840, 24_300)]);
        assert_eq!(fastest(&intel), Some(Fastest { few: 1, many: 3, least: 11 }));
        // Without SHA instructions: the crate for one or two, eight lanes for more.
        let old = costs([(1, 10_000, 10_000), (8, 10_000, 22_000)]);
        assert_eq!(fastest(&old), Some(Fastest { few: 0, many: 1, least: 3 }));
        let noise = costs([(1, 10_000, 10_001), (8, 9_999, 22_000)]);
        assert_eq!(fastest(&noise), Some(Fastest { few: 0, many: 1, least: 3 }));
        // Instructions that are there and slow, as in an emulator.
        let emulated = costs([(1, 40_000, 40_000), (2, 60_000, 110_000), (8, 40_000, 400_000)]);
        assert_eq!(fastest(&emulated), Some(Fastest { few: 0, many: 0, least: 2 }));
        assert_eq!(fastest(&[]), None);
    }

    #[test]
    fn whatever_the_way_the_digest_is_the_same() {
        let message = vec![0x5a; 4096];
        let expected = Engine::Portable.digests([&message[..]]);
        for way in Way::all() {
            for count in [1, way.lanes()] {
                assert_eq!(way.digest(&vec![&message[..]; count]), vec![expected[0]; count], "{way:?}");
            }
        }
    }

    #[test]
    fn sha_instructions_come_before_wide_lanes_where_nobody_has_measured() {
        let Groups { few, many, least } = Ways::by_instructions().groups();
        assert!([(1, 1, 2), (2, 2, 2), (1, 8, 3), (1, 16, 6)].contains(&(few, many, least)));
    }
}
