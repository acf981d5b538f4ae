//! A word on the key, for the line that says that it is wrong.

use std::sync::atomic::{AtomicBool, Ordering};

/// Whether the key of this process ends in a newline, which most that do should not: an editor or
/// `echo` has added it.
static ENDS_IN_NEWLINE: AtomicBool = AtomicBool::new(false);

/// Notes of the key that was read whether it ends in a newline.
pub fn note(ends_in_newline: bool) {
    ENDS_IN_NEWLINE.store(ends_in_newline, Ordering::Relaxed);
}

/// The word.
pub fn newline_hint() -> &'static str {
    match ENDS_IN_NEWLINE.load(Ordering::Relaxed) {
        true => " (it ends in a newline, which counts: perhaps an editor or `echo` has added it)",
        false => "",
    }
}
