//! What one connection has said so far, and what it is answered.

use crate::{
    Backend, Failure, Incremented, Parse, Replaced, Text, VERSION, Volume,
    message::{Answer, Request, Shape},
};

/// One connection's side of the protocol.
#[derive(Debug, Default)]
pub(crate) struct Session(Option<Volume>);

impl Session {
    /// Whether there was a `hello`.
    pub(crate) fn is_open(&self) -> bool {
        self.0.is_some()
    }

    /// The answer to a line.
    pub(crate) fn answer(&mut self, request: Result<Request, Parse>, backend: &mut Backend<'_>) -> Answer {
        match request {
            Err(error) => Answer::Refused(error.into()),
            Ok(Request::Hello { version, uuid }) => self.hello(version, Volume { uuid, secret: None }, backend),
            Ok(request) => match &mut self.0 {
                None => refused("the first request is hello"),
                Some(volume) => done(volume, request, backend).unwrap_or_else(|failure| match failure {
                    Failure::Away(text) => Answer::Failed(text),
                    Failure::Refused(text) => Answer::Refused(text),
                }),
            },
        }
    }

    fn hello(&mut self, version: u32, volume: Volume, backend: &Backend<'_>) -> Answer {
        if version != VERSION {
            return refused(format_args!("this agent speaks version {VERSION} alone"));
        }
        if self.is_open() {
            return refused("a connection is about one volume, and has one hello");
        }
        self.0 = Some(volume);
        match backend {
            Backend::Store(_) => Answer::Hello { shape: Shape::Store, wants_secret: false, has_eras: false },
            Backend::Counter(counter) => {
                let (wants_secret, has_eras) = (counter.wants_secret(), counter.has_eras());
                Answer::Hello { shape: Shape::Counter, wants_secret, has_eras }
            }
        }
    }
}

fn done(volume: &mut Volume, request: Request, backend: &mut Backend<'_>) -> Result<Answer, Failure> {
    Ok(match (backend, request) {
        (_, Request::Auth(secret)) => {
            volume.secret = Some(secret);
            Answer::Done
        }
        (Backend::Store(store), Request::Load) => match store.load(volume)? {
            Some((generation, body)) => Answer::Body { generation, body },
            None => Answer::Absent,
        },
        (Backend::Store(store), Request::Replace { expected, body }) => store.replace(volume, expected, &body)?.into(),
        (Backend::Store(store), Request::InitStore { generation, body }) => {
            store.init(volume, generation, &body)?.into()
        }
        (Backend::Store(store), Request::Retire { expected }) => store.retire(volume, expected)?.into(),
        (Backend::Counter(counter), Request::Read) => counter.read(volume)?.map_or(Answer::Absent, Answer::Value),
        (Backend::Counter(counter), Request::Era) if counter.has_eras() => {
            counter.era(volume)?.map_or(Answer::Absent, Answer::Value)
        }
        (Backend::Counter(counter), Request::Increment { expected }) => counter.increment(volume, expected)?.into(),
        (Backend::Counter(counter), Request::InitCounter) => counter.init(volume)?.into(),
        (Backend::Counter(counter), Request::Retire { expected }) => counter.retire(volume, expected)?.into(),
        (Backend::Store(_), _) => refused("this agent is a store: load, replace, init with a body, retire"),
        (Backend::Counter(_), _) => refused("this agent is a counter: read, increment, init without a body, retire"),
    })
}

fn refused(why: impl std::fmt::Display) -> Answer {
    Answer::Refused(Text::of(why))
}

impl From<Replaced> for Answer {
    fn from(outcome: Replaced) -> Self {
        match outcome {
            Replaced::Done => Self::Done,
            Replaced::Conflict => Self::Conflict,
            Replaced::Absent => Self::Absent,
        }
    }
}

impl From<Incremented> for Answer {
    fn from(outcome: Incremented) -> Self {
        match outcome {
            Incremented::Done(value) => Self::Value(value),
            Incremented::Conflict => Self::Conflict,
            Incremented::Absent => Self::Absent,
        }
    }
}
