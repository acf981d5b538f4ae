//! A word about what takes long: told once, by a thread of its own, unless it has ended before.

use std::{
    sync::mpsc::{self, RecvTimeoutError},
    time::Duration,
};

/// Something that may take long; it has ended when this is dropped.
pub struct Notice {
    _ended: mpsc::Sender<()>,
}

impl Notice {
    /// Has `say` called after `patience`.
    pub fn after(patience: Duration, say: impl FnOnce() + Send + 'static) -> Self {
        let (ended, waited) = mpsc::channel();
        // Without a thread for it nothing is said.
        let _ = std::thread::Builder::new().name("notice".into()).spawn(move || {
            if waited.recv_timeout(patience) == Err(RecvTimeoutError::Timeout) {
                say();
            }
        });
        Self { _ended: ended }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_takes_long_is_told_and_what_does_not_is_not() {
        let (tell, told) = mpsc::channel();
        let again = tell.clone();
        let notice = Notice::after(Duration::ZERO, move || tell.send(1).unwrap());
        assert_eq!(told.recv(), Ok(1));
        drop(notice);
        drop(Notice::after(Duration::from_secs(3600), move || again.send(2).unwrap()));
        // Its thread ends at once, and lets go of the other end.
        assert!(told.recv().is_err());
    }
}
