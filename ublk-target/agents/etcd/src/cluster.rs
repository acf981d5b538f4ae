//! Requests to a member, each with a limit of time. What changes nothing is asked of one member
//! after the other; a change is sent once, to a member that has just answered.

use crate::endpoints::Endpoint;
use etcd_client::{Client, ConnectOptions, Error, GetResponse, KvClient, Txn, TxnResponse};
use std::{error::Error as _, time::Duration};
use tokio::{
    runtime::{Builder, Runtime},
    time::timeout,
};
use ublk_anchor_protocol::{Failure, Text, process::Ended};

/// gRPC's codes for what will not be answered otherwise later.
const REFUSALS: [i32; 3] =
    [3 /* invalid argument */, 7 /* permission denied */, 16 /* unauthenticated */];

/// The members, and a connection to one of them.
pub(crate) struct Cluster {
    runtime: Runtime,
    endpoints: Vec<Endpoint>,
    /// Which one is asked next.
    at: usize,
    /// A connection over which something was answered.
    member: Option<KvClient>,
    timeout: Duration,
    /// The newest revision of the cluster that any answer named.
    revision: i64,
}

impl Cluster {
    pub(crate) fn new(endpoints: Vec<Endpoint>, timeout: Duration) -> Result<Self, Ended> {
        let runtime = Builder::new_current_thread().enable_io().enable_time().build();
        let runtime = runtime.map_err(|e| Ended { why: format!("starting the runtime: {e}"), code: 3 })?;
        Ok(Self { runtime, endpoints, at: 0, member: None, timeout, revision: 0 })
    }

    /// Whether the last request was answered, so that a change can be sent without asking first.
    pub(crate) fn is_warm(&self) -> bool {
        self.member.is_some()
    }

    /// What is there now: a linearizable read, which a member answers only with the cluster's consent.
    pub(crate) fn get(&mut self, key: &str) -> Result<GetResponse, Failure> {
        // Each gets its share of the time.
        let share = self.timeout / u32::try_from(self.endpoints.len()).unwrap_or(u32::MAX);
        let mut last = Failure::Away(Text::of("there is no member"));
        for _ in 0..self.endpoints.len() {
            match self.try_get(key, share) {
                Err(failure @ Failure::Away(_)) => last = failure,
                other => {
                    let answer = other?;
                    self.see(answer.header().map(etcd_client::ResponseHeader::revision))?;
                    return Ok(answer);
                }
            }
        }
        Err(last)
    }

    fn try_get(&mut self, key: &str, limit: Duration) -> Result<GetResponse, Failure> {
        let (endpoint, member) = (&self.endpoints[self.at], self.member.take());
        let answer = self.within(limit, async {
            let mut member = match member {
                Some(member) => member,
                None => connected(endpoint, limit).await?,
            };
            member.get(key, None).await.map(|answer| (answer, member))
        });
        self.answered(answer)
    }

    /// A change. Only where the cluster [is warm](Self::is_warm).
    pub(crate) fn change(&mut self, txn: Txn) -> Result<TxnResponse, Failure> {
        let Some(mut member) = self.member.take() else {
            return Err(Failure::Away(Text::of("no member has answered")));
        };
        let answer = self.within(self.timeout, async { member.txn(txn).await.map(|answer| (answer, member)) });
        let answer = self.answered(answer)?;
        self.see(answer.header().map(etcd_client::ResponseHeader::revision))?;
        Ok(answer)
    }

    /// What a member answers, if it does so in time.
    fn within<T>(
        &self,
        limit: Duration,
        asked: impl Future<Output = Result<T, Error>>,
    ) -> Result<Result<T, Error>, Text> {
        let answer = self.runtime.block_on(async { timeout(limit, asked).await });
        let url = &self.endpoints[self.at].url;
        answer.map_err(|_| Text::of(format_args!("{url} has not answered within {} ms", limit.as_millis())))
    }

    /// Keeps the connection if there was an answer. Else the next request goes to another member.
    fn answered<T>(&mut self, answer: Result<Result<(T, KvClient), Error>, Text>) -> Result<T, Failure> {
        let failure = match answer {
            Ok(Ok((answer, member))) => {
                self.member = Some(member);
                return Ok(answer);
            }
            Ok(Err(error)) => failure(&error),
            Err(late) => Failure::Away(late),
        };
        self.at = (self.at + 1) % self.endpoints.len();
        Err(failure)
    }

    /// A cluster's revision only grows, unless somebody has restored it from a backup, and the
    /// anchors with it.
    fn see(&mut self, revision: Option<i64>) -> Result<(), Failure> {
        let revision = revision.unwrap_or(0);
        if revision < self.revision {
            return Err(Failure::Refused(Text::of(format_args!(
                "etcd was put back: its revision was {} and is {revision}; see docs/anchor-agents.md",
                self.revision
            ))));
        }
        self.revision = revision;
        Ok(())
    }
}

async fn connected(endpoint: &Endpoint, limit: Duration) -> Result<KvClient, Error> {
    let mut options = ConnectOptions::new().with_connect_timeout(limit).with_require_leader(true);
    if let Some(tls) = &endpoint.tls {
        options = options.with_tls(tls.clone());
    }
    Client::connect([&endpoint.url], Some(options)).await.map(|client| client.kv_client())
}

fn failure(error: &Error) -> Failure {
    let (said, refused) = match error {
        Error::GRpcStatus(status) => (status.message().to_owned(), REFUSALS.contains(&(status.code() as i32))),
        other => (other.to_string(), false),
    };
    // What is behind it says more: connection refused, an unknown certificate.
    let mut cause = match error {
        Error::GRpcStatus(status) => status.source(),
        other => other.source(),
    };
    while let Some(deeper) = cause.and_then(std::error::Error::source) {
        cause = Some(deeper);
    }
    let cause = cause.map(|cause| cause.to_string()).filter(|cause| !said.contains(cause));
    let text = match cause {
        Some(cause) => Text::of(format_args!("etcd: {said}: {cause}")),
        None => Text::of(format_args!("etcd: {said}")),
    };
    if refused { Failure::Refused(text) } else { Failure::Away(text) }
}
