// The matrices of LoRA pairs as the products take them.
//
// lora_stack:   A of up to three modules one below the other, elem [rows, k]; k is a multiple of 8. A_i, f32 [r_i, k], begins at row
//               first_i; rows in between are 0.
// lora_columns: scaled B as columns of a matrix, see low_rank.cuh, for up to MATRICES of them: row i of the grid has matrix i. A table of
//               them is its first argument (src/engine/cuda/lora.rs fills it).
// Grid: any number of blocks of 256 threads.
#include "common.cuh"
#include "low_rank.cuh"

#define THREADS 256
#define MATRICES 64

extern "C" __global__ void __launch_bounds__(THREADS)
lora_stack(const float* a0, const float* a1, const float* a2, u32 first0, u32 first1, u32 first2, u32 r0, u32 r1, u32 r2,
           elem* out, u32 rows, u32 k) {
    after_previous();
    u32 pieces = k / 8;
    for (u32 i = blockIdx.x * THREADS + threadIdx.x; i < rows * pieces; i += gridDim.x * THREADS) {
        u32 row = i / pieces, c = i % pieces * 8;
        // Above first_i the difference wraps around: beyond r_i.
        const float* a = row - first0 < r0   ? a0 + (u64)(row - first0) * k
                         : row - first1 < r1 ? a1 + (u64)(row - first1) * k
                         : row - first2 < r2 ? a2 + (u64)(row - first2) * k
                                             : nullptr;
#pragma unroll
        for (int part = 0; part < 8; part += VEC) {
            float v[VEC];
#pragma unroll
            for (int j = 0; j < VEC; j++) v[j] = a != nullptr ? a[c + part + j] : 0.0f;
            store_vec(out + (u64)i * 8 + part, v);
        }
    }
}

// The arguments of `beside`.
struct Columns {
    const float* b;
    elem* out;
    u32 n, r, from, first, row;
    float scale;
};
struct Table {
    Columns items[MATRICES];
};

extern "C" __global__ void __launch_bounds__(THREADS) lora_columns(const __grid_constant__ Table table) {
    after_previous();
    const Columns& m = table.items[blockIdx.y];
    beside(m.b, m.out, m.n, m.r, m.from, m.first, m.row, m.scale);
}
