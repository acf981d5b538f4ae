//! Commands to the TPM. The connection is opened when it is needed, and opened anew after anything
//! that the TPM has not answered itself.

use std::{thread, time::Duration};
use tss_esapi::{
    Context, Error, TctiNameConf,
    constants::{SessionType, response_code::Tss2ResponseCodeKind as Kind},
    interface_types::algorithm::HashingAlgorithm,
    structures::SymmetricDefinition,
};
use ublk_anchor_protocol::{Failure, Text};

/// How long the TPM is waited for where it spares its cells: 200, 400, 800 ms.
const RATE_WAITS: [Duration; 3] = [Duration::from_millis(200), Duration::from_millis(400), Duration::from_millis(800)];

/// The TPM.
pub(crate) struct Chip {
    tcti: TctiNameConf,
    context: Option<Context>,
}

impl Chip {
    pub(crate) fn new(tcti: TctiNameConf) -> Self {
        Self { tcti, context: None }
    }

    /// Gives commands. What they leave open, they close.
    pub(crate) fn ask<T>(&mut self, commands: impl FnOnce(&mut Context) -> Result<T, Error>) -> Result<T, Error> {
        let context = match &mut self.context {
            Some(context) => context,
            none => none.insert(Context::new(self.tcti.clone())?),
        };
        let answer = commands(context);
        if answer.as_ref().is_err_and(|error| !is_answer(*error)) {
            self.context = None;
        }
        answer
    }
}

/// Gives commands in a session of their own. Both sides prove by it that they know the secret of
/// what is asked; what was recorded earlier does not fit it.
pub(crate) fn in_session<T>(
    context: &mut Context,
    commands: impl FnOnce(&mut Context) -> Result<T, Error>,
) -> Result<T, Error> {
    let symmetric = SymmetricDefinition::AES_128_CFB;
    let session =
        context.start_auth_session(None, None, None, SessionType::Hmac, symmetric, HashingAlgorithm::Sha256)?;
    let answer = context.execute_with_session(session, commands);
    let flushed = match session {
        Some(session) => context.flush_context(tss_esapi::handles::SessionHandle::from(session).into()),
        None => Ok(()),
    };
    answer.and_then(|answer| flushed.map(|()| answer))
}

/// Does a write, again where the TPM has not done it to spare its cells.
pub(crate) fn spared<T>(mut write: impl FnMut() -> Result<T, Error>) -> Result<T, Error> {
    for wait in RATE_WAITS {
        match write() {
            Err(error) if kind(error) == Some(Kind::NvRate) => thread::sleep(wait),
            other => return other,
        }
    }
    write()
}

/// What the TPM has said, if it has said one of what we expect. Failures on the way to it are none of
/// these.
pub(crate) fn kind(error: Error) -> Option<Kind> {
    let Error::Tss2Error(code) = error else { return None };
    code.kind()
}

fn is_answer(error: Error) -> bool {
    let answers = [
        Kind::Handle,
        Kind::AuthFail,
        Kind::BadAuth,
        Kind::NvUninitialized,
        Kind::NvSpace,
        Kind::NvDefined,
        Kind::NvRate,
    ];
    kind(error).is_some_and(|kind| answers.contains(&kind))
}

/// For the client: what can't be otherwise later is refused.
pub(crate) fn failure(doing: &str, error: Error) -> Failure {
    let text = match (kind(error), error) {
        (None, Error::Tss2Error(_)) => Text::of(format_args!("{doing}: the TPM can't be reached")),
        _ => Text::of(format_args!("{doing}: {error}")),
    };
    match kind(error) {
        Some(Kind::AuthFail | Kind::BadAuth | Kind::NvSpace) => Failure::Refused(text),
        _ => Failure::Away(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;
    use tss_esapi::WrapperErrorKind;

    #[test]
    fn a_write_that_fails_otherwise_is_not_done_again() {
        let (mut times, since) = (0, Instant::now());
        let failed = spared(|| {
            times += 1;
            Err::<(), _>(Error::WrapperError(WrapperErrorKind::InternalError))
        });
        assert!(failed.is_err() && times == 1 && since.elapsed() < RATE_WAITS[0]);
        assert!(matches!(failure("reading", failed.unwrap_err()), Failure::Away(_)));
    }
}
