//! How quantized tensors show themselves.

use super::svg::{Frame, Line, lines};
use super::units::{bytes, count, number};
use super::{Card, Cell, Show, Table, shown};
use crate::nf4::{Absmax, LevelDerivation, Nf4Tensor};

impl Show for Nf4Tensor {
    fn card(&self) -> Card {
        let n = self.numel().max(1) as f64;
        let absmax = match &self.absmax {
            Absmax::F32(v) => format!("{} f32, one per {} elements", count(v.len() as u64), self.blocksize),
            Absmax::Nested { codes, absmax, offset, blocksize } => format!(
                "{} 8-bit codes, one per {} elements; {} f32, one per {blocksize} codes; offset {}",
                count(codes.len() as u64),
                self.blocksize,
                count(absmax.len() as u64),
                number(f64::from(*offset), 4)
            ),
        };
        let before = self.numel() as u64 * self.dtype.size_in_bytes() as u64;
        Card::new(format!("{} tensor {:?}", self.quant_type.as_str().to_uppercase(), self.shape)).facts([
            ("was", format!("{}, {}", self.dtype.as_str(), bytes(before))),
            ("is", bytes(self.bytes())),
            ("per element", format!("{} bits", number(8.0 * self.bytes() as f64 / n, 6))),
            (
                "packed",
                format!("{} bytes, two elements each, the first in the high nibble", count(self.packed.len() as u64)),
            ),
            ("absmax", absmax),
        ])
    }
}

impl Show for LevelDerivation {
    fn card(&self) -> Card {
        let mut t = Table::new()
            .numbers("code", "")
            .numbers("probability", "")
            .numbers("quantile of the normal", "")
            .numbers("level", "")
            .numbers("distance to the next", "");
        for i in 0..16 {
            let next = self.levels.get(i + 1).map_or_else(|| "-".to_owned(), |l| format!("{:.4}", l - self.levels[i]));
            t.row([
                Cell::new(i.to_string()),
                format!("{:.4}", self.probabilities[i]).into(),
                format!("{:.4}", self.quantiles[i]).into(),
                format!("{:.7}", self.levels[i]).into(),
                next.into(),
            ]);
        }
        Card::new("The sixteen levels of NF4")
            .subtitle(format!(
                "quantiles of the normal distribution up to probability {}, divided by the largest",
                self.offset
            ))
            .figure(
                density(self),
                "The normal density and the levels: equal steps of probability are narrow where weights are many.",
                "",
            )
            .table(t)
    }
}

fn density(d: &LevelDerivation) -> String {
    let largest = d.quantiles.iter().copied().fold(0.0, f64::max).max(1e-9);
    let curve: Vec<(f64, f64)> =
        (0..=200).map(|i| f64::from(i) / 100.0 - 1.0).map(|x| (x, (-0.5 * (x * largest).powi(2)).exp())).collect();
    let mut all = vec![Line { width: 20, ..Line::new(curve, 0) }];
    for level in d.levels.map(f64::from) {
        let height = (-0.5 * (level * largest).powi(2)).exp();
        all.push(Line::new(vec![(level, 0.0), (level, height)], 1));
    }
    let frame = Frame::around([-1.05, 1.05], [0.0, 1.0])
        .from_zero()
        .labels("weight / absmax", "density")
        .alt("normal density with the 16 levels of NF4");
    lines(&frame.size(640, 200), &all, &[])
}

shown!(+ Display Nf4Tensor, LevelDerivation);
