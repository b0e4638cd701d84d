// What DoRA (arXiv 2402.09353) does beside a linear module's matrix products: y = m / |W + P| (W x + P x), P = scaling * B A, row
// by row of the weight; the lengths are constants to the gradient, as in PEFT.
//
// inverse_lengths: inverse[o] = 1 / |w[o] + p[o]|; w [out, in] with rows `row` elements apart, p [out, in], inverse f32 [out];
//                  0 for a row of zeros, which has no direction. Grid: ceil(out / 8) blocks of 256 threads, a warp for each row.
// scale:           y[t, o] = x[t, o] * m[o] * inverse[o] over n = T * out elements; m, inverse f32 [out]; y may be x.
//                  Grid: any number of blocks of 256 threads.
// magnitude_grad:  grad[o] += inverse[o] * sum over t of dy[t, o] z[t, o]; dy, z [T, out], grad f32 [out].
//                  Grid: ceil(out / 32) blocks of 1024 threads: a lane for each column, warp w adds rows w, w + 32, ...
#include "common.cuh"

#define THREADS 256

extern "C" __global__ void __launch_bounds__(THREADS)
inverse_lengths(const elem* __restrict__ w, u32 row, const elem* __restrict__ p, float* __restrict__ inverse, u32 rows,
                u32 width) {
    after_previous();
    u32 lane = threadIdx.x % WARP, o = blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP;
    if (o >= rows) return;
    const elem *from = w + (u64)o * row, *more = p + (u64)o * width;
    float sum = 0.0f;
    for (u32 i = lane; i < width; i += WARP) {
        float v = load(from + i) + load(more + i);
        sum += v * v;
    }
    sum = warp_sum(sum);
    if (lane == 0) inverse[o] = sum > 0.0f ? 1.0f / sqrtf(sum) : 0.0f;
}

extern "C" __global__ void __launch_bounds__(THREADS)
scale(const elem* x, elem* y, const float* __restrict__ m, const float* __restrict__ inverse, u64 n, u32 width) {
    after_previous();
    u64 step = (u64)gridDim.x * THREADS * VEC;
    for (u64 i = ((u64)blockIdx.x * THREADS + threadIdx.x) * VEC; i < n; i += step) {
        u32 o = (u32)(i % width);
        if (width % VEC == 0) {
            float v[VEC];
            load_vec(x + i, v);
#pragma unroll
            for (int j = 0; j < VEC; j++) v[j] *= m[o + j] * inverse[o + j];
            store_vec(y + i, v);
        } else {
            for (u64 j = i; j < n && j < i + VEC; j++) {
                store(y + j, load(x + j) * (m[j % width] * inverse[j % width]));
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(COLUMN_BLOCK)
magnitude_grad(const elem* __restrict__ dy, const elem* __restrict__ z, const float* __restrict__ inverse,
               float* __restrict__ grad, u32 rows, u32 width) {
    after_previous();
    float sum = column_sum(rows, width, [=](u32 t, u32 c) {
        u64 i = (u64)t * width + c;
        return load(dy + i) * load(z + i);
    });
    u32 column = blockIdx.x * WARP + threadIdx.x / WARP;
    if (threadIdx.x % WARP == 0 && column < width) grad[column] += inverse[column] * sum;
}
