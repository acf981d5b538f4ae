//! Which seeds a random test draws from: its own, one that has failed, or a range that a soak asks for.

use std::ops::Range;

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// The number in an environment variable, if it is set.
pub fn setting(name: &str) -> Option<u64> {
    variable(name).map(|v| v.parse().unwrap_or_else(|_| panic!("{name} must be a number, not {v}")))
}

/// The seeds in an environment variable, if it is set: `A..B`, or `N` for those below it.
pub fn range(name: &str) -> Option<Range<u64>> {
    variable(name).map(|v| parse(&v).unwrap_or_else(|| panic!("{name} must be a number or A..B, not {v}")))
}

/// Runs each of the seeds, on all processors. One that fails is named, with the `variable` that replays it.
pub fn each(seeds: &Range<u64>, variable: &str, run: fn(u64)) {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let some = |first: u64| {
        for seed in (first..seeds.end).step_by(threads) {
            let ended = std::panic::catch_unwind(|| run(seed));
            assert!(ended.is_ok(), "seed {seed}: run again with {variable}={seed}");
        }
    };
    std::thread::scope(|s| {
        let some = &some;
        let all: Vec<_> = (seeds.start..).take(threads).map(|first| s.spawn(move || some(first))).collect();
        all.into_iter().for_each(|one| one.join().expect("a seed failed, see above"));
    });
}

fn parse(text: &str) -> Option<Range<u64>> {
    let (first, end) = text.split_once("..").unwrap_or(("0", text));
    let seeds = first.parse().ok()?..end.parse().ok()?;
    (!seeds.is_empty()).then_some(seeds)
}

#[test]
fn ranges() {
    assert_eq!(parse("400"), Some(0..400));
    assert_eq!(parse("7..9"), Some(7..9));
    for text in ["", "0", "..", "9..7", "7..7", "7..x", "-1"] {
        assert_eq!(parse(text), None, "{text}");
    }
}
