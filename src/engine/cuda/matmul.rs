//! Matrix products by cuBLASLt: operands bf16 or f32, sums in f32, workspace inside the arena.
//!
//! The algorithm is the library's first suggestion for the shape, never timed: the same shape gives the same bits.

use std::collections::HashMap;
use std::ffi::c_void;

use candle_core::DType;
use cudarc::cublaslt::{result, sys};

use super::gpu::Gpu;
use crate::{Error, Result};

/// A row-major matrix in device memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Matrix {
    pub ptr: u64,
    pub dtype: DType,
    /// Elements of a stored row.
    pub row: usize,
    /// Read as its transpose.
    pub transposed: bool,
}

impl Matrix {
    pub fn new(ptr: u64, dtype: DType, row: usize) -> Self {
        Matrix { ptr, dtype, row, transposed: false }
    }

    /// The transpose.
    pub fn t(self) -> Self {
        Matrix { transposed: !self.transposed, ..self }
    }

    /// The columns from `first` on.
    pub fn columns(self, first: usize) -> Self {
        debug_assert!(!self.transposed);
        Matrix { ptr: self.ptr + (first * self.dtype.size_in_bytes()) as u64, ..self }
    }

    /// The rows from `first` on.
    pub fn rows(self, first: usize) -> Self {
        debug_assert!(!self.transposed);
        Matrix { ptr: self.ptr + (first * self.row * self.dtype.size_in_bytes()) as u64, ..self }
    }

    /// What the library may assume of the address, in bytes.
    fn alignment(&self) -> u32 {
        1 << self.ptr.trailing_zeros().min(8)
    }
}

/// Everything that the choice of an algorithm depends on.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    m: usize,
    n: usize,
    k: usize,
    dtypes: [DType; 2],
    rows: [usize; 3],
    transposed: [bool; 2],
    alignment: [u32; 3],
}

/// Descriptors of a shape and the algorithm chosen for it.
struct Prepared {
    desc: sys::cublasLtMatmulDesc_t,
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    algo: sys::cublasLtMatmulAlgo_t,
}

/// The library's handle, its workspace, and what it chose so far.
pub(super) struct Products {
    handle: sys::cublasLtHandle_t,
    workspace: (u64, usize),
    prepared: HashMap<Shape, Prepared>,
}

// SAFETY: the handle may be used from any thread, one at a time: `&mut self`.
unsafe impl Send for Products {}

fn failed(what: &str, e: result::CublasError) -> Error {
    Error::new("a matrix product failed on the GPU").at(format!("cuBLASLt, {what}")).found(e.to_string())
}

impl Products {
    /// `workspace`: address and bytes.
    ///
    /// # Errors
    /// What the library says.
    pub fn new(workspace: (u64, usize)) -> Result<Self> {
        let handle = result::create_handle().map_err(|e| failed("cublasLtCreate", e))?;
        Ok(Products { handle, workspace, prepared: HashMap::new() })
    }

    /// `c[m, n] = alpha a[m, k] b[k, n] + beta c`.
    ///
    /// # Errors
    /// A shape that the library cannot compute.
    #[allow(clippy::too_many_arguments)]
    pub fn matmul(
        &mut self,
        gpu: &Gpu,
        c: Matrix,
        a: Matrix,
        b: Matrix,
        (m, n, k): (usize, usize, usize),
        alpha: f32,
        beta: f32,
    ) -> Result<()> {
        debug_assert!(a.dtype == b.dtype && !c.transposed);
        let shape = Shape {
            m,
            n,
            k,
            dtypes: [a.dtype, c.dtype],
            rows: [a.row, b.row, c.row],
            transposed: [a.transposed, b.transposed],
            alignment: [a.alignment(), b.alignment(), c.alignment()],
        };
        if !self.prepared.contains_key(&shape) {
            let prepared = prepare(self.handle, &shape, self.workspace.1)?;
            self.prepared.insert(shape, prepared);
        }
        let p = &self.prepared[&shape];
        // Column-major: c^T = b^T a^T.
        let [lb, la, lc] = p.layouts;
        // SAFETY: addresses and sizes are those of the plan's regions.
        unsafe {
            result::matmul(
                self.handle,
                p.desc,
                std::ptr::from_ref(&alpha).cast(),
                std::ptr::from_ref(&beta).cast(),
                b.ptr as *const c_void,
                lb,
                a.ptr as *const c_void,
                la,
                c.ptr as *const c_void,
                lc,
                c.ptr as *mut c_void,
                lc,
                &p.algo,
                self.workspace.0 as *mut c_void,
                self.workspace.1,
                gpu.stream.cast(),
            )
        }
        .map_err(|e| failed(&format!("m {m}, n {n}, k {k}, {:?} -> {:?}", a.dtype, c.dtype), e))
    }
}

