//! What ublk-integrity and the agents of its anchors say to each other: lines over a Unix socket.
//! `docs/anchor-protocol.md` defines them; this crate is that document in code, for both sides.
//!
//! ```text
//!  daemon                                              agent
//!  client.rs ── Request ──> line.rs ── socket ──> server.rs ── Request ──> session.rs ──> Store | Counter
//!            <── Answer ───         <──────────             <── Answer ───
//! ```
//!
//! - [`message`]: requests and answers, to and from a line.
//! - [`Client`]: one connection, with a limit of time for each request. It says whether a change
//!   may have happened.
//! - [`Server`]: many connections, one thread, one request at a time.
//! - [`Store`] and [`Counter`]: what an agent implements, one of both.
//! - [`process`]: a process that the device it serves can rely on.
//!
//! All buffers are taken when a client or a server is made; nothing is allocated for a request.
//! There is no thread, and no `unsafe`.

mod backend;
mod client;
mod line;
pub mod message;
mod names;
pub mod process;
mod server;
mod session;
mod text;

pub use backend::{Backend, Counter, Failure, Incremented, Replaced, Retired, Store, Volume};
pub use client::{Client, Error};
pub use line::LINE;
pub use names::{Body, Parse, Secret, Uuid};
pub use server::{CLIENTS, PATIENCE, Server, StartError};
pub use text::Text;

/// The version of the protocol that this crate speaks.
pub const VERSION: u32 = 1;
