// What a linear module does beside its matrix products, element by element over n elements.
//
// cast_to_elem: y = x for two arrays; x f32, y elem.
// dropout:      y = keep * x where the mask is set, else 0; in place allowed (y = x). Rows of x, [n / width, width], are `row`
//               elements apart (row = width unless width is a multiple of 8).
// dropout_kept: the same where width is a multiple of 8, and bits, u8 [n / 8], bit i % 8 of byte i / 8: the mask.
// dropout_add:  y += keep * x where the mask is set.
// add_bias:     y[t] += b; y [T, out], b [out]; n = T * out.
// bias_grad:    grad += sum over t of dy[t]; dy [T, out], grad f32 or bf16 [out]. Grid: ceil(out / 32) blocks of 1024
//               threads: a lane for each column, warp w adds rows w, w + 32, ...
// The mask of element i of the flat [T, in]: half i % 8 of the words of Philox(i / 8, module, micro_step; seed), the lower one of each
// first, >= threshold, as in src/engine/dropout.rs.
// Grid of the others: any number of blocks of 256 threads; each thread takes VEC elements at a time.
#include "common.cuh"

#define THREADS 256

// Factors of the elements i .. i + VEC; i is a multiple of VEC.
__device__ __forceinline__ void mask(float (&m)[VEC], u64 i, u32 threshold, float keep, u64 seed, u64 micro_step,
                                     u32 module) {
    Words r = philox((u32)(i / 8), module, (u32)micro_step, (u32)(micro_step >> 32), seed);
    // Four floats are the first or the second half of eight.
    bool second = VEC == 4 && i / 4 % 2 == 1;
#pragma unroll
    for (int j = 0; j < VEC; j++) {
        u32 word = second ? r.w[(j / 2 + 2) % 4] : r.w[j / 2];
        m[j] = (j % 2 == 0 ? word & 0xffffu : word >> 16) >= threshold ? keep : 0.0f;
    }
}

// What is dropped is 0, also where x is not finite.
__device__ __forceinline__ float masked(float x, float m) { return m == 0.0f ? 0.0f : x * m; }

extern "C" __global__ void __launch_bounds__(THREADS)
cast_to_elem(const float* x0, elem* y0, u32 n0, const float* x1, elem* y1, u32 n1) {
    after_previous();
    cast_elements(x0, y0, n0);
    cast_elements(x1, y1, n1);
}

extern "C" __global__ void __launch_bounds__(THREADS)
dropout(const elem* x, elem* y, u64 n, u32 threshold, float keep, u64 seed, u64 micro_step, u32 module, u32 width,
        u32 row) {
    after_previous();
    u64 step = (u64)gridDim.x * THREADS * VEC;
    for (u64 i = ((u64)blockIdx.x * THREADS + threadIdx.x) * VEC; i < n; i += step) {
        float m[VEC], v[VEC];
        mask(m, i, threshold, keep, seed, micro_step, module);
        if (i + VEC <= n) {
            load_vec(row == width ? x + i : x + i + (u64)((u32)(i / VEC) / (width / VEC)) * (row - width), v);
#pragma unroll
            for (int j = 0; j < VEC; j++) v[j] = masked(v[j], m[j]);
            store_vec(y + i, v);
        } else {
#pragma unroll
            for (int j = 0; j < VEC; j++) {
                if (i + j < n) store(y + i + j, masked(load(x + i + j), m[j]));
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
dropout_kept(const elem* x, elem* y, u64 n, u32 threshold, float keep, u64 seed, u64 micro_step, u32 module, u32 width, u32 row,
             u8* bits) {
    after_previous();
    u64 step = (u64)gridDim.x * THREADS * 8;
    for (u64 i = ((u64)blockIdx.x * THREADS + threadIdx.x) * 8; i < n; i += step) {
        const elem* from = x + i + (u64)((u32)(i / 8) / (width / 8)) * (row - width);
        u32 byte = 0;
#pragma unroll
        for (int part = 0; part < 8; part += VEC) {
            float m[VEC], v[VEC];
            mask(m, i + part, threshold, keep, seed, micro_step, module);
            load_vec(from + part, v);
#pragma unroll
            for (int j = 0; j < VEC; j++) {
                v[j] = masked(v[j], m[j]);
                byte |= (m[j] == 0.0f ? 0u : 1u) << (part + j);
            }
            store_vec(y + i + part, v);
        }
        bits[i / 8] = (u8)byte;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
dropout_add(elem* y, const elem* x, u64 n, u32 threshold, float keep, u64 seed, u64 micro_step, u32 module) {
    after_previous();
    u64 step = (u64)gridDim.x * THREADS * VEC;
    for (u64 i = ((u64)blockIdx.x * THREADS + threadIdx.x) * VEC; i < n; i += step) {
        float m[VEC], v[VEC], sum[VEC];
        mask(m, i, threshold, keep, seed, micro_step, module);
        if (i + VEC <= n) {
            load_vec(x + i, v);
            load_vec(y + i, sum);
#pragma unroll
            for (int j = 0; j < VEC; j++) sum[j] += masked(v[j], m[j]);
            store_vec(y + i, sum);
        } else {
#pragma unroll
            for (int j = 0; j < VEC; j++) {
                if (i + j < n) store(y + i + j, load(y + i + j) + masked(load(x + i + j), m[j]));
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) add_bias(elem* y, const elem* b, u64 n, u32 width) {
    after_previous();
    u64 step = (u64)gridDim.x * THREADS * VEC;
    for (u64 i = ((u64)blockIdx.x * THREADS + threadIdx.x) * VEC; i < n; i += step) {
        if (width % VEC == 0) {
            float v[VEC], w[VEC];
            load_vec(y + i, v);
            load_vec(b + i % width, w);
#pragma unroll
            for (int j = 0; j < VEC; j++) v[j] += w[j];
            store_vec(y + i, v);
        } else {
            for (u64 j = i; j < n && j < i + VEC; j++) store(y + j, load(y + j) + load(b + j % width));
        }
    }
}

extern "C" __global__ void __launch_bounds__(COLUMN_BLOCK)
bias_grad(const elem* __restrict__ dy, void* __restrict__ grad, u32 rows, u32 width, u32 grad_bf16) {
    after_previous();
    float sum = column_sum(rows, width, [=](u32 t, u32 c) { return load(dy + (u64)t * width + c); });
    u32 column = blockIdx.x * WARP + threadIdx.x / WARP;
    if (threadIdx.x % WARP != 0 || column >= width) return;
    if (grad_bf16) {
        u16* g = (u16*)grad + column;
        *g = f32_to_bf16(bf16_to_f32(*g) + sum);
    } else {
        ((float*)grad)[column] += sum;
    }
}
