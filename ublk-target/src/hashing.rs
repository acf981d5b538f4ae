//! The fastest of this processor's ways to SHA-256, measured once: the library has no clock.

use std::{
    hint::black_box,
    sync::OnceLock,
    time::{Duration, Instant},
};
use ublk_integrity::hashing::{self, Timing, Way};

/// What is hashed: a block of the usual size.
const MESSAGE: usize = 4096;
/// Each way is tried so often, in turns; the least counts, for whatever else runs here
/// only makes it longer.
const TRIES: usize = 8;

/// Measures, and has the library take what was found. All later calls only say what was taken: the
/// way for few blocks, and that for many. Takes about two milliseconds.
pub fn choose() -> Option<(Way, Way)> {
    static CHOICE: OnceLock<Option<(Way, Way)>> = OnceLock::new();
    *CHOICE.get_or_init(|| hashing::choose(&timings()))
}

fn timings() -> Vec<Timing> {
    let ways = Way::all();
    if ways.len() < 2 {
        return Vec::new();
    }
    let memory: Vec<u8> =
        (0..MESSAGE * ways.iter().map(|way| way.lanes()).max().unwrap_or(1)).map(|i| i as u8).collect();
    let messages: Vec<&[u8]> = memory.chunks_exact(MESSAGE).collect();
    let mut timings: Vec<_> =
        ways.into_iter().map(|way| Timing { way, one: Duration::MAX, group: Duration::MAX }).collect();
    for _ in 0..TRIES {
        for Timing { way, one, group } in &mut timings {
            *one = (*one).min(time(*way, &messages[..1]));
            *group = (*group).min(time(*way, &messages[..way.lanes()]));
        }
    }
    timings
}

fn time(way: Way, messages: &[&[u8]]) -> Duration {
    let begin = Instant::now();
    black_box(way.digest(black_box(messages)));
    begin.elapsed()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_choice_is_made_in_milliseconds_and_stays() {
        let begin = Instant::now();
        let chosen = choose().map(|(few, many)| (few.name(), many.name()));
        // In an emulator, or beside other tests, it takes longer than it should.
        assert!(begin.elapsed() < Duration::from_secs(1));
        assert_eq!(choose().map(|(few, many)| (few.name(), many.name())), chosen);
    }
}
