//! LoRA pairs whose low-rank products lie beside their modules' common input: one product with every A, and all gradients of A and
//! B. Twin of `cpu/lora.rs`; kernels/cuda/lora.cu lays A and B out for the products, lora_dx.cu takes `dx` through dropout.

use candle_core::DType;

use super::CudaOps;
use super::gpu::{Arg, Launch};
use super::matmul::Matrix;
use super::nf4::ScaledB;
use super::scratch::{LoraScratch, STACKED, has_dx_kernel};
use crate::Result;
use crate::engine::dropout;
use crate::engine::ops::{AdaptedModule, Lora, LoraA, LoraBackward, Scratch, Weight, low_rank_columns};

/// Matrices of a launch, at most: MATRICES of the kernel file.
const MATRICES: usize = 64;

/// B beside a matrix: what `lora_columns` writes. Addresses are device addresses.
pub(super) struct Columns {
    b: u64,
    out: u64,
    n: usize,
    r: usize,
    from: usize,
    first: usize,
    row: usize,
    scaling: f32,
}

impl CudaOps {
    /// B as columns of a matrix, from `first` on.
    pub(super) fn scaled_b(&self, lora: &Lora, first: usize) -> ScaledB {
        ScaledB { b: self.ptr(lora.b), r: lora.r, first, scaling: lora.scaling }
    }

    pub(super) fn low_rank(&mut self, op: &LoraA, scratch: Scratch) -> Result<()> {
        if !self.state.adapter {
            return Ok(());
        }
        let (t, k, e) = (self.tokens, op.in_features, self.dtype);
        let x = Matrix::new(self.ptr(op.x), e, self.width(op.x));
        if t == 1 && !self.state.training {
            for m in &op.adapters {
                let spare = ((low_rank_columns(m.lora.r) - m.lora.r) * e.size_in_bytes()) as u64;
                self.gpu.fill(x.columns(m.first + m.lora.r).ptr, 0, spare)?;
            }
            let adapters: Vec<_> = op.adapters.iter().map(|m| (&m.lora, x.columns(m.first).ptr)).collect();
            self.low_rank_one(k, x.ptr, &adapters)?;
            return self.keep_low_rank(op);
        }
        let base = self.at(scratch);
        let space = LoraScratch::forward(op, self.region(op.x).shape[0], e.size_in_bytes());
        let loras: Vec<Lora> = op.adapters.iter().map(|m| m.lora).collect();
        let a = Matrix::new(base + space.a, e, k);
        self.stack(&loras, k, a.ptr)?;
        if loras.iter().any(|lora| self.drops(lora)) {
            self.low_rank_of_dropped(op, x, a, base + space.dropped)?;
        } else {
            // Columns follow each other as the rows of A do.
            let first = op.adapters.first().map_or(k, |m| m.first);
            self.matmul(x.columns(first), x, a.t(), (t, space.columns, k), 1.0, 0.0)?;
        }
        self.keep_low_rank(op)
    }

    fn keep_low_rank(&self, op: &LoraA) -> Result<()> {
        match (op.kept, op.adapters.first()) {
            (Some(kept), Some(first)) => self.copy_columns((op.x, first.first), (kept, 0), self.width(kept)),
            _ => Ok(()),
        }
    }

    /// A product for each module, from its own dropped input: in `space` where none is kept.
    fn low_rank_of_dropped(&mut self, op: &LoraA, x: Matrix, a: Matrix, space: u64) -> Result<()> {
        let (t, k, e) = (self.tokens, op.in_features, self.dtype);
        let mut row = 0;
        for (i, m) in op.adapters.iter().enumerate() {
            let columns = low_rank_columns(m.lora.r);
            let dropped = match op.dropped.get(i).filter(|_| self.drops(&m.lora)) {
                Some(kept) => {
                    let (input, mask) = (self.ptr(kept.input), self.ptr(kept.mask));
                    self.dropout_kept(&m.lora, (x.ptr, x.row), input, t * k, k, mask)?;
                    Matrix::new(input, e, k)
                }
                None => self.dropped(&m.lora, x, k, space)?,
            };
            self.matmul(x.columns(m.first), dropped, a.rows(row).t(), (t, columns, k), 1.0, 0.0)?;
            row += columns;
        }
        Ok(())
    }