fn data_type(dtype: DType) -> sys::cudaDataType {
    match dtype {
        DType::F32 => sys::cudaDataType::CUDA_R_32F,
        _ => sys::cudaDataType::CUDA_R_16BF,
    }
}

fn prepare(handle: sys::cublasLtHandle_t, s: &Shape, workspace: usize) -> Result<Prepared> {
    let fail = |what: &'static str| move |e| failed(what, e);
    let desc = result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType::CUDA_R_32F)
        .map_err(fail("cublasLtMatmulDescCreate"))?;
    // The first operand of the library is b, the second a, each stored row by row: columns, in its eyes.
    for (attribute, transposed) in [
        (sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA, s.transposed[1]),
        (sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSB, s.transposed[0]),
    ] {
        // CUBLAS_OP_N, CUBLAS_OP_T.
        let op = i32::from(transposed);
        // SAFETY: an i32 attribute.
        unsafe { result::set_matmul_desc_attribute(desc, attribute, std::ptr::from_ref(&op).cast(), size_of::<i32>()) }
            .map_err(fail("cublasLtMatmulDescSetAttribute"))?;
    }
    let layout = |dtype: DType, rows: usize, columns: usize, row: usize| {
        result::create_matrix_layout(data_type(dtype), rows as u64, columns as u64, row as i64)
            .map_err(fail("cublasLtMatrixLayoutCreate"))
    };
    let (b_rows, b_columns) = if s.transposed[1] { (s.k, s.n) } else { (s.n, s.k) };
    let (a_rows, a_columns) = if s.transposed[0] { (s.m, s.k) } else { (s.k, s.m) };
    let layouts = [
        layout(s.dtypes[0], b_rows, b_columns, s.rows[1])?,
        layout(s.dtypes[0], a_rows, a_columns, s.rows[0])?,
        layout(s.dtypes[1], s.n, s.m, s.rows[2])?,
    ];
    let preference = result::create_matmul_pref().map_err(fail("cublasLtMatmulPreferenceCreate"))?;
    use sys::cublasLtMatmulPreferenceAttributes_t as P;
    let set = |attribute: P, value: *const c_void, size: usize| {
        // SAFETY: `value` points to an attribute of `size` bytes.
        unsafe { result::set_matmul_pref_attribute(preference, attribute, value, size) }
            .map_err(fail("cublasLtMatmulPreferenceSetAttribute"))
    };
    set(P::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, std::ptr::from_ref(&workspace).cast(), size_of::<usize>())?;
    for (attribute, bytes) in [
        (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, s.alignment[1]),
        (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, s.alignment[0]),
        (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, s.alignment[2]),
        (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, s.alignment[2]),
    ] {
        set(attribute, std::ptr::from_ref(&bytes).cast(), size_of::<u32>())?;
    }
    let [lb, la, lc] = layouts;
    // SAFETY: descriptors made above.
    let found = unsafe { result::get_matmul_algo_heuristic(handle, desc, lb, la, lc, lc, preference) };
    // SAFETY: made above, not used again.
    let _ = unsafe { result::destroy_matmul_pref(preference) };
    let found =
        found.map_err(|e| failed(&format!("no algorithm for m {}, n {}, k {}, {:?}", s.m, s.n, s.k, s.dtypes), e))?;
    Ok(Prepared { desc, layouts, algo: found.algo })
}

impl Drop for Products {
    fn drop(&mut self) {
        // SAFETY: made by this value; nothing uses them afterwards.
        unsafe {
            for p in self.prepared.values() {
                for layout in p.layouts {
                    let _ = result::destroy_matrix_layout(layout);
                }
                let _ = result::destroy_matmul_desc(p.desc);
            }
            let _ = result::destroy_handle(self.handle);
        }
    }
}
