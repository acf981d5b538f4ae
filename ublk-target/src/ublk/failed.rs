//! What libublk's errors are to a user.

use crate::failure::{Exit, Failure};
use libublk::UblkError;
use std::io;

/// `what` can't be done.
pub(super) fn failure(what: &str, e: &UblkError) -> Failure {
    match e {
        UblkError::UringIOError(code) | UblkError::OtherError(code) => {
            Failure::io(what, &io::Error::from_raw_os_error(-code))
        }
        UblkError::IOError(e) => Failure::io(what, e),
        other => Failure::new(Exit::Device, format_args!("{what}: {other}")),
    }
}
