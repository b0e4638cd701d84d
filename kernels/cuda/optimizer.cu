// The gradient norm and AdamW: the arithmetic of src/engine/optimizer, operation by operation, so the same bits.
//
// Parameters P and gradients G are f32 or bf16, moments f32, bf16 (computed in f32, rounded when stored) or 8-bit codes
// with an f32 scale per 256. Every pointer is aligned to 16 bytes. `norm`: f64 [2], the second is the clip factor.
// Names end in the dtypes of P, G and, for 32-bit state, of the moments, where these are not all f32.
//
// A launch takes many tensors: a table of them is its first argument (src/engine/cuda/optimizer.rs fills it).
//
// sum_of_squares_{f32,bf16}: 1024 threads, as many thread blocks as partial sums.
// grad_norm_finish:          one thread block of 1024.
// zero:                      256 threads, any grid.
// adamw*, adamw_32bit_bnb*:  256 threads, any grid; units of 1024 elements.
// adamw_8bit*:               256 threads, any grid; units of 2048 elements, a warp per 256.
#include "common.cuh"

// -------------------------------------------------------------------------------------------------- four at a time

struct __align__(8) Halves {
    u16 h[4];
};

__device__ __forceinline__ void load4(const float* p, float (&v)[4]) {
    Words a = *(const Words*)p;
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = __uint_as_float(a.w[i]);
}
__device__ __forceinline__ void load4(const u16* p, float (&v)[4]) {
    Halves a = *(const Halves*)p;
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = bf16_to_f32(a.h[i]);
}
__device__ __forceinline__ void store4(float* p, const float (&v)[4]) {
    Words a;
#pragma unroll
    for (int i = 0; i < 4; i++) a.w[i] = __float_as_uint(v[i]);
    *(Words*)p = a;
}
__device__ __forceinline__ void store4(u16* p, const float (&v)[4]) {
    Halves a;
#pragma unroll
    for (int i = 0; i < 4; i++) a.h[i] = f32_to_bf16(v[i]);
    *(Halves*)p = a;
}
__device__ __forceinline__ float load1(const float* p) { return *p; }
__device__ __forceinline__ float load1(const u16* p) { return bf16_to_f32(*p); }
__device__ __forceinline__ void store1(float* p, float x) { *p = x; }
__device__ __forceinline__ void store1(u16* p, float x) { *p = f32_to_bf16(x); }

// `count` elements, 4 at most; the rest is zero.
template <typename T>
__device__ __forceinline__ void load_some(const T* p, float (&v)[4], u32 count) {
    if (count == 4) return load4(p, v);
#pragma unroll
    for (u32 i = 0; i < 4; i++) v[i] = i < count ? load1(p + i) : 0.0f;
}
template <typename T>
__device__ __forceinline__ void store_some(T* p, const float (&v)[4], u32 count) {
    if (count == 4) return store4(p, v);
#pragma unroll
    for (u32 i = 0; i < 4; i++)
        if (i < count) store1(p + i, v[i]);
}

// ---------------------------------------------------------------------------------------------------------- tables

#define MANY_ARRAYS 128
#define MANY_UPDATES 48

// Arrays, and the number of the first thread block or unit of work of each.
struct Arrays {
    void* start[MANY_ARRAYS];
    u64 n[MANY_ARRAYS];
    u32 first[MANY_ARRAYS];
    u32 count, units;
};

// One parameter [n] with its gradient and state; see ADAMW and ADAMW_8BIT.
struct Update {
    void *p, *copy, *g, *s1, *s2, *absmax1, *absmax2;
    u64 n;
    float decay;
    u32 pad;
};
struct Updates {
    Update items[MANY_UPDATES];
    u32 first[MANY_UPDATES];
    u32 count, units;
};

// The last one that does not start after `unit`.
__device__ __forceinline__ u32 find(const u32* first, u32 count, u32 unit) {
    u32 low = 0;
    while (count > 1) {
        u32 half = count / 2;
        if (first[low + half] <= unit) low += half;
        count -= half;
    }
    return low;
}

