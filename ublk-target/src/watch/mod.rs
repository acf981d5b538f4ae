//! Who watches the devices: from their daemons' answers to a word of health, and to metrics.
//!
//! ```text
//!   survey (state files, control sockets) ─> health ─┬─> `status`: lines, a word, an exit code
//!                                                    ├─> table: `top`
//!                                                    └─> metrics ─> exposition ─> http | a file | standard output
//! ```
//!
//! None of it runs in a daemon. A daemon never opens a socket of the network.

mod exposition;
pub mod health;
pub mod http;
mod metrics;
pub mod survey;
pub mod table;

pub use exposition::Dialect;

/// The metrics of all devices, as they are now.
pub fn exposition(dialect: Dialect) -> String {
    exposition::text(&metrics::of(&survey::all()), dialect)
}
