// Rows of the embedding table, and their gradient.
//
// embedding:          out[t] = scale * table[tokens[t]]; table [V, C], tokens u32 [T], out [T, C].
//                     Grid: T blocks of 256 threads, one for each row.
// embedding_backward: grad[tokens[t]] += scale * dout[t]; dout [T, C], grad f32 or bf16 [V, C].
//                     Grid: (T, ceil(C / 2048)) blocks of 256 threads. The block at the first occurrence of a token owns
//                     the token's row of `grad` and adds all occurrences to it in the order of t; the others have nothing
//                     to do. Sums are kept in f32 and rounded once.
#include "common.cuh"

#define THREADS 256
#define PER_THREAD 8

extern "C" __global__ void __launch_bounds__(THREADS)
embedding(const elem* __restrict__ table, const u32* __restrict__ tokens, elem* __restrict__ out, u32 width,
          float scale) {
    after_previous();
    const elem* from = table + (u64)tokens[blockIdx.x] * width;
    elem* to = out + (u64)blockIdx.x * width;
    if (scale != 1.0f) {
        for (u32 i = threadIdx.x; i < width; i += THREADS) store(to + i, scale * load(from + i));
    } else if (width % VEC == 0) {
        const Words* a = (const Words*)from;
        Words* b = (Words*)to;
        for (u32 i = threadIdx.x; i < width / VEC; i += THREADS) b[i] = a[i];
    } else {
        for (u32 i = threadIdx.x; i < width; i += THREADS) to[i] = from[i];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
embedding_backward(const u32* __restrict__ tokens, const elem* __restrict__ dout, void* __restrict__ grad, u32 rows,
                   u32 width, u32 grad_bf16, float scale) {
    after_previous();
    __shared__ u32 matches[THREADS / WARP];
    u32 first = blockIdx.x, token = tokens[first];
    bool seen = false;
    for (u32 t = threadIdx.x; t < first && !seen; t += THREADS) seen = tokens[t] == token;
    if (__syncthreads_or(seen)) return;

    u32 column = blockIdx.y * THREADS * PER_THREAD + threadIdx.x;
    u64 row = (u64)token * width;
    float sum[PER_THREAD];
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
        u32 c = column + i * THREADS;
        sum[i] = 0.0f;
        if (c < width) sum[i] = grad_bf16 ? bf16_to_f32(((const u16*)grad)[row + c]) : ((const float*)grad)[row + c];
    }
    for (u32 start = first; start < rows; start += THREADS) {
        u32 t = start + threadIdx.x;
        u32 bits = __ballot_sync(FULL_MASK, t < rows && tokens[t] == token);
        if (threadIdx.x % WARP == 0) matches[threadIdx.x / WARP] = bits;
        __syncthreads();
        for (u32 w = 0; w < THREADS / WARP; w++) {
            for (u32 left = matches[w]; left != 0; left &= left - 1) {
                u64 at = (u64)(start + w * WARP + __ffs(left) - 1) * width;
#pragma unroll
                for (int i = 0; i < PER_THREAD; i++) {
                    u32 c = column + i * THREADS;
                    if (c < width) sum[i] += scale * load(dout + at + c);
                }
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
        u32 c = column + i * THREADS;
        if (c >= width) continue;
        if (grad_bf16) ((u16*)grad)[row + c] = f32_to_bf16(sum[i]);
        else ((float*)grad)[row + c] = sum[i];
    }
}
