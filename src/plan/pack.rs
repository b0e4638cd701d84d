//! Places regions so that those which live at the same time do not overlap.

/// Every region starts at a multiple of this many bytes: a cache line on the CPU, a coalesced access on a GPU.
pub const ALIGNMENT: u64 = 256;

/// What is to be placed: bytes and the operations between which it lives, both included.
#[derive(Clone, Copy, Debug)]
pub struct Block {
    /// Bytes, not yet aligned.
    pub bytes: u64,
    /// First operation.
    pub first: u32,
    /// Last operation.
    pub last: u32,
}

/// Rounds up to [`ALIGNMENT`].
pub fn align(bytes: u64) -> u64 {
    bytes.div_ceil(ALIGNMENT) * ALIGNMENT
}

/// Offsets for the blocks, and the bytes that they need together.
///
/// Greedy by size: the largest first, each at the lowest offset where nothing that lives at the same time lies
/// (Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference", 2020, section 5.2).
pub fn pack(blocks: &[Block]) -> (Vec<u64>, u64) {
    let mut order: Vec<usize> = (0..blocks.len()).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(blocks[i].bytes), blocks[i].first, i));
    let mut offsets = vec![0u64; blocks.len()];
    // What is placed so far, by offset.
    let mut placed: Vec<usize> = Vec::with_capacity(blocks.len());
    let mut total = 0;
    for i in order {
        let size = align(blocks[i].bytes);
        let mut offset = 0;
        for &j in &placed {
            let together = blocks[i].first <= blocks[j].last && blocks[j].first <= blocks[i].last;
            if !together {
                continue;
            }
            if offset + size <= offsets[j] {
                break;
            }
            offset = offset.max(offsets[j] + align(blocks[j].bytes));
        }
        offsets[i] = offset;
        total = total.max(offset + size);
        let at = placed.partition_point(|&j| offsets[j] <= offset);
        placed.insert(at, i);
    }
    (offsets, total)
}

/// The most bytes alive at any one operation: no placement can need less.
#[cfg(test)]
fn lower_bound(blocks: &[Block]) -> u64 {
    let ops = blocks.iter().map(|b| b.last as usize + 1).max().unwrap_or(0);
    let mut delta = vec![0i64; ops + 1];
    for b in blocks {
        delta[b.first as usize] += align(b.bytes) as i64;
        delta[b.last as usize + 1] -= align(b.bytes) as i64;
    }
    let mut live = 0i64;
    delta.iter().fold(0, |most, d| {
        live += d;
        most.max(live)
    }) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_that_live_together_do_not_overlap() {
        // A small linear congruential generator: the cases are the same in every run.
        let mut state = 7u64;
        let mut next = |n: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % n
        };
        for _ in 0..50 {
            let blocks: Vec<Block> = (0..60)
                .map(|_| {
                    let first = next(40) as u32;
                    Block { bytes: 1 + next(5000), first, last: first + next(8) as u32 }
                })
                .collect();
            let (offsets, total) = pack(&blocks);
            for i in 0..blocks.len() {
                assert_eq!(offsets[i] % ALIGNMENT, 0);
                assert!(offsets[i] + blocks[i].bytes <= total);
                for j in 0..i {
                    let together = blocks[i].first <= blocks[j].last && blocks[j].first <= blocks[i].last;
                    let apart =
                        offsets[i] + blocks[i].bytes <= offsets[j] || offsets[j] + blocks[j].bytes <= offsets[i];
                    assert!(!together || apart);
                }
            }
            assert!(total >= lower_bound(&blocks));
        }
    }
}
