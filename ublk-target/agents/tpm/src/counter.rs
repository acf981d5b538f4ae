//! The counter: an NV index of the TPM that can only be incremented. A new one begins above all that
//! the TPM has had, removed ones too; that is the TPM's own rule.

use crate::{
    chip::{Chip, failure, in_session, kind, spared},
    index::{self, Index},
    options::Options,
    wear::Wear,
};
use std::{path::PathBuf, time::Instant};
use tss_esapi::{
    Context, Error, WrapperErrorKind,
    constants::response_code::Tss2ResponseCodeKind as Kind,
    handles::{NvIndexHandle, ObjectHandle},
    interface_types::resource_handles::{NvAuth, Provision},
    structures::Auth,
};
use ublk_anchor_protocol::{
    Counter, Failure, Incremented, Replaced, Retired, Secret, Text, Volume,
    process::{Ended, configured},
};

pub(crate) struct TpmCounter {
    chip: Chip,
    secret: Option<Secret>,
    owner_auth: Option<PathBuf>,
    wear: Wear,
}

impl TpmCounter {
    pub(crate) fn new(options: Options) -> Self {
        let wear = Wear::new(options.wear_limit, Instant::now());
        Self { chip: Chip::new(options.tcti), secret: options.secret, owner_auth: options.owner_auth, wear }
    }

    fn auth(&self, of: &Volume) -> Result<Auth, Failure> {
        let secret = self.secret.as_ref().or(of.secret.as_ref());
        let secret = secret.ok_or_else(|| Failure::Refused(Text::of("a secret is needed: auth, or --secret-file")))?;
        Auth::try_from(secret.0.as_slice()).map_err(|e| failure("the secret", e))
    }

    fn owner_auth(&self) -> Result<Auth, Failure> {
        let refused = |Ended { why, .. }: Ended| Failure::Refused(Text::of(why));
        let password = match &self.owner_auth {
            Some(path) => configured("owner's password", path).map_err(refused)?,
            None => Vec::new(),
        };
        let password = password.strip_suffix(b"\n").unwrap_or(&password);
        Auth::try_from(password).map_err(|e| failure("the owner's password", e))
    }

    /// Does something with an index, its secret in hand.
    fn with<T>(
        &mut self,
        index: Index,
        auth: Auth,
        doing: &str,
        commands: impl FnOnce(&mut Context, NvIndexHandle) -> Result<T, Error>,
    ) -> Result<T, Failure> {
        let answer = self.chip.ask(|context| {
            let mut object = context.tr_from_tpm_public(index.handle.into())?;
            let answer = context
                .tr_set_auth(object, auth)
                .and_then(|()| in_session(context, |context| commands(context, NvIndexHandle::from(object))));
            context.tr_close(&mut object)?;
            answer
        });
        answer.map_err(|e| failure(doing, e))
    }

    fn worn(&mut self) -> Result<(), Failure> {
        self.wear.take(Instant::now()).map_err(|wait| {
            Failure::Away(Text::of(format_args!(
                "--wear-limit: today's increments are used up, the next one in {} s",
                wait.as_secs() + 1
            )))
        })
    }

    /// Makes the index of a volume, without a value yet.
    fn define(&mut self, of: &Volume, auth: Auth) -> Result<Index, Failure> {
        let (owner, uuid) = (self.owner_auth()?, of.uuid);
        let made = self.chip.ask(|context| {
            let (handle, era) = (index::free(context, uuid)?, index::new_era(context)?);
            let public = index::public(uuid, era, handle)?;
            context.tr_set_auth(ObjectHandle::Owner, owner)?;
            in_session(context, |context| context.nv_define_space(Provision::Owner, Some(auth), public)).and_then(
                |made| {
                    context.tr_close(&mut made.into())?;
                    Ok(Index { handle, written: false, era })
                },
            )
        });
        made.map_err(|e| failure("making the counter with the owner's password", e))
    }
}

/// The value, or nothing before the first increment.
fn value(context: &mut Context, index: NvIndexHandle) -> Result<Option<u64>, Error> {
    match context.nv_read(NvAuth::NvIndex(index), index, index::BYTES, 0) {
        Ok(bytes) => {
            let bytes =
                bytes.value().try_into().map_err(|_| Error::WrapperError(WrapperErrorKind::WrongValueFromTpm))?;
            Ok(Some(u64::from_be_bytes(bytes)))
        }
        Err(error) if kind(error) == Some(Kind::NvUninitialized) => Ok(None),
        Err(error) => Err(error),
    }
}

