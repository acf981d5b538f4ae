//! How many increments the chip's cells are given. They bear some hundred thousand writes; a client
//! that asks ten times a second would have used them up in three hours.

use std::time::{Duration, Instant};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// So many a day, and a day's worth at once. It begins anew with the process.
pub(crate) struct Wear {
    limit: u32,
    /// Of a day's worth: what may be used now.
    left: f64,
    since: Instant,
}

impl Wear {
    /// `limit` increments a day, or any number where it is 0.
    pub(crate) fn new(limit: u32, now: Instant) -> Self {
        Self { limit, left: limit.into(), since: now }
    }

    /// Takes one, or says how long it takes until there is one.
    pub(crate) fn take(&mut self, now: Instant) -> Result<(), Duration> {
        if self.limit == 0 {
            return Ok(());
        }
        let one = DAY / self.limit;
        let gained = now.saturating_duration_since(self.since).as_secs_f64() / one.as_secs_f64();
        self.left = (self.left + gained).min(self.limit.into());
        self.since = now;
        if self.left < 1. {
            return Err(one.mul_f64(1. - self.left));
        }
        self.left -= 1.;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_days_worth_can_be_used_at_once_and_comes_back_in_a_day() {
        let begin = Instant::now();
        let mut wear = Wear::new(24, begin);
        let hour = DAY / 24;
        assert!((0..24).all(|_| wear.take(begin).is_ok()));
        let wait = wear.take(begin).unwrap_err();
        assert!(wait > hour - Duration::from_secs(1) && wait <= hour, "{wait:?}");
        assert!(wear.take(begin + hour / 2).is_err());
        assert!(wear.take(begin + hour + Duration::from_secs(1)).is_ok());
        assert!(wear.take(begin + hour + Duration::from_secs(2)).is_err());
        // Not more than a day's worth, however long nothing was asked.
        let later = begin + DAY * 10;
        assert_eq!((0..100).filter(|_| wear.take(later).is_ok()).count(), 24);
    }

    #[test]
    fn none_is_no_limit() {
        let now = Instant::now();
        let mut wear = Wear::new(0, now);
        assert!((0..100_000).all(|_| wear.take(now).is_ok()));
    }
}
