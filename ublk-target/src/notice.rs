//! What is done about something that takes long, by a thread of its own, unless that has ended
//! before.

use crate::threads::named;
use std::{
    sync::mpsc::{self, RecvTimeoutError},
    time::Duration,
};

/// What a patience is counted in. A machine that stands still for a while (a virtual machine that gets no processor) uses up one of
/// these, however long that was.
const TICK: Duration = Duration::from_secs(1);

/// Something that may take long; it has ended when this is dropped.
pub struct Notice {
    _ended: mpsc::Sender<()>,
}

impl Notice {
    /// Has `act` called after `patience`.
    pub fn after(patience: Duration, act: impl FnOnce() + Send + 'static) -> Self {
        let mut act = Some(act);
        Self::every(patience.min(TICK), move |passed| {
            if let Some(act) = act.take_if(|_| passed >= patience) {
                act();
            }
        })
    }

    /// Has `act` called whenever one more `period` has passed, with the time that it has taken by
    /// then.
    pub fn every(period: Duration, mut act: impl FnMut(Duration) + Send + 'static) -> Self {
        let (ended, waited) = mpsc::channel();
        // Without a thread for it nothing is done.
        let _ = named("notice").spawn(move || {
            let mut passed = Duration::ZERO;
            while waited.recv_timeout(period) == Err(RecvTimeoutError::Timeout) {
                passed += period;
                act(passed);
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

    #[test]
    fn what_goes_on_is_told_again() {
        let (tell, told) = mpsc::channel();
        let period = Duration::from_millis(5);
        let notice = Notice::every(period, move |passed| {
            let _ = tell.send(passed);
        });
        assert_eq!(told.iter().take(3).collect::<Vec<_>>(), [period, 2 * period, 3 * period]);
        drop(notice);
        while told.recv().is_ok() {}
    }
}