// Bytes to zero; addresses are aligned to 16, units are of 16 KiB.
extern "C" __global__ void __launch_bounds__(256) zero(const __grid_constant__ Arrays arrays) {
    after_previous();
    const u32 unit_bytes = 1 << 14;
    for (u32 unit = blockIdx.x; unit < arrays.units; unit += gridDim.x) {
        u32 i = find(arrays.first, arrays.count, unit);
        u8* start = (u8*)arrays.start[i];
        u64 from = (u64)(unit - arrays.first[i]) * unit_bytes, end = arrays.n[i];
        if (end > from + unit_bytes) end = from + unit_bytes;
        for (u64 at = from + threadIdx.x * 16; at < end; at += 256 * 16) {
            if (at + 16 <= end) {
                Words nothing = {{0, 0, 0, 0}};
                *(Words*)(start + at) = nothing;
            } else {
                for (u64 b = at; b < end; b++) start[b] = 0;
            }
        }
    }
}

// ------------------------------------------------------------------------------------------------------------ norm

// partials[block] = its share of the sum of squares of its array. A square of an f32 is exact in f64; the order of the
// sums depends on the array's size and its number of blocks alone.
template <typename T>
__device__ __forceinline__ void sum_of_squares(const Arrays& arrays, double* partials) {
    __shared__ double shared[32];
    u32 a = find(arrays.first, arrays.count, blockIdx.x);
    u32 first = arrays.first[a], blocks = (a + 1 < arrays.count ? arrays.first[a + 1] : gridDim.x) - first;
    const T* g = (const T*)arrays.start[a];
    u64 n = arrays.n[a], stride = (u64)blocks * 1024 * 4;
    double sums[4] = {0.0, 0.0, 0.0, 0.0};
    for (u64 e = ((u64)(blockIdx.x - first) * 1024 + threadIdx.x) * 4; e < n; e += stride) {
        float v[4];
        load_some(g + e, v, n - e < 4 ? (u32)(n - e) : 4);
#pragma unroll
        for (int i = 0; i < 4; i++) sums[i] = __fma_rn((double)v[i], (double)v[i], sums[i]);
    }
    double sum = block_sum((sums[0] + sums[1]) + (sums[2] + sums[3]), shared);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(1024) sum_of_squares_f32(const __grid_constant__ Arrays arrays,
                                                                      double* partials) {
    after_previous();
    sum_of_squares<float>(arrays, partials);
}
extern "C" __global__ void __launch_bounds__(1024) sum_of_squares_bf16(const __grid_constant__ Arrays arrays,
                                                                       double* partials) {
    after_previous();
    sum_of_squares<u16>(arrays, partials);
}

// norm[0] = root of the sum of partials [count]; norm[1] = the factor that brings it to `limit` (0: no limit), as
// torch.nn.utils.clip_grad_norm_.
extern "C" __global__ void __launch_bounds__(1024) grad_norm_finish(const double* partials, u32 count, double limit,
                                                                    double* norm) {
    after_previous();
    __shared__ double shared[32];
    double sum = 0.0;
    for (u32 i = threadIdx.x; i < count; i += 1024) sum += partials[i];
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) {
        double root = __dsqrt_rn(sum);
        double clip = 1.0;
        if (limit > 0.0) {
            double factor = __ddiv_rn(limit, root + 1e-6);
            clip = factor < 1.0 ? factor : 1.0;
        }
        norm[0] = root;
        norm[1] = clip;
    }
}

// ---------------------------------------------------------------------------------------------------- 32-bit state

// torch.optim.AdamW.
struct Torch {
    float decay, one_minus_beta1, beta2, one_minus_beta2, step_size, root_correction2, eps;

    __device__ __forceinline__ void step(float& p, float g, float& m, float& v) const {
        m = __fadd_rn(m, __fmul_rn(one_minus_beta1, __fsub_rn(g, m)));
        v = __fadd_rn(__fmul_rn(v, beta2), __fmul_rn(__fmul_rn(one_minus_beta2, g), g));
        float root = __fadd_rn(__fdiv_rn(__fsqrt_rn(v), root_correction2), eps);
        p = __fsub_rn(__fmul_rn(p, decay), __fdiv_rn(__fmul_rn(step_size, m), root));
    }
};

// bitsandbytes' AdamW: the decay comes after the step.
struct Bnb {
    float beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, eps, decay;

    __device__ __forceinline__ void moments(float g, float& m, float& v) const {
        m = __fadd_rn(__fmul_rn(m, beta1), __fmul_rn(one_minus_beta1, g));
        v = __fadd_rn(__fmul_rn(v, beta2), __fmul_rn(__fmul_rn(one_minus_beta2, g), g));
    }
    __device__ __forceinline__ float update(float p, float m, float v) const {
        float quotient = __fdiv_rn(m, __fadd_rn(__fsqrt_rn(v), eps));
        return __fmul_rn(__fadd_rn(p, __fmul_rn(step_size, quotient)), decay);
    }
    __device__ __forceinline__ void step(float& p, float g, float& m, float& v) const {
        moments(g, m, v);
        p = update(p, m, v);
    }
};

