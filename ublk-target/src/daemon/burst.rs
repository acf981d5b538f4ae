//! Bursts: the first events of a kind are told one by one, the rest are counted, and the count is
//! told. None is lost, and no log is flooded.

use std::{
    collections::HashMap,
    hash::Hash,
    time::{Duration, Instant},
};

/// Events of one kind that are told one by one in a window.
const TOLD: u32 = 10;
/// How long a window is.
const WINDOW: Duration = Duration::from_secs(10);

/// What is told of each kind, and what is only counted.
pub(super) struct Bursts<K, E> {
    windows: HashMap<K, Window<E>>,
}

struct Window<E> {
    begin: Instant,
    told: u32,
    /// How many are not told yet, and the last of them.
    held: Option<(u64, E)>,
}

impl<K: Copy + Eq + Hash, E> Bursts<K, E> {
    pub(super) fn new() -> Self {
        Self { windows: HashMap::new() }
    }

    /// The event, if it is to be told now.
    pub(super) fn admit(&mut self, kind: K, event: E, now: Instant) -> Option<E> {
        let window = self.windows.entry(kind).or_insert(Window { begin: now, told: 0, held: None });
        if window.held.is_none() && now.duration_since(window.begin) >= WINDOW {
            *window = Window { begin: now, told: 0, held: None };
        }
        if window.told < TOLD {
            window.told += 1;
            return Some(event);
        }
        let count = window.held.as_ref().map_or(0, |(count, _)| *count);
        window.held = Some((count + 1, event));
        None
    }

    /// When the next count is to be told.
    pub(super) fn due(&self) -> Option<Instant> {
        let holding = self.windows.values().filter(|window| window.held.is_some());
        holding.map(|window| window.begin + WINDOW).min()
    }

    /// What is due: how many of a kind, and the last of them. Where they go on nothing but such counts
    /// is told, until there has been a window without any.
    pub(super) fn take_due(&mut self, now: Instant) -> Vec<(u64, E)> {
        let due = self.windows.values_mut().filter(|window| now.duration_since(window.begin) >= WINDOW);
        due.filter_map(|window| {
            let held = window.held.take()?;
            window.begin = now;
            Some(held)
        })
        .collect()
    }

    /// All that is held.
    pub(super) fn take_all(&mut self) -> Vec<(u64, E)> {
        self.windows.values_mut().filter_map(|window| window.held.take()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_event_is_told_or_counted() {
        let begin = Instant::now();
        let mut bursts = Bursts::new();
        let mut told = 0;
        let (mut counted, mut lines) = (0, 0);
        // A thousand a second for a minute, of two kinds.
        for i in 0..60_000_u32 {
            let now = begin + Duration::from_millis(i.into());
            assert!(bursts.due().is_none_or(|due| due <= begin + WINDOW + Duration::from_millis(i.into())));
            for (count, _) in bursts.take_due(now) {
                (counted, lines) = (counted + count, lines + 1);
            }
            told += u32::from(bursts.admit(i % 2, i, now).is_some());
        }
        let left: u64 = bursts.take_all().into_iter().map(|(count, _)| count).sum();
        assert_eq!(u64::from(told) + counted + left, 60_000);
        assert_eq!((told, lines), (2 * TOLD, 2 * 5), "a flood is one line in ten seconds");
    }

    #[test]
    fn what_is_rare_is_always_told() {
        let begin = Instant::now();
        let mut bursts = Bursts::new();
        for i in 0..1000 {
            assert_eq!(bursts.admit((), i, begin + WINDOW * i / 5), Some(i));
        }
        assert!(bursts.due().is_none());
        let now = begin + WINDOW * 1000;
        (0..TOLD).for_each(|i| assert!(bursts.admit((), i, now).is_some()));
        assert!(bursts.admit((), 7, now).is_none() && bursts.admit((), 8, now).is_none());
        assert!(bursts.take_due(now).is_empty(), "not yet");
        assert_eq!(bursts.due(), Some(now + WINDOW));
        assert_eq!(bursts.take_due(now + WINDOW), [(2, 8)]);
        // It goes on: counts alone. Then there is quiet.
        assert!(bursts.admit((), 9, now + WINDOW).is_none());
        assert_eq!(bursts.take_due(now + WINDOW * 2), [(1, 9)]);
        assert!(bursts.take_due(now + WINDOW * 3).is_empty() && bursts.due().is_none());
        assert_eq!(bursts.admit((), 10, now + WINDOW * 3), Some(10));
    }
}
