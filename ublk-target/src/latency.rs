//! How long requests take: from the histograms that a queue thread counts in to percentiles and JSON.
//!
//! The buckets are four to a factor of two, so what is said of a request is a fifth off at most. Their
//! bounds are whole microseconds: 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20 and so on.

use crate::sync::{AtomicU64, Ordering};
use serde_json::{Value, json};
use std::time::Duration;

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    Read,
    Write,
    Flush,
}

impl Op {
    /// All of them, in their order.
    pub const ALL: [Self; 3] = [Self::Read, Self::Write, Self::Flush];

    /// Its name for programs.
    pub fn word(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
        }
    }
}

/// log2 of the buckets to a factor of two.
const FINE: u32 = 2;
/// What takes more microseconds than 2 to the power of this, 67 s, is in the last bucket.
const LONGEST: u32 = 26;
/// 4 up to 4 µs, 4 to each factor of two up to [`LONGEST`], and the last.
const BUCKETS: usize = ((LONGEST - FINE + 1) << FINE) as usize + 1;
const LAST: usize = BUCKETS - 1;
const NANOSECONDS: u64 = 1000;

fn bucket_of(nanoseconds: u64) -> usize {
    // A bucket has its upper bound and not its lower one.
    let below = nanoseconds.saturating_sub(1) / NANOSECONDS;
    let magnitude = below.checked_ilog2().unwrap_or(0);
    if magnitude < FINE {
        return below as usize;
    }
    let shift = magnitude - FINE;
    // Its top bits: the first of them is set and says the same as `shift` does.
    let bucket = (u64::from(shift) << FINE) + (below >> shift);
    (bucket as usize).min(LAST)
}

/// The upper bound of a bucket in microseconds; the last has none.
fn bound(bucket: usize) -> Option<u64> {
    let (group, place) = (bucket as u64 >> FINE, bucket as u64 % (1 << FINE));
    match group {
        _ if bucket >= LAST => None,
        0 => Some(place + 1),
        _ => Some(((1 << FINE) + place + 1) << (group - 1)),
    }
}

/// What one thread counts. It alone writes, so it needs no atomic operation that does both.
pub struct Histogram {
    counts: [AtomicU64; BUCKETS],
    nanoseconds: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: [(); BUCKETS].map(|()| AtomicU64::new(0)), nanoseconds: AtomicU64::new(0) }
    }
}

impl Histogram {
    /// Counts a request.
    pub fn add(&self, took: Duration) {
        let took = took.as_nanos() as u64;
        let more = |to: &AtomicU64, by: u64| to.store(to.load(Ordering::Relaxed) + by, Ordering::Relaxed);
        more(&self.counts[bucket_of(took)], 1);
        more(&self.nanoseconds, took);
    }
}

/// How long the requests of one kind took.
#[derive(Clone, PartialEq, Debug)]
pub struct Distribution {
    counts: [u64; BUCKETS],
    seconds: f64,
}

impl Default for Distribution {
    fn default() -> Self {
        Self { counts: [0; BUCKETS], seconds: 0.0 }
    }
}

impl Distribution {
    /// What several threads have counted. One that counts meanwhile may have the last in one of both.
    pub fn of<'h>(all: impl Iterator<Item = &'h Histogram>) -> Self {
        let (mut sum, mut nanoseconds) = (Self::default(), 0);
        for histogram in all {
            let counts = sum.counts.iter_mut().zip(&histogram.counts);
            counts.for_each(|(sum, count)| *sum += count.load(Ordering::Relaxed));
            nanoseconds += histogram.nanoseconds.load(Ordering::Relaxed);
        }
        sum.seconds = nanoseconds as f64 / 1e9;
        sum
    }

    /// Of a status, if its daemon measures.
    pub fn in_status(status: &Value, op: Op) -> Option<Self> {
        let told = &status["latency"][op.word()];
        let mut found = Self { seconds: told["sum_seconds"].as_f64()?, ..Self::default() };
        for bucket in told["buckets"].as_array()? {
            let nanoseconds = bucket[0].as_f64().map_or(u64::MAX, |seconds| (seconds * 1e9).round() as u64);
            found.counts[bucket_of(nanoseconds)] += bucket[1].as_u64()?;
        }
        Some(found)
    }

    /// For a status. Only buckets that have something are told.
    pub fn json(&self) -> Value {
        let seconds = |bucket| bound(bucket).map(|bound| bound as f64 / 1e6);
        let some = self.counts.iter().enumerate().filter(|(_, count)| **count > 0);
        let buckets: Vec<_> = some.map(|(bucket, count)| json!([seconds(bucket), count])).collect();
        let within = |share| self.within(share).map(|took| took.as_secs_f64());
        json!({
            "count": self.count(),
            "sum_seconds": self.seconds,
            "p50_seconds": within(0.5),
            "p90_seconds": within(0.9),
            "p99_seconds": within(0.99),
            "p999_seconds": within(0.999),
            "buckets": buckets,
        })
    }

    /// How many there were.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// How long they took together.
    pub fn seconds(&self) -> f64 {
        self.seconds
    }

    /// How many took so many microseconds at most, which must be a bound.
    pub fn at_most(&self, microseconds: u64) -> u64 {
        self.counts[..=bucket_of(microseconds * NANOSECONDS)].iter().sum()
    }

    /// An estimate of how long the fastest of them took, this share of all: those of a bucket as if
    /// they lay evenly in it. `None` if there were none.
    pub fn within(&self, share: f64) -> Option<Duration> {
        let wanted = (self.count() as f64 * share).max(1.0);
        let mut before = 0;
        for (bucket, &count) in self.counts.iter().enumerate().filter(|(_, count)| **count > 0) {
            if (before + count) as f64 >= wanted {
                let from = bucket.checked_sub(1).and_then(bound).unwrap_or(0) as f64;
                // Of the last nothing is known but where it begins.
                let to = bound(bucket).map_or(from, |to| to as f64);
                let part = (wanted - before as f64) / count as f64;
                return Some(Duration::from_secs_f64((from + (to - from) * part) / 1e6));
            }
            before += count;
        }
        None
    }

    /// Those that came after another look; `None` if that was another daemon's.
    pub fn since(&self, before: &Self) -> Option<Self> {
        let mut more = Self { seconds: (self.seconds - before.seconds).max(0.0), ..Self::default() };
        for (more, (now, before)) in more.counts.iter_mut().zip(self.counts.iter().zip(&before.counts)) {
            *more = now.checked_sub(*before)?;
        }
        Some(more)
    }
}

