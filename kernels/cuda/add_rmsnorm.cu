// The residual sum with RMSNorm, the norm again, and its gradients.
//
// add_rmsnorm:         sum = residual + delta; rstd = 1 / sqrt(mean(sum^2) + eps); out = sum * rstd * (weight + offset).
//                      residual, delta, sum, out [T, C], rows of out `row` elements apart (a multiple of 8, or C); weight [C]; rstd f32 [T]. T: tokens, or tokens times heads. `delta` and `sum` are null when nothing
//                      is added. The sum is rounded to elem first, and the rest is computed from the rounded sum, so that
//                      `rescale` gives the same bits.
// rescale:             out = x * rstd * (weight + offset).
// rmsnorm_backward:    dx (+)= rstd * (w * dout - x * scale), w = weight + offset, scale = rstd^2 * mean(w * dout * x).
//                      Grid of these three: T blocks of 256 threads, one for each row.
// rmsnorm_weight_grad: grad += sum over t of dout * x * rstd; grad f32 or bf16 [C].
//                      Grid: ceil(C / 32) blocks of 1024 threads: a lane for each column, warp w adds rows w, w + 32, ...
#include "common.cuh"

#define THREADS 256
#define ROW_WARPS 32

// Pieces of a row: VEC elements where the width is a multiple of VEC, else one.
__device__ __forceinline__ void load_piece(const elem* p, float (&v)[VEC]) { load_vec(p, v); }
__device__ __forceinline__ void load_piece(const elem* p, float (&v)[1]) { v[0] = load(p); }
__device__ __forceinline__ void store_piece(elem* p, const float (&v)[VEC]) { store_vec(p, v); }
__device__ __forceinline__ void store_piece(elem* p, const float (&v)[1]) { store(p, v[0]); }

// One row: out = x * rstd * (weight + offset).
template <int N>
__device__ __forceinline__ void scale_row(elem* out, const elem* x, const elem* weight, float offset, float rstd,
                                          u32 width) {
    for (u32 i = threadIdx.x * N; i < width; i += THREADS * N) {
        float v[N], w[N];
        load_piece(x + i, v);
        load_piece(weight + i, w);
#pragma unroll
        for (int j = 0; j < N; j++) v[j] = v[j] * rstd * (w[j] + offset);
        store_piece(out + i, v);
    }
}

// One row: sum = x + delta; this thread's part of the sum of squares. Without delta: of x.
template <int N>
__device__ __forceinline__ float add_row(elem* sum, const elem* x, const elem* delta, u32 width) {
    float squares = 0.0f;
    for (u32 i = threadIdx.x * N; i < width; i += THREADS * N) {
        float v[N], d[N];
        load_piece(x + i, v);
        if (delta != nullptr) {
            load_piece(delta + i, d);
#pragma unroll
            for (int j = 0; j < N; j++) v[j] = round_elem(v[j] + d[j]);
            store_piece(sum + i, v);
        }
#pragma unroll
        for (int j = 0; j < N; j++) squares += v[j] * v[j];
    }
    return squares;
}

template <int N>
__device__ __forceinline__ void add_norm_row(const elem* x, const elem* delta, elem* sum, const elem* weight,
                                             float offset, elem* out, float* rstd, u32 width, float eps, float* shared) {
    float squares = block_sum(add_row<N>(sum, x, delta, width), shared);
    float r = 1.0f / sqrtf(squares / (float)width + eps);
    if (threadIdx.x == 0) *rstd = r;
    // Each thread reads of the sum what it wrote itself.
    scale_row<N>(out, delta != nullptr ? sum : x, weight, offset, r, width);
}

