//! A store and a counter in memory.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, mpsc},
};
use ublk_anchor_protocol::{Body, Counter, Failure, Incremented, Replaced, Retired, Secret, Store, Text, Uuid, Volume};

#[derive(Default)]
pub(crate) struct Memory(HashMap<Uuid, (u64, Body)>);

impl Store for Memory {
    fn load(&mut self, of: &Volume) -> Result<Option<(u64, Body)>, Failure> {
        Ok(self.0.get(&of.uuid).copied())
    }

    fn replace(&mut self, of: &Volume, expected: u64, body: &Body) -> Result<Replaced, Failure> {
        let Some(kept) = self.0.get_mut(&of.uuid) else { return Ok(Replaced::Absent) };
        if kept.0 != expected {
            return Ok(Replaced::Conflict);
        }
        *kept = (expected + 1, *body);
        Ok(Replaced::Done)
    }

    fn init(&mut self, of: &Volume, generation: u64, body: &Body) -> Result<Replaced, Failure> {
        if self.0.contains_key(&of.uuid) {
            return Ok(Replaced::Conflict);
        }
        self.0.insert(of.uuid, (generation, *body));
        Ok(Replaced::Done)
    }

    fn retire(&mut self, of: &Volume, expected: u64) -> Result<Retired, Failure> {
        match self.0.get(&of.uuid) {
            None => Ok(Replaced::Absent),
            Some((generation, _)) if *generation != expected => Ok(Replaced::Conflict),
            Some(_) => {
                self.0.remove(&of.uuid);
                Ok(Replaced::Done)
            }
        }
    }
}

/// A counter that takes its time where it is told to, and knows one secret.
pub(crate) struct Number {
    pub(crate) value: Arc<Mutex<Option<u64>>>,
    /// Says that an increment has begun, and waits for a word to go on.
    pub(crate) held: Option<(mpsc::Sender<()>, mpsc::Receiver<()>)>,
}

impl Counter for Number {
    fn wants_secret(&self) -> bool {
        true
    }

    fn read(&mut self, of: &Volume) -> Result<Option<u64>, Failure> {
        match &of.secret {
            Some(secret) if *secret == Secret([7; 32]) => Ok(*self.value.lock().unwrap()),
            Some(_) => Err(Failure::Refused(Text::of("a wrong secret"))),
            None => Err(Failure::Refused(Text::of("no secret"))),
        }
    }

    fn increment(&mut self, of: &Volume, expected: u64) -> Result<Incremented, Failure> {
        if let Some((begun, go_on)) = &self.held {
            begun.send(()).unwrap();
            go_on.recv().unwrap();
        }
        match self.read(of)? {
            None => Ok(Incremented::Absent),
            Some(value) if value != expected => Ok(Incremented::Conflict),
            Some(value) => {
                *self.value.lock().unwrap() = Some(value + 1);
                Ok(Incremented::Done(value + 1))
            }
        }
    }

    fn init(&mut self, of: &Volume) -> Result<Incremented, Failure> {
        if self.read(of)?.is_some() {
            return Ok(Incremented::Conflict);
        }
        *self.value.lock().unwrap() = Some(1);
        Ok(Incremented::Done(1))
    }

    fn retire(&mut self, _: &Volume, _: u64) -> Result<Retired, Failure> {
        Err(Failure::Away(Text::of("not today")))
    }
}