/// A time in two or three digits.
pub fn rounded(took: Duration) -> String {
    let microseconds = took.as_secs_f64() * 1e6;
    let (number, unit) = match microseconds {
        ..1e3 => (microseconds, "us"),
        ..1e6 => (microseconds / 1e3, "ms"),
        _ => (microseconds / 1e6, "s"),
    };
    let digits = usize::from(number < 9.95);
    format!("{number:.digits$} {unit}")
}

/// The bounds that metrics tell, in microseconds: powers of two from 4 µs to 17 s.
pub fn metric_bounds() -> impl Iterator<Item = u64> {
    (2..=24).map(|power| 1 << power)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(microseconds: impl IntoIterator<Item = u64>) -> Distribution {
        let histogram = Histogram::default();
        microseconds.into_iter().for_each(|one| histogram.add(Duration::from_micros(one)));
        Distribution::of([&histogram].into_iter())
    }

    #[test]
    fn buckets_follow_one_another_and_none_is_wide() {
        let bounds: Vec<_> = (0..LAST).map(|bucket| bound(bucket).unwrap()).collect();
        assert_eq!(bounds[..14], [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24]);
        assert!(bounds.windows(2).skip(3).all(|pair| pair[0] < pair[1] && pair[1] * 4 <= pair[0] * 5));
        assert_eq!((bounds[LAST - 1], bound(LAST)), (1 << LONGEST, None));
        for (bucket, bound) in bounds.iter().enumerate() {
            // It has its upper bound itself.
            assert_eq!([bound * 1000, bound * 1000 + 1].map(bucket_of), [bucket, bucket + 1]);
        }
        assert_eq!([0, 1, u64::MAX].map(bucket_of), [0, 0, LAST]);
        assert!(metric_bounds().all(|power| bounds.contains(&power)));
    }

    #[test]
    fn percentiles_are_estimated() {
        let close = |d: &Distribution, share: f64, wanted: f64| {
            let found = d.within(share).unwrap().as_secs_f64() * 1e6;
            assert!((found / wanted - 1.0).abs() < 0.2, "{share}: {found} for {wanted}");
        };
        let even = of(1..=10_000);
        [(0.5, 5000.0), (0.9, 9000.0), (0.99, 9900.0), (0.999, 9990.0)]
            .into_iter()
            .for_each(|(share, wanted)| close(&even, share, wanted));
        let mut two = vec![80; 98];
        two.extend([4000, 4000]);
        let two = of(two);
        close(&two, 0.5, 80.0);
        close(&two, 0.99, 4000.0);
        assert_eq!(of([]).within(0.5), None);
        assert_eq!(of([200_000_000]).within(0.5), Some(Duration::from_micros(1 << LONGEST)));
        close(&of([7]), 0.001, 7.0);
    }

    #[test]
    fn times_have_few_digits() {
        for (nanoseconds, text) in
            [(900, "0.9 us"), (9_960, "10 us"), (410_000, "410 us"), (1_234_567, "1.2 ms"), (12_000_000_000, "12 s")]
        {
            assert_eq!(rounded(Duration::from_nanos(nanoseconds)), text);
        }
    }

    #[test]
    fn those_of_a_while_are_the_difference() {
        let (before, now) = (of([10, 10, 900]), of([10, 10, 900, 40, 50]));
        let more = now.since(&before).unwrap();
        assert_eq!((more.count(), more.at_most(64), more.at_most(32)), (2, 2, 0));
        assert!((more.seconds() - 90e-6).abs() < 1e-9);
        assert_eq!(before.since(&now), None, "another daemon counts");
    }

    proptest! {
        #[test]
        fn what_is_told_is_understood(all in proptest::collection::vec(0..u64::MAX >> 20, 0..50)) {
            let told = of(all.iter().copied());
            let status = json!({ "latency": { "flush": told.json() } });
            let text: Value = serde_json::from_str(&status.to_string()).unwrap();
            let heard = Distribution::in_status(&text, Op::Flush).unwrap();
            prop_assert!(heard.counts == told.counts && (heard.seconds - told.seconds).abs() <= told.seconds * 1e-12);
            prop_assert_eq!(Distribution::in_status(&text, Op::Read), None);
            prop_assert_eq!(told.count(), all.len() as u64);
            let cumulative: Vec<_> = metric_bounds().map(|bound| told.at_most(bound)).collect();
            let really = metric_bounds().map(|bound| all.iter().filter(|one| **one <= bound).count() as u64);
            prop_assert_eq!(cumulative, really.collect::<Vec<_>>());
        }
    }
}