    pub(super) fn low_rank_grads(&mut self, op: &LoraBackward, scratch: Scratch) -> Result<()> {
        let (t, k, e) = (self.tokens, op.in_features, self.dtype);
        let base = self.at(scratch);
        let space = LoraScratch::backward(op, self.region(op.x).shape[0], e.size_in_bytes());
        let x = Matrix::new(self.ptr(op.x), e, self.width(op.x));
        let a = Matrix::new(base + space.a, e, k);
        let all_dxa = Matrix::new(base + space.dxa, e, space.columns);
        let kept = op.xa.map(|xa| Matrix::new(self.ptr(xa), e, space.columns));
        let loras: Vec<Lora> = op.modules.iter().filter_map(|m| m.linear.lora).collect();
        let drops = loras.iter().any(|lora| self.drops(lora));
        self.stack(&loras, k, a.ptr)?;
        let dx = op.dx.map(|dx| Matrix::new(self.ptr(dx), e, k));
        let grad_a = if drops { None } else { self.one_gradient(&loras, k) };
        let together = grad_a.is_some();
        let in_one_kernel = dx.is_some() && drops && has_dx_kernel(op, e.size_in_bytes());
        let mut row = 0;
        for (m, lora) in op.modules.iter().zip(&loras) {
            let (n, r, columns) = (m.linear.out_features, lora.r, low_rank_columns(lora.r));
            let dy = Matrix::new(self.ptr(m.dy), e, n);
            let dxa = all_dxa.columns(row);
            // dxa = scaling * dy B
            let b = self.scaled_columns(m, lora, base + space.b)?;
            self.matmul(dxa, dy, b, (t, columns, n), 1.0, 0.0)?;
            if let Some((grad_a, grad_b)) = lora.grads {
                let (grad_a, grad_b) =
                    (Matrix::new(self.ptr(grad_a), DType::F32, k), Matrix::new(self.ptr(grad_b), DType::F32, r));
                let xa = kept.map_or(x.columns(m.first), |kept| kept.columns(row));
                self.matmul(grad_b, dy.t(), xa, (n, r, t), lora.scaling, 1.0)?;
                if !together {
                    let x = match m.dropped.filter(|_| self.drops(lora)) {
                        Some(kept) => Matrix::new(self.ptr(kept.input), e, k),
                        None => self.dropped(lora, x, k, base + space.dropped)?,
                    };
                    self.matmul(grad_a, dxa.t(), x, (r, k, t), 1.0, 1.0)?;
                }
            }
            if let (Some(dx), true) = (dx, drops && !in_one_kernel) {
                self.through_dropout(lora, (dx, dxa, a.rows(row)), row > 0, columns, base + space.dropped)?;
            }
            row += columns;
        }
        if let Some(grad_a) = grad_a {
            self.matmul(grad_a, all_dxa.t(), x, (space.columns, k, t), 1.0, 1.0)?;
        }
        match dx {
            Some(dx) if in_one_kernel => self.dx_through_dropout(op, &loras, dx, all_dxa, a),
            Some(dx) if !drops => self.matmul(dx, all_dxa, a, (t, k, space.columns), 1.0, 0.0),
            _ => Ok(()),
        }
    }

    /// The gradients of every A as one matrix, where they lie one after the other and no column of `dxa` is spare.
    fn one_gradient(&self, loras: &[Lora], k: usize) -> Option<Matrix> {
        let grads: Vec<u64> = loras.iter().map(|lora| Some(self.ptr(lora.grads?.0))).collect::<Option<_>>()?;
        let follows = |i: usize| grads[i + 1] == grads[i] + (loras[i].r * k * size_of::<f32>()) as u64;
        let dense = loras.iter().all(|lora| low_rank_columns(lora.r) == lora.r);
        let ptr = *grads.first()?;
        (dense && (0..grads.len() - 1).all(follows)).then(|| Matrix::new(ptr, DType::F32, k))
    }

    /// `dx = sum of dropout'(dxa A)` of modules whose masks were kept.
    fn dx_through_dropout(&self, op: &LoraBackward, loras: &[Lora], dx: Matrix, dxa: Matrix, a: Matrix) -> Result<()> {
        let (t, k) = (self.tokens, op.in_features);
        let mut args = vec![Arg::Ptr(dx.ptr), Arg::U32(t as u32), Arg::U32(k as u32), Arg::U32(dxa.row as u32)];
        let mut first = 0;
        for i in 0..STACKED {
            let (columns, mask, keep) = match (loras.get(i), op.modules.get(i).and_then(|m| m.dropped)) {
                (Some(lora), Some(kept)) => {
                    (low_rank_columns(lora.r), self.ptr(kept.mask), dropout::threshold(lora.dropout).1)
                }
                _ => (0, 0, 0.0),
            };
            let [dxa, a] = [dxa.columns(first).ptr, a.rows(first).ptr].map(Arg::Ptr);
            args.extend([dxa, a, Arg::Ptr(mask), Arg::F32(keep), Arg::U32(columns as u32)]);
            first += columns;
        }
        let how = Launch { grid: [(k / 128) as u32, t.div_ceil(64) as u32, 1], block: 128, shared: 0 };
        self.gpu.launch("lora_dx", "lora_dx", how, &args)
    }

