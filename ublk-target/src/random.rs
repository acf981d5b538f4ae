//! Random bytes.

use crate::failure::{Exit, Failure, Outcome};

/// Fresh random bytes from the kernel.
pub fn random<const N: usize>() -> Outcome<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|e| Failure::new(Exit::Device, format_args!("no random bytes: {e}")))?;
    Ok(bytes)
}
