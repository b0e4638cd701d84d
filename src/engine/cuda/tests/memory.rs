//! Pages of optimizer state, and zeros: bytes, exactly.

use super::*;
use crate::engine::ops::{PageIn, PageOut, Zero};

#[test]
fn pages_and_zeros() {
    if !gpu() {
        return;
    }
    let mut b = Bench::new(1);
    for n in [1, 5, 256, 100_003] {
        b.part(format!("{n} elements"));
        let values: Vec<u8> = (0..n).map(|i| (i * 7 % 251) as u8).collect();
        let (host, window) = (b.bytes("host", DType::U8, &[n], &values), b.bytes("window", DType::U8, &[n], &[0u8; 0]));
        let back = b.bytes("host again", DType::U8, &[n], &[0u8; 0]);
        let numbers = b.random(n);
        let (some, elems) = (b.f32s("f32", &[n], &numbers), b.elems("elem", &[n], &numbers));
        b.on_host(host);
        b.on_host(back);
        b.op(Op::PageIn(PageIn { host, window }));
        b.op(Op::PageOut(PageOut { window, host: back }));
        b.op(Op::Zero(Zero { tensors: vec![some, elems] }));
        for id in [window, back, some, elems] {
            b.fields[id.index()].used = n;
            b.want(id, 0.0, Plain::Within(0.0));
        }
    }
    b.check();
}
