//! What an agent implements: one of two shapes.

use crate::{Body, Secret, Text, Uuid};

/// The volume that a request is about.
#[derive(Debug)]
pub struct Volume {
    /// Its name.
    pub uuid: Uuid,
    /// What the client has said with `auth` on this connection.
    pub secret: Option<Secret>,
}

/// Why a request was not answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Failure {
    /// It could not be done now. A change may have happened, or happen yet.
    Away(Text),
    /// Nothing was changed, and the same request will be refused again.
    Refused(Text),
}

/// What became of a store's [`Store::replace`], or of its [`Store::init`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Replaced {
    /// It is durable.
    Done,
    /// Something else is there than was expected. Nothing was changed.
    Conflict,
    /// No body is there. Nothing was changed.
    Absent,
}

/// What became of an increment, or of [`Counter::init`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Incremented {
    /// It is durable, and the counter has this value.
    Done(u64),
    /// Another value is there than was expected, or a counter where there must be none. Nothing was
    /// changed.
    Conflict,
    /// There is no counter. Nothing was changed.
    Absent,
}

/// What became of the end of a body or a counter. As [`Replaced`].
pub type Retired = Replaced;

/// Keeps a body for each volume.
///
/// A change that was answered is durable. A change is one step: compare and swap, also between
/// several agents of one store.
pub trait Store {
    /// The body and its generation. Never an older one than any that was answered before, by
    /// whichever agent.
    ///
    /// # Errors
    ///
    /// It can't be known now, or never.
    fn load(&mut self, of: &Volume) -> Result<Option<(u64, Body)>, Failure>;

    /// Puts `body` in the place of the one of generation `expected`; its generation is one more.
    ///
    /// # Errors
    ///
    /// The outcome is not known, or nothing was changed.
    fn replace(&mut self, of: &Volume, expected: u64, body: &Body) -> Result<Replaced, Failure>;

    /// Puts a first body where none is.
    ///
    /// # Errors
    ///
    /// As [`Store::replace`].
    fn init(&mut self, of: &Volume, generation: u64, body: &Body) -> Result<Replaced, Failure>;

    /// Removes the body of generation `expected`.
    ///
    /// # Errors
    ///
    /// As [`Store::replace`].
    fn retire(&mut self, of: &Volume, expected: u64) -> Result<Retired, Failure>;
}

/// Keeps a number for each volume that only grows: what a new counter begins with is more than any
/// that a counter of this place has had.
pub trait Counter {
    /// Loads what is needed later, before the first client is heard: what it lies on may wait for this
    /// agent then.
    ///
    /// # Errors
    ///
    /// The place does not answer yet, which people are told.
    fn begin(&mut self) -> Result<(), Failure> {
        Ok(())
    }

    /// Whether it needs `auth` from its clients.
    fn wants_secret(&self) -> bool;

    /// The value.
    ///
    /// # Errors
    ///
    /// It can't be known now, or never.
    fn read(&mut self, of: &Volume) -> Result<Option<u64>, Failure>;

    /// Whether it tells one counter from another that the volume has had here or elsewhere.
    fn has_eras(&self) -> bool {
        false
    }

    /// Drawn when the counter was made, and never another; 0 of one that was made without.
    ///
    /// # Errors
    ///
    /// As [`Counter::read`].
    fn era(&mut self, of: &Volume) -> Result<Option<u64>, Failure> {
        self.read(of).map(|value| value.map(|_| 0))
    }

    /// Adds one, if the value is `expected`.
    ///
    /// # Errors
    ///
    /// The outcome is not known, or nothing was changed.
    fn increment(&mut self, of: &Volume, expected: u64) -> Result<Incremented, Failure>;

    /// Makes a counter where there is none.
    ///
    /// # Errors
    ///
    /// As [`Counter::increment`].
    fn init(&mut self, of: &Volume) -> Result<Incremented, Failure>;

    /// Removes the counter, if its value is `expected`.
    ///
    /// # Errors
    ///
    /// As [`Counter::increment`].
    fn retire(&mut self, of: &Volume, expected: u64) -> Result<Retired, Failure>;
}

/// One of the two.
pub enum Backend<'b> {
    /// It keeps bodies.
    Store(&'b mut dyn Store),
    /// It keeps numbers.
    Counter(&'b mut dyn Counter),
}
