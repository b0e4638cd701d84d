// Rotary position embedding, half-split form (arXiv 2104.09864), in place.
//
// rotary: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) for the halves x1, x2 of each head, angle = position * inv_freq.
//         q [T, H, D], k [T, K, D], positions u32 [T], inv_freq f32 [D / 2]; `sign` is -1 for the inverse, else 1;
//         sine and cosine are multiplied by `scale`.
//         Grid: T blocks of 256 threads, one for each token; shared: D floats (cosines, then sines).
#include "common.cuh"

#define THREADS 256

extern "C" __global__ void __launch_bounds__(THREADS)
rotary(elem* q, elem* k, const u32* positions, const float* inv_freq, u32 q_heads, u32 k_heads, u32 dim, float sign,
       float scale) {
    after_previous();
    extern __shared__ float table[];
    u32 half = dim / 2;
    float* cosines = table;
    float* sines = table + half;
    float position = (float)positions[blockIdx.x];
    for (u32 i = threadIdx.x; i < half; i += THREADS) {
        float s, c;
        sincosf(__fmul_rn(position, inv_freq[i]), &s, &c);
        cosines[i] = c * scale;
        sines[i] = s * sign * scale;
    }
    __syncthreads();
    q += (u64)blockIdx.x * q_heads * dim;
    k += (u64)blockIdx.x * k_heads * dim;
    u32 q_pairs = q_heads * half, pairs = q_pairs + k_heads * half;
    if (half % VEC == 0) {
        for (u32 n = threadIdx.x * VEC; n < pairs; n += THREADS * VEC) {
            u32 i = n % half;
            elem* x = n < q_pairs ? q + 2 * (n - i) + i : k + 2 * (n - q_pairs - i) + i;
            float a[VEC], b[VEC];
            load_vec(x, a);
            load_vec(x + half, b);
#pragma unroll
            for (int j = 0; j < VEC; j++) {
                float c = cosines[i + j], s = sines[i + j], u = a[j], v = b[j];
                a[j] = u * c - v * s;
                b[j] = v * c + u * s;
            }
            store_vec(x, a);
            store_vec(x + half, b);
        }
    } else {
        for (u32 n = threadIdx.x; n < pairs; n += THREADS) {
            u32 i = n % half;
            elem* x = n < q_pairs ? q + 2 * (n - i) + i : k + 2 * (n - q_pairs - i) + i;
            float c = cosines[i], s = sines[i], u = load(x), v = load(x + half);
            store(x, u * c - v * s);
            store(x + half, v * c + u * s);
        }
    }
}
