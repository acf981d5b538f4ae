//! The fuzz targets of `tests/fuzz/targets.rs`, for libFuzzer. `scripts/fuzz` builds and runs them.

// What only the tests need of what they share with the targets.
#![allow(dead_code)]

#[path = "../../tests/golden.rs"]
mod golden;
#[path = "../../tests/sim/mod.rs"]
mod sim;
#[path = "../../tests/fuzz/targets.rs"]
mod targets;

pub use targets::Target;
