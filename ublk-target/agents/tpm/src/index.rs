//! Which NV index is a volume's. Its policy, which nothing asks for, names the volume: 8 bytes of
//! ours, the UUID and the era, which tells it from others that the volume has had. So it is found wherever it is, whatever else is
//! around it. Those that were made before there were eras have 16 bytes of ours and the UUID.

use crate::chip::{Chip, failure, kind};
use std::ops::Range;
use tss_esapi::{
    Context, Error, WrapperErrorKind,
    attributes::{NvIndexAttributes, NvIndexAttributesBuilder},
    constants::{CapabilityType, nv_index_type::NvIndexType, response_code::Tss2ResponseCodeKind as Kind},
    handles::{NvIndexHandle, NvIndexTpmHandle, TpmHandle},
    interface_types::algorithm::HashingAlgorithm,
    structures::{CapabilityData, Digest, NvPublic},
};
use ublk_anchor_protocol::{Failure, Text, Uuid};

/// The part of the owner's range that ours lie in.
const OURS: Range<u32> = 0x0180_0000..0x0181_0000;

/// What the policy of each begins with.
const MARK: [u8; 8] = *b"ublkint2";
/// The same of those that have no era.
const MARK_WITHOUT: [u8; 16] = *b"ublk-integrity 1";

/// Bytes of a counter.
pub(crate) const BYTES: u16 = 8;

/// A volume's index.
#[derive(Clone, Copy)]
pub(crate) struct Index {
    pub(crate) handle: NvIndexTpmHandle,
    /// A counter has no value before its first increment.
    pub(crate) written: bool,
    /// 0 where it was made without one.
    pub(crate) era: u64,
}

/// A counter that its secret alone reads and increments. Never orderly: then its newest values are
/// in memory, and after a power cut it goes on 255 higher at most, which no body knows. No lockout
/// for wrong secrets: others' guesses must not keep us out.
fn attributes() -> Result<NvIndexAttributes, Error> {
    NvIndexAttributesBuilder::new()
        .with_nv_index_type(NvIndexType::Counter)
        .with_auth_read(true)
        .with_auth_write(true)
        .with_no_da(true)
        .build()
}

/// What the index of a volume looks like at `handle`.
pub(crate) fn public(uuid: Uuid, era: u64, handle: NvIndexTpmHandle) -> Result<NvPublic, Error> {
    NvPublic::builder()
        .with_nv_index(handle)
        .with_index_name_algorithm(HashingAlgorithm::Sha256)
        .with_index_attributes(attributes()?)
        .with_index_auth_policy(policy(uuid, era)?)
        .with_data_area_size(BYTES.into())
        .build()
}

fn policy(uuid: Uuid, era: u64) -> Result<Digest, Error> {
    Digest::try_from([&MARK[..], &uuid.0, &era.to_be_bytes()].concat())
}

/// The era in a policy that names this volume.
fn era_in(policy: &[u8], uuid: Uuid) -> Option<u64> {
    if policy == [MARK_WITHOUT, uuid.0].concat() {
        return Some(0);
    }
    let era = policy.strip_prefix(&MARK)?.strip_prefix(&uuid.0)?;
    era.try_into().ok().map(u64::from_be_bytes)
}

/// For a new counter. Never 0.
pub(crate) fn new_era(context: &mut Context) -> Result<u64, Error> {
    let drawn = context.get_random(8)?;
    let era: [u8; 8] =
        drawn.value().try_into().map_err(|_| Error::WrapperError(WrapperErrorKind::WrongValueFromTpm))?;
    Ok(u64::from_be_bytes(era) | 1)
}

/// The index of a volume, if there is one.
pub(crate) fn find(chip: &mut Chip, uuid: Uuid) -> Result<Option<Index>, Failure> {
    let named = chip.ask(|context| named(context, uuid)).map_err(|e| failure("looking for the counter", e))?;
    let [(public, era)] = &named[..] else {
        let Some((first, _)) = named.first() else { return Ok(None) };
        return Err(refused(first, "and another one name this volume: remove the one that is not its"));
    };
    let handle = public.nv_index();
    let is_ours = || -> Result<bool, Error> {
        let unwritten = NvIndexAttributesBuilder::with_attributes(public.attributes()).with_written(false).build()?;
        Ok(unwritten == attributes()?
            && public.name_algorithm() == HashingAlgorithm::Sha256
            && public.data_size() == usize::from(BYTES))
    };
    if !is_ours().unwrap_or(false) {
        return Err(refused(public, "names this volume, and is no counter as we make them"));
    }
    Ok(Some(Index { handle, written: public.attributes().written(), era: *era }))
}

fn refused(public: &NvPublic, what: &str) -> Failure {
    Failure::Refused(Text::of(format_args!("the TPM's index {:#x} {what}", u32::from(public.nv_index()))))
}

/// All that name this volume, with their eras.
fn named(context: &mut Context, uuid: Uuid) -> Result<Vec<(NvPublic, u64)>, Error> {
    let mut found = Vec::new();
    for handle in defined(context)? {
        match public_of(context, handle) {
            Ok(public) => {
                let era = era_in(public.authorization_policy().value(), uuid);
                found.extend(era.map(|era| (public, era)));
            }
            // Of a kind that the library does not know: another one's. Or gone meanwhile.
            Err(Error::WrapperError(_)) => {}
            Err(error) if kind(error) == Some(Kind::Handle) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

fn public_of(context: &mut Context, handle: NvIndexTpmHandle) -> Result<NvPublic, Error> {
    let mut object = context.tr_from_tpm_public(handle.into())?;
    let public = context.nv_read_public(NvIndexHandle::from(object));
    context.tr_close(&mut object)?;
    public.map(|(public, _)| public)
}

/// All indices of our part of the range.
pub(crate) fn defined(context: &mut Context) -> Result<Vec<NvIndexTpmHandle>, Error> {
    let (mut found, mut from) = (Vec::new(), OURS.start);
    loop {
        let (data, more) = context.get_capability(CapabilityType::Handles, from, 254)?;
        let CapabilityData::Handles(handles) = data else { return Ok(found) };
        let mut last = None;
        for handle in handles.into_inner() {
            let number = u32::from(handle);
            last = Some(number);
            match handle {
                TpmHandle::NvIndex(index) if OURS.contains(&number) => found.push(index),
                _ => {}
            }
        }
        match last.filter(|last| more && *last < OURS.end - 1) {
            Some(last) => from = last + 1,
            None => return Ok(found),
        }
    }
}

/// A place for the index of a volume: the first that is free from where its UUID points to.
pub(crate) fn free(context: &mut Context, uuid: Uuid) -> Result<NvIndexTpmHandle, Error> {
    let taken: Vec<u32> = defined(context)?.into_iter().map(u32::from).collect();
    let first = u32::from(u16::from_be_bytes([uuid.0[0], uuid.0[1]]));
    // A chip has room for some tens.
    let free = (0..=u32::from(u16::MAX)).map(|at| OURS.start + (first + at) % 0x1_0000).find(|at| !taken.contains(at));
    NvIndexTpmHandle::new(free.unwrap_or(OURS.start))
}