template <typename P, typename G, typename S, typename Rule>
__device__ __forceinline__ void adamw_elements(const Updates& updates, const double* norm, Rule rule) {
    float scale = __double2float_rn(norm[1]);
    for (u32 unit = blockIdx.x; unit < updates.units; unit += gridDim.x) {
        u32 item = find(updates.first, updates.count, unit);
        const Update& u = updates.items[item];
        rule.decay = u.decay;
        u64 e = (u64)(unit - updates.first[item]) * 1024 + threadIdx.x * 4;
        if (e >= u.n) continue;
        u32 count = u.n - e < 4 ? (u32)(u.n - e) : 4;
        P* p = (P*)u.p + e;
        S *m = (S*)u.s1 + e, *v = (S*)u.s2 + e;
        float pv[4], gv[4], mv[4], vv[4];
        load_some(p, pv, count);
        load_some((const G*)u.g + e, gv, count);
        load_some(m, mv, count);
        load_some(v, vv, count);
#pragma unroll
        for (int i = 0; i < 4; i++) rule.step(pv[i], __fmul_rn(gv[i], scale), mv[i], vv[i]);
        store_some(p, pv, count);
        store_some(m, mv, count);
        store_some(v, vv, count);
        if (u.copy) store_some((u16*)u.copy + e, pv, count);
    }
}

// p, g, s1 (exp_avg), s2 (exp_avg_sq): [n]; copy: bf16 [n], p rounded, or null.
#define ADAMW(NAME, P, G, S)                                                                                    \
    extern "C" __global__ void __launch_bounds__(256)                                                           \
        adamw##NAME(const __grid_constant__ Updates updates, const double* norm, float one_minus_beta1,         \
                    float beta2, float one_minus_beta2, float step_size, float root_correction2, float eps) {   \
        after_previous();                                                                                       \
        Torch rule = {1.0f, one_minus_beta1, beta2, one_minus_beta2, step_size, root_correction2, eps};         \
        adamw_elements<P, G, S>(updates, norm, rule);                                                           \
    }                                                                                                           \
    extern "C" __global__ void __launch_bounds__(256)                                                           \
        adamw_32bit_bnb##NAME(const __grid_constant__ Updates updates, const double* norm, float beta1,         \
                              float one_minus_beta1, float beta2, float one_minus_beta2, float step_size,       \
                              float eps) {                                                                      \
        after_previous();                                                                                       \
        Bnb rule = {beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, eps, 1.0f};                      \
        adamw_elements<P, G, S>(updates, norm, rule);                                                           \
    }
ADAMW(, float, float, float)
ADAMW(_f32_bf16_f32, float, u16, float)
ADAMW(_bf16_bf16_bf16, u16, u16, u16)

// ----------------------------------------------------------------------------------------------------- 8-bit state

#define STATE_BLOCKSIZE 256

__device__ __forceinline__ bool finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

// `count` codes, 4 at most, in the bytes of a word; the rest is zero.
__device__ __forceinline__ u32 load_codes(const u8* p, u32 count) {
    if (count == 4) return *(const u32*)p;
    u32 codes = 0;
#pragma unroll
    for (u32 i = 0; i < 4; i++)
        if (i < count) codes |= (u32)p[i] << (8 * i);
    return codes;
}
__device__ __forceinline__ void store_codes(u8* p, u32 codes, u32 count) {
    if (count == 4) {
        *(u32*)p = codes;
        return;
    }
#pragma unroll
    for (u32 i = 0; i < 4; i++)
        if (i < count) p[i] = (u8)(codes >> (8 * i));
}

// Both dynamic maps, the signed one first, and the thresholds between their values.
struct Maps {
    float values[2][256];
    float thresholds[2][256];

    __device__ __forceinline__ void fill() {
        u32 code = threadIdx.x;
        for (int k = 0; k < 2; k++) values[k][code] = dynamic_value(code, k == 0);
        __syncthreads();
        for (int k = 0; k < 2; k++)
            thresholds[k][code] = dynamic_threshold(code, values[k][code], values[k][code < 255 ? code + 1 : 255]);
        __syncthreads();
    }
};

