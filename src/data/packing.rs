//! Which examples share a sequence.

use std::collections::BTreeSet;

/// Best fit, longest first: the examples in each sequence of at most `max_length` tokens, by index.
///
/// Indices ascend within a sequence, and sequences ascend by their first index. No length may be above `max_length`.
/// Best fit decreasing needs at most 11/9 of the best possible number of sequences, and 1 (Johnson, 1974).
pub(super) fn best_fit(lengths: &[usize], max_length: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(lengths[i]));
    let mut packs: Vec<Vec<usize>> = vec![];
    // (room left, pack): the first one with enough room has the least; of equals, the oldest.
    let mut room: BTreeSet<(usize, usize)> = BTreeSet::new();
    for i in order {
        let found = room.range((lengths[i], 0)..).next().copied();
        let (left, pack) = found.unwrap_or_else(|| {
            packs.push(vec![]);
            (max_length, packs.len() - 1)
        });
        room.remove(&(left, pack));
        room.insert((left.saturating_sub(lengths[i]), pack));
        packs[pack].push(i);
    }
    packs.iter_mut().for_each(|pack| pack.sort_unstable());
    packs.sort_unstable_by_key(|pack| pack[0]);
    packs
}