    /// `dx (+)= dropout'(dxa A)`; `space` has room for what `dropout'` takes.
    pub(super) fn through_dropout(
        &mut self,
        lora: &Lora,
        (dx, dxa, a): (Matrix, Matrix, Matrix),
        accumulate: bool,
        columns: usize,
        space: u64,
    ) -> Result<()> {
        let (t, k) = (self.tokens, a.row);
        if !accumulate {
            self.matmul(dx, dxa, a, (t, k, columns), 1.0, 0.0)?;
            return if self.drops(lora) { self.dropout(lora, dx.ptr, dx.ptr, t * k) } else { Ok(()) };
        }
        if !self.drops(lora) {
            return self.matmul(dx, dxa, a, (t, k, columns), 1.0, 1.0);
        }
        let through = Matrix::new(space, self.dtype, k);
        self.matmul(through, dxa, a, (t, k, columns), 1.0, 0.0)?;
        self.dropout_add(lora, dx.ptr, through.ptr, t * k)
    }

    /// `scaling * B`, `[out, columns]`: beside a decoded weight, else made in `space`.
    fn scaled_columns(&self, m: &AdaptedModule, lora: &Lora, space: u64) -> Result<Matrix> {
        let (n, k) = (m.linear.out_features, m.linear.in_features);
        if let Weight::Dense { w } = m.linear.weight
            && self.width(w) > k
        {
            return Ok(Matrix::new(self.ptr(w), self.dtype, self.width(w)).columns(m.first));
        }
        let columns = low_rank_columns(lora.r);
        self.write_columns(&[self.columns_of_b(lora, space, n, (0, 0, columns))])?;
        Ok(Matrix::new(space, self.dtype, columns))
    }

    /// `scaling * B` in the columns of the matrix at `out` from `first` on, zeros in those from `from` on before them; `n` rows, `row`
    /// elements apart.
    pub(super) fn columns_of_b(
        &self,
        lora: &Lora,
        out: u64,
        n: usize,
        (from, first, row): (usize, usize, usize),
    ) -> Columns {
        Columns { b: self.ptr(lora.b), out, n, r: lora.r, from, first, row, scaling: lora.scaling }
    }

    /// Writes the columns that wait, many matrices a launch.
    pub(super) fn launch_columns(&mut self) -> Result<()> {
        std::mem::take(&mut self.columns).chunks(MATRICES).try_for_each(|some| self.write_columns(some))
    }

    /// At most [`MATRICES`] of them.
    fn write_columns(&self, some: &[Columns]) -> Result<()> {
        let mut table = Vec::with_capacity(MATRICES * 40);
        let mut work = 0;
        for m in some {
            [m.b, m.out].iter().for_each(|p| table.extend_from_slice(&p.to_ne_bytes()));
            for x in [m.n, m.r, m.from, m.first, m.row] {
                table.extend_from_slice(&(x as u32).to_ne_bytes());
            }
            table.extend_from_slice(&m.scaling.to_ne_bytes());
            work = work.max(m.n * (m.first + low_rank_columns(m.r) - m.from));
        }
        table.resize(MATRICES * 40, 0);
        let how = self.elements(work);
        let how = Launch { grid: [how.grid[0], some.len() as u32, 1], ..how };
        self.gpu.launch_with("lora", "lora_columns", how, &table, &[])
    }

    /// A of every pair, one below the other, in the compute dtype at `out`.
    fn stack(&self, loras: &[Lora], k: usize, out: u64) -> Result<()> {
        let (mut pointers, mut firsts, mut ranks) = ([0; STACKED], [0; STACKED], [0; STACKED]);
        let mut row = 0;
        for (i, lora) in loras.iter().enumerate() {
            (pointers[i], firsts[i], ranks[i]) = (self.ptr(lora.a), row, lora.r);
            row += low_rank_columns(lora.r);
        }
        let numbers = |all: [usize; STACKED]| all.map(|n| Arg::U32(n as u32));
        let shape = [Arg::Ptr(out), Arg::U32(row as u32), Arg::U32(k as u32)];
        let args = [pointers.map(Arg::Ptr), numbers(firsts), numbers(ranks), shape].concat();
        self.gpu.launch("lora", "lora_stack", self.elements(row * k), &args)
    }

    /// The first `k` columns of `x` with dropout applied, in `space` where there is any.
    pub(super) fn dropped(&self, lora: &Lora, x: Matrix, k: usize, space: u64) -> Result<Matrix> {
        if !self.drops(lora) {
            return Ok(x);
        }
        self.dropout_rows(lora, (x.ptr, x.row), space, self.tokens * k, k)?;
        Ok(Matrix::new(space, self.dtype, k))
    }
}
