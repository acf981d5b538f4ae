//! The store. The body of a volume is the value of one key, in text: its generation, a space, and
//! the body in hex, as `load` answers it.

use crate::cluster::Cluster;
use etcd_client::{Compare, CompareOp, KeyValue, Txn, TxnOp};
use std::collections::HashMap;
use ublk_anchor_protocol::{Body, Failure, Replaced, Retired, Store, Text, Uuid, Volume, message::Answer};

/// Volumes whose revision is remembered. More are asked for again.
const REMEMBERED: usize = 256;

pub(crate) struct EtcdStore {
    cluster: Cluster,
    prefix: String,
    /// What was last seen of each volume. Nothing is answered from it: a change compares with it, so
    /// that it takes one request. Where it is out of date, nothing is changed.
    seen: HashMap<Uuid, Seen>,
}

/// A body that was there.
#[derive(Clone, Copy)]
struct Seen {
    generation: u64,
    /// That of the cluster when it was put there. Whatever has happened to the key since has another.
    revision: i64,
}

impl EtcdStore {
    pub(crate) fn new(cluster: Cluster, prefix: String) -> Self {
        Self { cluster, prefix, seen: HashMap::with_capacity(REMEMBERED) }
    }

    fn key(&self, of: &Volume) -> String {
        format!("{}{}", self.prefix, of.uuid)
    }

    fn look(&mut self, of: &Volume) -> Result<Option<(Seen, Body)>, Failure> {
        self.seen.remove(&of.uuid);
        let key = self.key(of);
        let answer = self.cluster.get(&key)?;
        let Some(found) = answer.kvs().first() else { return Ok(None) };
        let (generation, body) = parse(found).ok_or_else(|| {
            Failure::Refused(Text::of(format_args!("the value of {key} is no body: who has written it?")))
        })?;
        let seen = Seen { generation, revision: found.mod_revision() };
        self.remember(of, seen);
        Ok(Some((seen, body)))
    }

    fn remember(&mut self, of: &Volume, seen: Seen) {
        if self.seen.len() >= REMEMBERED {
            self.seen.clear();
        }
        self.seen.insert(of.uuid, seen);
    }

    /// Does `change` where the body of generation `expected` is, in one step.
    fn change(&mut self, of: &Volume, expected: u64, change: TxnOp) -> Result<Changed, Failure> {
        let remembered = self.seen.get(&of.uuid).filter(|_| self.cluster.is_warm());
        let seen = match remembered.copied() {
            Some(seen) if seen.generation == expected => seen,
            _ => match self.look(of)? {
                None => return Ok(Changed::No(Replaced::Absent)),
                Some((seen, _)) if seen.generation != expected => return Ok(Changed::No(Replaced::Conflict)),
                Some((seen, _)) => seen,
            },
        };
        // Whatever becomes of it, that one is not there any more.
        self.seen.remove(&of.uuid);
        let unchanged = Compare::mod_revision(self.key(of), CompareOp::Equal, seen.revision);
        let answer = self.cluster.change(Txn::new().when([unchanged]).and_then([change]))?;
        match answer.header() {
            Some(header) if answer.succeeded() => Ok(Changed::At(header.revision())),
            // It was there a moment ago, or is there anew: what the client knows of it is no more.
            _ => Ok(Changed::No(self.look(of)?.map_or(Replaced::Absent, |_| Replaced::Conflict))),
        }
    }
}

enum Changed {
    /// At this revision of the cluster.
    At(i64),
    No(Replaced),
}

impl Store for EtcdStore {
    fn load(&mut self, of: &Volume) -> Result<Option<(u64, Body)>, Failure> {
        Ok(self.look(of)?.map(|(seen, body)| (seen.generation, body)))
    }

    fn replace(&mut self, of: &Volume, expected: u64, body: &Body) -> Result<Replaced, Failure> {
        let next = expected + 1;
        let put = TxnOp::put(self.key(of), value(next, body), None);
        Ok(match self.change(of, expected, put)? {
            Changed::At(revision) => {
                self.remember(of, Seen { generation: next, revision });
                Replaced::Done
            }
            Changed::No(outcome) => outcome,
        })
    }

    fn init(&mut self, of: &Volume, generation: u64, body: &Body) -> Result<Replaced, Failure> {
        if self.look(of)?.is_some() {
            return Ok(Replaced::Conflict);
        }
        let key = self.key(of);
        let absent = Compare::create_revision(&*key, CompareOp::Equal, 0);
        let put = TxnOp::put(key, value(generation, body), None);
        let answer = self.cluster.change(Txn::new().when([absent]).and_then([put]))?;
        Ok(if answer.succeeded() { Replaced::Done } else { Replaced::Conflict })
    }

    fn retire(&mut self, of: &Volume, expected: u64) -> Result<Retired, Failure> {
        let delete = TxnOp::delete(self.key(of), None);
        Ok(match self.change(of, expected, delete)? {
            Changed::At(_) => Replaced::Done,
            Changed::No(outcome) => outcome,
        })
    }
}

fn value(generation: u64, body: &Body) -> String {
    format!("{generation} {body}")
}

fn parse(found: &KeyValue) -> Option<(u64, Body)> {
    match Answer::parse(&[b"ok ", found.value()].concat()) {
        Ok(Answer::Body { generation, body }) => Some((generation, body)),
        _ => None,
    }
}
