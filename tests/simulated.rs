//! The library's tests on the simulator: one program, so that the simulator is compiled once.

mod adversary;
mod anchored;
mod away;
mod counted;
mod crash;
mod failures;
mod foreign;
mod fuzz;
mod golden;
mod growing;
mod key_slots;
mod limits;
mod liveness;
mod model;
mod orders;
mod payload;
mod prefetch;
mod recorded;
mod recovery;
mod refusals;
mod scrub;
mod sick;
mod sim;
mod tamper;
mod torn;
mod version2;