template <typename P, typename G>
__device__ __forceinline__ void adamw_blocks(const Updates& updates, const double* norm, Bnb rule) {
    __shared__ Maps maps;
    maps.fill();
    float scale = __double2float_rn(norm[1]);
    u32 lane = threadIdx.x % WARP;
    for (u32 unit = blockIdx.x; unit < updates.units; unit += gridDim.x) {
        u32 item = find(updates.first, updates.count, unit);
        const Update& u = updates.items[item];
        P* p = (P*)u.p;
        u16* copy = (u16*)u.copy;
        const G* g = (const G*)u.g;
        u8 *s1 = (u8*)u.s1, *s2 = (u8*)u.s2;
        float *absmax1 = (float*)u.absmax1, *absmax2 = (float*)u.absmax2;
        u64 n = u.n, b = (u64)(unit - updates.first[item]) * 8 + threadIdx.x / WARP;
        rule.decay = u.decay;
        if (b * STATE_BLOCKSIZE >= n) continue;
        // Each lane has two times four elements, 128 apart.
        u64 at[2];
        u32 count[2], codes1[2], codes2[2];
        float pv[2][4], gv[2][4];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            at[h] = b * STATE_BLOCKSIZE + 128 * h + 4 * lane;
            count[h] = at[h] >= n ? 0 : n - at[h] < 4 ? (u32)(n - at[h]) : 4;
            load_some(p + at[h], pv[h], count[h]);
            load_some(g + at[h], gv[h], count[h]);
            codes1[h] = load_codes(s1 + at[h], count[h]);
            codes2[h] = load_codes(s2 + at[h], count[h]);
        }
        float old1 = absmax1[b], old2 = absmax2[b];
        float m[2][4], v[2][4];
        float new1 = 0.0f, new2 = 0.0f;
#pragma unroll
        for (int h = 0; h < 2; h++) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                m[h][i] = __fmul_rn(maps.values[0][codes1[h] >> (8 * i) & 0xff], old1);
                v[h][i] = __fmul_rn(maps.values[1][codes2[h] >> (8 * i) & 0xff], old2);
                float grad = __fmul_rn(gv[h][i], scale);
                rule.moments(grad, m[h][i], v[h][i]);
                if (finite(grad)) {
                    pv[h][i] = rule.update(pv[h][i], m[h][i], v[h][i]);
                } else {
                    m[h][i] = 0.0f;
                    v[h][i] = 0.0f;
                }
                if (i < count[h]) {
                    new1 = fmaxf(new1, fabsf(m[h][i]));
                    new2 = fmaxf(new2, fabsf(v[h][i]));
                }
            }
        }
        new1 = warp_max(new1);
        new2 = warp_max(new2);
        // Every lane has read the old scales before the shuffles.
        if (lane == 0) {
            absmax1[b] = new1;
            absmax2[b] = new2;
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            u32 out1 = 0, out2 = 0;
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                u32 code = dynamic_encode(maps.thresholds[0], __fdiv_rn(m[h][i], new1));
                // A code never has the other sign than its moment: that would turn the update around.
                bool negative = __float_as_uint(m[h][i]) >> 31;
                if ((code < 127) != negative) code += m[h][i] > 0.0f ? 1 : 0xff;
                out1 |= (code & 0xff) << (8 * i);
                out2 |= dynamic_encode(maps.thresholds[1], __fdiv_rn(v[h][i], new2)) << (8 * i);
            }
            store_some(p + at[h], pv[h], count[h]);
            if (copy) store_some(copy + at[h], pv[h], count[h]);
            store_codes(s1 + at[h], out1, count[h]);
            store_codes(s2 + at[h], out2, count[h]);
        }
    }
}

// p, g: [n]; copy: bf16 [n], p rounded, or null; s1, s2: u8 [n], codes of the signed and the unsigned map; absmax1,
// absmax2: f32 [ceil(n / 256)].
#define ADAMW_8BIT(NAME, P, G)                                                                                \
    extern "C" __global__ void __launch_bounds__(256)                                                         \
        adamw_8bit##NAME(const __grid_constant__ Updates updates, const double* norm, float beta1,            \
                         float one_minus_beta1, float beta2, float one_minus_beta2, float step_size,          \
                         float eps) {                                                                         \
        after_previous();                                                                                     \
        Bnb rule = {beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, eps, 1.0f};                    \
        adamw_blocks<P, G>(updates, norm, rule);                                                              \
    }
ADAMW_8BIT(, float, float)
ADAMW_8BIT(_f32_bf16, float, u16)
ADAMW_8BIT(_bf16_bf16, u16, u16)