extern "C" __global__ void __launch_bounds__(THREADS)
add_rmsnorm(const elem* residual, const elem* delta, elem* sum, const elem* weight, elem* out, float* rstd, u32 width,
            float eps, float offset, u32 row) {
    after_previous();
    __shared__ float shared[WARP];
    u64 start = (u64)blockIdx.x * width;
    if (delta != nullptr) {
        delta += start;
        sum += start;
    }
    if (width % VEC == 0) {
        add_norm_row<VEC>(residual + start, delta, sum, weight, offset, out + (u64)blockIdx.x * row, rstd + blockIdx.x, width, eps, shared);
    } else {
        add_norm_row<1>(residual + start, delta, sum, weight, offset, out + (u64)blockIdx.x * row, rstd + blockIdx.x, width, eps, shared);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
rescale(const elem* x, const float* rstd, const elem* weight, elem* out, u32 width, float offset, u32 row) {
    after_previous();
    u64 start = (u64)blockIdx.x * width;
    out += (u64)blockIdx.x * row;
    if (width % VEC == 0) scale_row<VEC>(out, x + start, weight, offset, rstd[blockIdx.x], width);
    else scale_row<1>(out, x + start, weight, offset, rstd[blockIdx.x], width);
}

template <int N>
__device__ __forceinline__ void norm_grad_row(const elem* dout, const elem* x, float rstd, const elem* weight, float offset,
                                              elem* dx, u32 width, bool accumulate, float* shared) {
    float dot = 0.0f;
    for (u32 i = threadIdx.x * N; i < width; i += THREADS * N) {
        float g[N], v[N], w[N];
        load_piece(dout + i, g);
        load_piece(x + i, v);
        load_piece(weight + i, w);
#pragma unroll
        for (int j = 0; j < N; j++) dot += (w[j] + offset) * g[j] * v[j];
    }
    float scale = rstd * rstd * block_sum(dot, shared) / (float)width;
    for (u32 i = threadIdx.x * N; i < width; i += THREADS * N) {
        float g[N], v[N], w[N], d[N];
        load_piece(dout + i, g);
        load_piece(x + i, v);
        load_piece(weight + i, w);
#pragma unroll
        for (int j = 0; j < N; j++) d[j] = 0.0f;
        if (accumulate) load_piece(dx + i, d);
#pragma unroll
        for (int j = 0; j < N; j++) d[j] += rstd * ((w[j] + offset) * g[j] - v[j] * scale);
        store_piece(dx + i, d);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
rmsnorm_backward(const elem* dout, const elem* x, const float* rstd, const elem* weight, elem* dx, u32 width,
                 u32 accumulate, float offset) {
    after_previous();
    __shared__ float shared[WARP];
    u64 start = (u64)blockIdx.x * width;
    float r = rstd[blockIdx.x];
    if (width % VEC == 0) {
        norm_grad_row<VEC>(dout + start, x + start, r, weight, offset, dx + start, width, accumulate, shared);
    } else {
        norm_grad_row<1>(dout + start, x + start, r, weight, offset, dx + start, width, accumulate, shared);
    }
}

extern "C" __global__ void __launch_bounds__(WARP * ROW_WARPS)
rmsnorm_weight_grad(const elem* __restrict__ dout, const elem* __restrict__ x, const float* __restrict__ rstd,
                    void* __restrict__ grad, u32 rows, u32 width, u32 grad_bf16) {
    after_previous();
    // One column more, so that the lanes of a warp meet different banks both ways.
    __shared__ float part[ROW_WARPS][WARP + 1];
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    u32 column = blockIdx.x * WARP + lane;
    float sum = 0.0f;
    if (column < width) {
#pragma unroll 4
        for (u32 t = warp; t < rows; t += ROW_WARPS) {
            u64 at = (u64)t * width + column;
            sum += load(dout + at) * load(x + at) * rstd[t];
        }
    }
    part[warp][lane] = sum;
    __syncthreads();
    // Warp w adds the parts of column w.
    sum = warp_sum(part[lane][warp]);
    column = blockIdx.x * WARP + warp;
    if (lane != 0 || column >= width) return;
    if (grad_bf16) {
        u16* g = (u16*)grad + column;
        *g = f32_to_bf16(bf16_to_f32(*g) + sum);
    } else {
        ((float*)grad)[column] += sum;
    }
}
