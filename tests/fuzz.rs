//! The fuzz targets without libFuzzer: their corpora, which must lead to each error that changed
//! bytes can lead to, and a short blind mutation of them. `scripts/fuzz` searches by coverage.
//! `FUZZ_SECONDS=60` for longer runs, `FUZZ_SEED` for another start, `FUZZ_INPUT=` and a script in
//! hexadecimal for a single one.

mod targets;

use crate::{golden::tests_folder, sim::Rng};
use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    time::{Duration, Instant},
};
use targets::{READ_ERRORS, REFUSALS, Reached, Target, UNKNOWNS};
use ublk_integrity::hex;

/// Numbers at which fields turn from one meaning to another.
const EDGES: [u64; 12] = [0, 1, 2, 3, 4, 5, 127, 128, 0xffff, u32::MAX as u64, 1 << 63, u64::MAX];
const LONGEST_SCRIPT: usize = 160;

/// The committed scripts, in order of their names.
fn corpus(target: Target) -> Vec<Vec<u8>> {
    let folder = tests_folder("corpus").join(target.name());
    let entries = fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.iter().map(|file| fs::read(file).unwrap()).collect()
}

/// Runs one script; a panic names it.
fn run(target: Target, script: &[u8]) -> Reached {
    let ran = catch_unwind(AssertUnwindSafe(|| target.run(script)));
    ran.unwrap_or_else(|_| panic!("FUZZ_INPUT={} cargo test --test simulated fuzz::{}", hex(script), target.name()))
}

/// One to four changes.
fn mutate(rng: &mut Rng, script: &mut Vec<u8>, other: &[u8]) {
    for _ in 0..=rng.below(3) {
        let at = rng.index(script.len());
        match rng.below(6) {
            0 => script[at] ^= 1 << rng.below(8),
            1 => script[at] = rng.below(256) as u8,
            2 => {
                let edge = EDGES[rng.index(EDGES.len())].to_le_bytes();
                let width = (1 << rng.below(4)).min(script.len() - at);
                script[at..at + width].copy_from_slice(&edge[..width]);
            }
            3 => script.truncate(at.max(2)),
            4 => script.extend_from_slice(other.get(2..).unwrap_or_default()),
            _ => {
                let change = rng.bytes();
                script.extend_from_slice(&change[..5 + rng.index(8)]);
            }
        }
    }
    script.truncate(LONGEST_SCRIPT);
}

/// Runs the corpus, then mutates it until the time is up.
fn fuzz(target: Target) {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    if let Ok(text) = std::env::var("FUZZ_INPUT") {
        let digits: Vec<u8> = text.chars().map(|c| c.to_digit(16).expect("hexadecimal") as u8).collect();
        let script: Vec<u8> =
            digits.chunks(2).map(|pair| pair.iter().fold(0, |byte, digit| byte << 4 | digit)).collect();
        println!("{:?}", target.run(&script));
        return;
    }
    let corpus = corpus(target);
    corpus.iter().for_each(|script| _ = run(target, script));
    let end = Instant::now() + Duration::from_secs(number("FUZZ_SECONDS").unwrap_or(2));
    let mut rng = Rng::new(number("FUZZ_SEED").unwrap_or(1));
    let mut rounds = 0;
    while Instant::now() < end {
        let mut script = corpus[rng.index(corpus.len())].clone();
        script.resize(script.len().max(2), 0);
        let other = &corpus[rng.index(corpus.len())];
        mutate(&mut rng, &mut script, other);
        run(target, &script);
        rounds += 1;
    }
    println!("{}: {rounds} scripts", target.name());
}

#[test]
fn superblock() {
    fuzz(Target::Superblock);
}

#[test]
fn identity() {
    fuzz(Target::Identity);
}

#[test]
fn record() {
    fuzz(Target::Record);
}

#[test]
fn page() {
    fuzz(Target::Page);
}

#[test]
fn recovery() {
    fuzz(Target::Recovery);
}

#[test]
fn the_corpora_lead_to_each_error() {
    let scripts = Target::ALL.into_iter().flat_map(|target| corpus(target).into_iter().map(move |s| (target, s)));
    let reached: Reached = scripts.flat_map(|(target, script)| run(target, &script)).collect();
    let missing: Vec<_> =
        [REFUSALS, UNKNOWNS, READ_ERRORS].concat().into_iter().filter(|e| !reached.contains(e)).collect();
    assert!(missing.is_empty(), "no script leads to {missing:?}");
}
