// The output projection's rows and loss; the matrix products are elsewhere.
//
// gather_rows:  out[i] = x[index[i]];      x [T, C], index u32 [n], out [n, C].
// scatter_rows: out[index[i]] = x[i];      x [n, C], out [T, C]; no index twice.
//               Grid of both: n blocks of 256 threads.
// token_loss:   losses[i] = log(sum(exp(logits[i]))) - logits[i][label], label = labels[index[i]];
//               dlogits[i] = (softmax(logits[i]) - onehot(label)) * factor, unless `dlogits` is null. With `cap` > 0 the
//               logits become cap * tanh(logit / cap) first, and the gradient goes through that.
//               logits f32 [n, V], labels i32 [T], index u32 [n], losses f64 [n], dlogits elem [n, V], which may be the
//               logits themselves where elem is f32. Grid: n blocks of 512 threads.
// sum_losses:   loss[0] += sum of losses [n], in the order of a fixed tree. Grid: 1 block of 1024 threads.
#include "common.cuh"

#define THREADS 256
#define LOSS_THREADS 512
#define SUM_THREADS 1024

__device__ __forceinline__ void copy_row(elem* to, const elem* from, u32 width) {
    if (width % VEC == 0) {
        for (u32 i = threadIdx.x; i < width / VEC; i += THREADS) ((Words*)to)[i] = ((const Words*)from)[i];
    } else {
        for (u32 i = threadIdx.x; i < width; i += THREADS) to[i] = from[i];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
gather_rows(const elem* x, const u32* index, elem* out, u32 width) {
    after_previous();
    copy_row(out + (u64)blockIdx.x * width, x + (u64)index[blockIdx.x] * width, width);
}

extern "C" __global__ void __launch_bounds__(THREADS)
scatter_rows(const elem* x, const u32* index, elem* out, u32 width) {
    after_previous();
    copy_row(out + (u64)index[blockIdx.x] * width, x + (u64)blockIdx.x * width, width);
}

__device__ __forceinline__ float capped(float x, float cap) { return cap > 0.0f ? cap * tanhf(x / cap) : x; }

// The derivative of `capped` from its value.
__device__ __forceinline__ float slope(float y, float cap) {
    float share = cap > 0.0f ? y / cap : 0.0f;
    return 1.0f - share * share;
}

// Takes x into the running maximum and the sum of exp(. - maximum).
__device__ __forceinline__ void take(float& top, float& sum, float x) {
    if (x > top) {
        sum = sum * expf(top - x) + 1.0f;
        top = x;
    } else {
        // Also where x is NaN: the sum shows it.
        sum += expf(x - top);
    }
}

extern "C" __global__ void __launch_bounds__(LOSS_THREADS)
token_loss(const float* logits, const i32* labels, const u32* index, double* losses, elem* dlogits, u32 vocab,
           float factor, float cap) {
    after_previous();
    __shared__ float shared[WARP];
    u64 start = (u64)blockIdx.x * vocab;
    const float* x = logits + start;
    u32 label = (u32)labels[index[blockIdx.x]];
    // Before anything is written: the gradient may replace the logits.
    float target = capped(x[label], cap);
    // Not -inf, from which nothing can be subtracted.
    float top = -3.0e38f, sum = 0.0f;
    if (vocab % 4 == 0) {
        for (u32 i = threadIdx.x * 4; i < vocab; i += LOSS_THREADS * 4) {
            Words w = *(const Words*)(x + i);
            float a = capped(__uint_as_float(w.w[0]), cap), b = capped(__uint_as_float(w.w[1]), cap);
            float c = capped(__uint_as_float(w.w[2]), cap), d = capped(__uint_as_float(w.w[3]), cap);
            float largest = fmaxf(fmaxf(a, b), fmaxf(c, d));
            if (largest > top) {
                sum *= expf(top - largest);
                top = largest;
            }
            sum += (expf(a - top) + expf(b - top)) + (expf(c - top) + expf(d - top));
        }
    } else {
        for (u32 i = threadIdx.x; i < vocab; i += LOSS_THREADS) take(top, sum, capped(x[i], cap));
    }
    float largest = block_max(top, shared);
    sum = block_sum(sum * expf(top - largest), shared);
    if (threadIdx.x == 0) losses[blockIdx.x] = (double)(logf(sum) + largest - target);
    if (dlogits == nullptr) return;
    elem* dx = dlogits + start;
    float share = factor / sum;
    if (vocab % VEC == 0) {
        for (u32 i = threadIdx.x * VEC; i < vocab; i += LOSS_THREADS * VEC) {
            float v[VEC];
#pragma unroll
            for (int j = 0; j < VEC; j += 4) {
                Words w = *(const Words*)(x + i + j);
#pragma unroll
                for (int l = 0; l < 4; l++) {
                    float y = capped(__uint_as_float(w.w[l]), cap), p = expf(y - largest) * share;
                    v[j + l] = (i + j + l == label ? p - factor : p) * slope(y, cap);
                }
            }
            store_vec(dx + i, v);
        }
    } else {
        for (u32 i = threadIdx.x; i < vocab; i += LOSS_THREADS) {
            float y = capped(x[i], cap), p = expf(y - largest) * share;
            store(dx + i, (i == label ? p - factor : p) * slope(y, cap));
        }
    }
}

extern "C" __global__ void __launch_bounds__(SUM_THREADS) sum_losses(const double* losses, double* loss, u32 n) {
    after_previous();
    __shared__ double shared[WARP];
    double sum = 0.0;
    for (u32 i = threadIdx.x; i < n; i += SUM_THREADS) sum += losses[i];
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) loss[0] += sum;
}
