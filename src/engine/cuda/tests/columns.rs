//! Copies: exact.

use super::*;
use crate::engine::ops::{JoinColumns, SplitColumns};

#[test]
fn columns_are_split_and_joined() {
    if !gpu() {
        return;
    }
    for t in TOKENS {
        let mut b = Bench::new(t);
        for widths in [[64, 32, 32], [16, 8, 11], [3, 40, 5]] {
            b.part(format!("{widths:?}"));
            let width = widths.iter().sum();
            let x = b.random(t * width);
            let (whole, again) = (b.act("whole", width, &x), b.out("again", width));
            let parts: Vec<TensorId> = widths.map(|n| b.out("part", n)).into();
            b.op(Op::SplitColumns(SplitColumns { whole, parts: parts.clone() }));
            b.op(Op::JoinColumns(JoinColumns { parts: parts.clone(), whole: again }));
            for id in parts.into_iter().chain([again]) {
                b.want(id, 0.0, Plain::Within(0.0));
            }
        }
        b.check();
    }
}
