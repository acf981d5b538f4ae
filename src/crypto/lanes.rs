//! Work on many items, as many side by side as the processor has lanes.

/// The most lanes that any processor has.
pub(crate) const MAX_LANES: usize = 16;

/// How many items at a time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Groups {
    /// As long as they are few: 1 or 2.
    pub(crate) few: usize,
    /// Of many: 1, 2, 8 or 16.
    pub(crate) many: usize,
    /// So many are done as if they were `many`; fewer are not worth it, for lanes without an item
    /// cost as much as those with one.
    pub(crate) least: usize,
}

impl Groups {
    /// One item after the other.
    pub(crate) const SINGLE: Self = Self { few: 1, many: 1, least: 2 };
}

/// What is done for several items in hardly more time than for one.
pub(crate) trait Lanes<Item: Copy> {
    type Output;

    /// How many items at a time make full use of it.
    fn groups(&self) -> Groups;

    /// Does it for these.
    fn side_by_side<const N: usize>(&self, items: [Item; N]) -> [Self::Output; N];
}

/// Does it for all items.
pub(crate) fn each<I: Copy, L: Lanes<I>>(work: &L, items: impl Iterator<Item = I>, with: impl FnMut(I, L::Output)) {
    match work.groups().many {
        MAX_LANES => in_groups_of::<MAX_LANES, _, _>(work, items, with),
        8 => in_groups_of::<8, _, _>(work, items, with),
        2 => in_groups_of::<2, _, _>(work, items, with),
        _ => in_groups_of::<1, _, _>(work, items, with),
    }
}

fn in_groups_of<const N: usize, I: Copy, L: Lanes<I>>(
    work: &L,
    mut items: impl Iterator<Item = I>,
    mut with: impl FnMut(I, L::Output),
) {
    let Groups { few, least, .. } = work.groups();
    while let Some(first) = items.next() {
        let (mut group, mut count) = ([first; N], 1);
        while count < N {
            let Some(item) = items.next() else { break };
            group[count] = item;
            count += 1;
        }
        if count == N || count >= least {
            group.into_iter().zip(work.side_by_side(group)).take(count).for_each(|(item, out)| with(item, out));
            continue;
        }
        for items in group[..count].chunks(few) {
            match *items {
                [a, b] => [a, b].into_iter().zip(work.side_by_side([a, b])).for_each(|(item, out)| with(item, out)),
                _ => items
                    .iter()
                    .for_each(|item| work.side_by_side([*item]).into_iter().for_each(|out| with(*item, out))),
            }
        }
    }
}
