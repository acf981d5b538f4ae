//! Requests and answers, to and from a line. A line is words with one space between them.

use crate::{
    Body, Parse, Secret, Text, Uuid,
    names::{self, number},
};
use std::fmt;

/// What an agent keeps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shape {
    /// A body with its generation, which is replaced by compare-and-swap.
    Store,
    /// A number that only grows.
    Counter,
}

impl Shape {
    const fn name(self) -> &'static str {
        match self {
            Self::Store => "store",
            Self::Counter => "counter",
        }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What a client asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Request {
    /// The first line: the newest version that the client speaks, and the volume.
    Hello {
        /// The version of the protocol.
        version: u32,
        /// The volume that all that follows is about.
        uuid: Uuid,
    },
    /// The secret of the counter. For this connection alone.
    Auth(Secret),
    /// A store's body.
    Load,
    /// A store's next body.
    Replace {
        /// The generation that must be there; the new body's is one more.
        expected: u64,
        /// The new body.
        body: Body,
    },
    /// A store's first body.
    InitStore {
        /// Its generation.
        generation: u64,
        /// The body.
        body: Body,
    },
    /// A counter's value.
    Read,
    /// Which counter it is, of those that the volume has had.
    Era,
    /// One more.
    Increment {
        /// The value that must be there.
        expected: u64,
    },
    /// A new counter.
    InitCounter,
    /// The end of a store's body, or of a counter.
    Retire {
        /// The generation, or the value, that must be there.
        expected: u64,
    },
}

impl Request {
    /// From a line, without its end.
    ///
    /// # Errors
    ///
    /// It is none, and why.
    pub fn parse(line: &[u8]) -> Result<Self, Parse> {
        let mut words = Words::of(line);
        let request = match words.next()? {
            b"hello" => Self::Hello { version: version(words.next()?)?, uuid: Uuid::parse(words.next()?)? },
            b"auth" => Self::Auth(Secret::parse(words.next()?)?),
            b"load" => Self::Load,
            b"replace" => Self::Replace { expected: counted(words.next()?)?, body: Body::parse(words.next()?)? },
            b"init" if words.is_empty() => Self::InitCounter,
            b"init" => Self::InitStore { generation: number(words.next()?)?, body: Body::parse(words.next()?)? },
            b"read" => Self::Read,
            b"era" => Self::Era,
            b"increment" => Self::Increment { expected: counted(words.next()?)? },
            b"retire" => Self::Retire { expected: number(words.next()?)? },
            _ => return Err(Parse("there is no such request")),
        };
        words.end()?;
        Ok(request)
    }

    /// Whether something is another one afterwards.
    pub fn changes(&self) -> bool {
        match self {
            Self::Replace { .. } | Self::InitStore { .. } => true,
            Self::Increment { .. } | Self::InitCounter | Self::Retire { .. } => true,
            Self::Hello { .. } | Self::Auth(_) | Self::Load | Self::Read | Self::Era => false,
        }
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hello { version, uuid } => write!(f, "hello {version} {uuid}"),
            Self::Auth(secret) => f.write_str("auth ").and_then(|()| secret.show(f)),
            Self::Load => f.write_str("load"),
            Self::Replace { expected, body } => write!(f, "replace {expected} {body}"),
            Self::InitStore { generation, body } => write!(f, "init {generation} {body}"),
            Self::Read => f.write_str("read"),
            Self::Era => f.write_str("era"),
            Self::Increment { expected } => write!(f, "increment {expected}"),
            Self::InitCounter => f.write_str("init"),
            Self::Retire { expected } => write!(f, "retire {expected}"),
        }
    }
}

/// What an agent answers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[expect(clippy::large_enum_variant, reason = "on the stack: nothing is allocated for a request")]
pub enum Answer {
    /// Done: the change is durable.
    Done,
    /// To `hello`.
    Hello {
        /// What the agent keeps.
        shape: Shape,
        /// It wants `auth` next.
        wants_secret: bool,
        /// It knows `era`.
        has_eras: bool,
    },
    /// To `load`.
    Body {
        /// Its generation.
        generation: u64,
        /// The body.
        body: Body,
    },
    /// To `read`, or after an increment: the value of the counter.
    Value(u64),
    /// There is no body, or no counter, of this volume. Nothing was changed.
    Absent,
    /// Another generation or value is there than was expected, or one where there must be none.
    /// Nothing was changed.
    Conflict,
    /// It could not be done now. A change may have happened, or happen yet.
    Failed(Text),
    /// Nothing was changed, and the same request will be refused again.
    Refused(Text),
}

impl Answer {
    /// From a line, without its end.
    ///
    /// # Errors
    ///
    /// It is none, and why.
    pub fn parse(line: &[u8]) -> Result<Self, Parse> {
        let rest = |word: &str| line.strip_prefix(word.as_bytes()).map(Text::of_bytes);
        if let Some(text) = rest("err ") {
            return Ok(Self::Failed(text));
        }
        if let Some(text) = rest("refused ") {
            return Ok(Self::Refused(text));
        }
        let mut words = Words::of(line);
        let answer = match words.next()? {
            b"absent" => Self::Absent,
            b"conflict" => Self::Conflict,
            b"ok" if words.is_empty() => Self::Done,
            b"ok" => match words.next()? {
                b"store" => return Ok(Self::hello(Shape::Store, words)),
                b"counter" => return Ok(Self::hello(Shape::Counter, words)),
                value if words.is_empty() => Self::Value(number(value)?),
                generation => Self::Body { generation: number(generation)?, body: Body::parse(words.next()?)? },
            },
            _ => return Err(Parse("there is no such answer")),
        };
        words.end()?;
        Ok(answer)
    }

