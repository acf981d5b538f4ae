//! Work on many items, as many side by side as the processor has lanes.

/// The most lanes that any processor has.
pub(crate) const MAX_LANES: usize = 8;

/// What is done for several items in hardly more time than for one.
pub(crate) trait Lanes<Item: Copy> {
    type Output;

    /// How many items at a time make full use of it: 1, 2 or 8.
    fn lanes(&self) -> usize;

    /// Does it for these.
    fn side_by_side<const N: usize>(&self, items: [Item; N]) -> [Self::Output; N];
}

/// Does it for all items.
pub(crate) fn each<I: Copy, L: Lanes<I>>(work: &L, items: impl Iterator<Item = I>, with: impl FnMut(I, L::Output)) {
    match work.lanes() {
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
    while let Some(first) = items.next() {
        let (mut group, mut count) = ([first; N], 1);
        while count < N {
            let Some(item) = items.next() else { break };
            group[count] = item;
            count += 1;
        }
        // Lanes without an item cost as much as those with one: less than a third full they are not worth it.
        if count == 1 || 3 * count < N {
            group[..count]
                .iter()
                .for_each(|item| work.side_by_side([*item]).into_iter().for_each(|out| with(*item, out)));
        } else {
            group.into_iter().zip(work.side_by_side(group)).take(count).for_each(|(item, out)| with(item, out));
        }
    }
}