fn add_one(context: &mut Context, index: NvIndexHandle) -> Result<Option<u64>, Error> {
    spared(|| context.nv_increment(NvAuth::NvIndex(index), index))?;
    value(context, index)
}

/// What a counter has after an increment of `expected`.
fn counted(expected: Option<u64>, value: Option<u64>) -> Result<Incremented, Failure> {
    match (expected, value) {
        (Some(expected), Some(value)) if value != expected + 1 => Err(Failure::Away(Text::of(format_args!(
            "the counter went from {expected} to {value}: somebody else counts, too"
        )))),
        (_, Some(value)) => Ok(Incremented::Done(value)),
        (_, None) => Err(Failure::Away(Text::of("the counter has no value after an increment"))),
    }
}

impl Counter for TpmCounter {
    /// The library loads its part for this kind of TPM.
    fn begin(&mut self) -> Result<(), Failure> {
        self.chip.ask(index::defined).map(drop).map_err(|e| failure("at start", e))
    }

    fn wants_secret(&self) -> bool {
        self.secret.is_none()
    }

    fn read(&mut self, of: &Volume) -> Result<Option<u64>, Failure> {
        let auth = self.auth(of)?;
        match index::find(&mut self.chip, of.uuid)? {
            None => Ok(None),
            Some(index) => self.with(index, auth, "reading the counter", value),
        }
    }

    fn has_eras(&self) -> bool {
        true
    }

    /// What is read in the counter's own session is of the index with this policy: its name is a part of what both sides sign.
    fn era(&mut self, of: &Volume) -> Result<Option<u64>, Failure> {
        let auth = self.auth(of)?;
        let Some(index) = index::find(&mut self.chip, of.uuid)? else { return Ok(None) };
        let value = self.with(index, auth, "reading the counter", value)?;
        Ok(value.map(|_| index.era))
    }

    /// Nobody else is between the look and the increment: one agent has the TPM's counters of this
    /// machine, and does one thing after the other.
    fn increment(&mut self, of: &Volume, expected: u64) -> Result<Incremented, Failure> {
        let auth = self.auth(of)?;
        let Some(index) = index::find(&mut self.chip, of.uuid)?.filter(|index| index.written) else {
            return Ok(Incremented::Absent);
        };
        let before = self.with(index, auth.clone(), "reading the counter", value)?;
        if before != Some(expected) {
            return Ok(before.map_or(Incremented::Absent, |_| Incremented::Conflict));
        }
        self.worn()?;
        counted(before, self.with(index, auth, "incrementing the counter", add_one)?)
    }

    /// In two steps: an index, and its first value. Cut short between them, it is absent still, and
    /// the next `init` goes on with it.
    fn init(&mut self, of: &Volume) -> Result<Incremented, Failure> {
        let auth = self.auth(of)?;
        let index = match index::find(&mut self.chip, of.uuid)? {
            Some(index) if index.written => return Ok(Incremented::Conflict),
            found => found,
        };
        self.worn()?;
        let index = match index {
            Some(index) => index,
            None => self.define(of, auth.clone())?,
        };
        counted(None, self.with(index, auth, "beginning the counter", add_one)?)
    }

    fn retire(&mut self, of: &Volume, expected: u64) -> Result<Retired, Failure> {
        let (auth, owner) = (self.auth(of)?, self.owner_auth()?);
        let Some(index) = index::find(&mut self.chip, of.uuid)? else { return Ok(Replaced::Absent) };
        match self.with(index, auth, "reading the counter", value)? {
            None => return Ok(Replaced::Absent),
            Some(value) if value != expected => return Ok(Replaced::Conflict),
            Some(_) => {}
        }
        let removed = self.chip.ask(|context| {
            context.tr_set_auth(ObjectHandle::Owner, owner)?;
            let mut object = context.tr_from_tpm_public(index.handle.into())?;
            let removed = in_session(context, |context| context.nv_undefine_space(Provision::Owner, object.into()));
            if removed.is_err() {
                context.tr_close(&mut object)?;
            }
            removed
        });
        removed.map(|()| Replaced::Done).map_err(|e| failure("removing the counter with the owner's password", e))
    }
}