    /// Words that are not known here say what a newer agent could do besides.
    fn hello(shape: Shape, words: Words<'_>) -> Self {
        let says = |what: &[u8]| words.0.is_some_and(|rest| rest.split(|b| *b == b' ').any(|word| word == what));
        Self::Hello { shape, wants_secret: says(b"auth"), has_eras: says(b"era") }
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Done => f.write_str("ok"),
            Self::Hello { shape, wants_secret, has_eras } => {
                let says = |is_so: &bool, what| if *is_so { what } else { "" };
                write!(f, "ok {shape}{}{}", says(wants_secret, " auth"), says(has_eras, " era"))
            }
            Self::Body { generation, body } => write!(f, "ok {generation} {body}"),
            Self::Value(value) => write!(f, "ok {value}"),
            Self::Absent => f.write_str("absent"),
            Self::Conflict => f.write_str("conflict"),
            Self::Failed(text) => write!(f, "err {text}"),
            Self::Refused(text) => write!(f, "refused {text}"),
        }
    }
}

/// A generation or value that something can come after.
fn counted(text: &[u8]) -> Result<u64, Parse> {
    number(text).and_then(|value| if value < u64::MAX { Ok(value) } else { Err(Parse("nothing comes after 2^64 - 1")) })
}

fn version(text: &[u8]) -> Result<u32, Parse> {
    let version = names::number(text).ok().filter(|version| *version > 0);
    version.and_then(|version| u32::try_from(version).ok()).ok_or(Parse("a version is a number from 1 to 2^32 - 1"))
}

/// The words of a line that have not been taken.
struct Words<'a>(Option<&'a [u8]>);

impl<'a> Words<'a> {
    fn of(line: &'a [u8]) -> Self {
        Self(Some(line))
    }

    fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    fn next(&mut self) -> Result<&'a [u8], Parse> {
        let rest = self.0.ok_or(Parse("a word is missing"))?;
        let (word, rest) = match rest.iter().position(|byte| *byte == b' ') {
            Some(at) => (&rest[..at], Some(&rest[at + 1..])),
            None => (rest, None),
        };
        self.0 = rest;
        Ok(word)
    }

    fn end(&self) -> Result<(), Parse> {
        if self.is_empty() { Ok(()) } else { Err(Parse("there is a word too many")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: Uuid = Uuid([0xa5; 16]);
    const BODY: Body = Body([0x5a; Body::BYTES]);

    fn requests() -> Vec<Request> {
        vec![
            Request::Hello { version: 1, uuid: UUID },
            Request::Auth(Secret([9; 32])),
            Request::Load,
            Request::Replace { expected: 7, body: BODY },
            Request::InitStore { generation: u64::MAX, body: BODY },
            Request::Read,
            Request::Era,
            Request::Increment { expected: u64::MAX - 1 },
            Request::InitCounter,
            Request::Retire { expected: 0 },
        ]
    }

    fn answers() -> Vec<Answer> {
        vec![
            Answer::Done,
            Answer::Hello { shape: Shape::Store, wants_secret: false, has_eras: false },
            Answer::Hello { shape: Shape::Counter, wants_secret: true, has_eras: false },
            Answer::Hello { shape: Shape::Counter, wants_secret: true, has_eras: true },
            Answer::Hello { shape: Shape::Counter, wants_secret: false, has_eras: true },
            Answer::Body { generation: u64::MAX, body: BODY },
            Answer::Value(0),
            Answer::Absent,
            Answer::Conflict,
            Answer::Failed(Text::of("the cluster has no leader")),
            Answer::Refused(Text::of("no")),
        ]
    }

    #[test]
    fn what_is_shown_is_understood_and_fits_a_line() {
        for request in requests() {
            let line = request.to_string();
            assert!(line.len() < crate::LINE);
            assert_eq!(Request::parse(line.as_bytes()), Ok(request));
        }
        for answer in answers() {
            let line = answer.to_string();
            assert!(line.len() < crate::LINE);
            assert_eq!(Answer::parse(line.as_bytes()), Ok(answer));
        }
    }

    /// Every line with a character too many, too few or another one.
    #[test]
    fn what_is_almost_a_line_is_none_or_means_the_same() {
        let lines: Vec<String> = requests().iter().map(ToString::to_string).collect();
        for line in &lines {
            for wrong in [
                format!(" {line}"),
                format!("{line} "),
                format!("{line} x"),
                line.to_uppercase(),
                line.replace(' ', "  "),
            ] {
                // A number at the end may grow by no digit here, and words without a space have no other form.
                if wrong != *line {
                    assert!(Request::parse(wrong.as_bytes()).is_err(), "{wrong}");
                }
            }
            for at in 0..line.len() {
                let mut bytes = line.clone().into_bytes();
                bytes[at] ^= 0x80;
                assert!(Request::parse(&bytes).is_err());
            }
        }
        for wrong in ["increment 18446744073709551615", "hello 0 x", "replace 1", "init 1", "load 1", "", "\0"] {
            assert!(Request::parse(wrong.as_bytes()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_newer_agent_may_say_more_of_itself() {
        let hello = Answer::Hello { shape: Shape::Counter, wants_secret: true, has_eras: false };
        assert_eq!(Answer::parse(b"ok counter seal auth lease"), Ok(hello));
        let hello = Answer::Hello { shape: Shape::Store, wants_secret: false, has_eras: false };
        assert_eq!(Answer::parse(b"ok store seal"), Ok(hello));
        for wrong in ["ok storage", "ok 1 2", "ok -1", "yes", "absent 1", "err"] {
            assert!(Answer::parse(wrong.as_bytes()).is_err(), "{wrong}");
        }
    }
}
