// What every kernel file shares. No toolkit headers: NVRTC compiles this at run time on machines that have none.
//
// `elem` is the compute dtype: bf16 kept as its 16 bits, or float with -DELEM_F32 (validation). Arithmetic is f32.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;

#define WARP 32
#define FULL_MASK 0xffffffffu

__device__ __forceinline__ float bf16_to_f32(u16 x) { return __uint_as_float((u32)x << 16); }

// Round to nearest even; NaN stays NaN.
__device__ __forceinline__ u16 f32_to_bf16(float x) {
    u16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

// Two at once: `lo` in the low half.
__device__ __forceinline__ u32 pack_bf16(float lo, float hi) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
    return y;
}

__device__ __forceinline__ float f16_to_f32(u16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

struct __align__(16) Words {
    u32 w[4];
};

// Every kernel begins with it. From compute capability 9.0 on a kernel is launched while the one before it ends (programmatic
// dependent launch), and waits here until that one is done and its writes can be seen. What stands before it may only be what no
// kernel writes.
__device__ __forceinline__ void after_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#ifdef ELEM_F32
typedef float elem;
#define VEC 4
__device__ __forceinline__ float load(const elem* p) { return *p; }
__device__ __forceinline__ void store(elem* p, float x) { *p = x; }
__device__ __forceinline__ void load_vec(const elem* p, float (&v)[VEC]) {
    Words a = *(const Words*)p;
#pragma unroll
    for (int i = 0; i < VEC; i++) v[i] = __uint_as_float(a.w[i]);
}
__device__ __forceinline__ void store_vec(elem* p, const float (&v)[VEC]) {
    Words a;
#pragma unroll
    for (int i = 0; i < VEC; i++) a.w[i] = __float_as_uint(v[i]);
    *(Words*)p = a;
}
__device__ __forceinline__ float round_elem(float x) { return x; }
#else
typedef u16 elem;
#define VEC 8
__device__ __forceinline__ float load(const elem* p) { return bf16_to_f32(*p); }
__device__ __forceinline__ void store(elem* p, float x) { *p = f32_to_bf16(x); }
// 16 bytes, aligned.
__device__ __forceinline__ void load_vec(const elem* p, float (&v)[VEC]) {
    Words a = *(const Words*)p;
#pragma unroll
    for (int i = 0; i < VEC / 2; i++) {
        v[2 * i] = __uint_as_float(a.w[i] << 16);
        v[2 * i + 1] = __uint_as_float(a.w[i] & 0xffff0000u);
    }
}
__device__ __forceinline__ void store_vec(elem* p, const float (&v)[VEC]) {
    Words a;
#pragma unroll
    for (int i = 0; i < VEC / 2; i++) a.w[i] = pack_bf16(v[2 * i], v[2 * i + 1]);
    *(Words*)p = a;
}
// The value that a store and a load would give.
__device__ __forceinline__ float round_elem(float x) { return bf16_to_f32(f32_to_bf16(x)); }
#endif

// Sums in the order of a fixed tree: the same bits every time. Every lane gets the result.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int d = WARP / 2; d > 0; d >>= 1) x += __shfl_xor_sync(FULL_MASK, x, d);
    return x;
}
__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
    for (int d = WARP / 2; d > 0; d >>= 1) x += __shfl_xor_sync(FULL_MASK, x, d);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int d = WARP / 2; d > 0; d >>= 1) x = fmaxf(x, __shfl_xor_sync(FULL_MASK, x, d));
    return x;
}

// `shared`: 32 elements. All threads of a block whose size is a multiple of 32 call it and get the result; it may be
// called again at once.
template <typename T>
__device__ __forceinline__ T block_sum(T x, T* shared) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    x = warp_sum(x);
    __syncthreads();
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? shared[lane] : (T)0);
}
__device__ __forceinline__ float block_max(float x, float* shared) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    x = warp_max(x);
    __syncthreads();
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    return warp_max(lane < warps ? shared[lane] : __int_as_float(0xff800000));
}

// Sums over rows, column by column, in an order that depends on `rows` alone. Called by all threads of blocks of COLUMN_BLOCK, grid
// ceil(width / WARP): lane l of warp w adds f(t, column l of the block) for t = w, w + 32, ..; warp w gets the sum of its column w.
#define COLUMN_WARPS 32
#define COLUMN_BLOCK (WARP * COLUMN_WARPS)
template <typename F>
__device__ __forceinline__ float column_sum(u32 rows, u32 width, F f) {
    // One column more, so that the lanes of a warp meet different banks both ways.
    __shared__ float part[COLUMN_WARPS][WARP + 1];
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, column = blockIdx.x * WARP + lane;
    float sum = 0.0f;
    if (column < width) {
        for (u32 t = warp; t < rows; t += COLUMN_WARPS) sum += f(t, column);
    }
    part[warp][lane] = sum;
    __syncthreads();
    return warp_sum(part[lane][warp]);
}

// Philox4x32-10 (Salmon et al. 2011), as src/engine/dropout.rs.
__device__ __forceinline__ Words philox(u32 c0, u32 c1, u32 c2, u32 c3, u64 key) {
    u32 k0 = (u32)key, k1 = (u32)(key >> 32);
#pragma unroll
    for (int i = 0; i < 10; i++) {
        u32 h0 = __umulhi(c0, 0xD2511F53u), l0 = c0 * 0xD2511F53u;
        u32 h1 = __umulhi(c2, 0xCD9E8D57u), l1 = c2 * 0xCD9E8D57u;
        c0 = h1 ^ c1 ^ k0;
        c1 = l1;
        c2 = h0 ^ c3 ^ k1;
        c3 = l0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    Words out;
    out.w[0] = c0;
    out.w[1] = c1;
    out.w[2] = c2;
    out.w[3] = c3;
    return out;
}

// A point of torch.linspace(0.1, 1, steps + 1), `steps` a power of two: counted from the nearer end, one rounding.
__device__ __forceinline__ float dynamic_edge(u32 j, u32 steps) {
    float step = __fdiv_rn(__fsub_rn(1.0f, 0.1f), (float)steps);
    return j < (steps + 1) / 2 ? __fmaf_rn(step, (float)j, 0.1f) : __fmaf_rn(-step, (float)(steps - j), 1.0f);
}

// The value of a code (0 to 255) of bitsandbytes' dynamic map, bit for bit as src/nf4/dynamic8.rs: seven decades, the
// next one always with twice as many values, zero, and one. The signed map has zero in the middle (127), the unsigned
// one at the start, and twice as many values in a decade.
__device__ __forceinline__ float dynamic_value(u32 code, bool is_signed) {
    u32 zero = is_signed ? 127 : 0;
    if (code == zero) return 0.0f;
    if (code == 255) return 1.0f;
    // Magnitudes in rising order; a decade of 2^k values starts at number 2^k.
    u32 rank = (code < zero ? zero - code : code - zero) + (is_signed ? 0 : 1);
    u32 steps = 1u << (31 - __clz((int)rank));
    u32 j = rank - steps;
    float mean = __fmul_rn(__fadd_rn(dynamic_edge(j, steps), dynamic_edge(j + 1, steps)), 0.5f);
    u32 decade = is_signed ? steps : steps / 2;
    float power = decade == 1    ? 1e-6f
                  : decade == 2  ? 1e-5f
                  : decade == 4  ? 1e-4f
                  : decade == 8  ? 1e-3f
                  : decade == 16 ? 1e-2f
                  : decade == 32 ? 1e-1f
                                 : 1.0f;
    float value = __fmul_rn(power, mean);
    return code < zero ? -value : value;
}

// The number above which a value has a larger code than `code`, from the map's values of `code` and `code + 1`: the
// midpoint, which itself belongs to the even code. Code 255 has none: infinity.
__device__ __forceinline__ float dynamic_threshold(u32 code, float value, float next) {
    if (code == 255) return __int_as_float(0x7f800000);
    float middle = __fmul_rn(__fadd_rn(next, value), 0.5f);
    if (code % 2 == 0) return middle;
    // The next number below; no midpoint is zero.
    int bits = __float_as_int(middle);
    return __int_as_float(bits > 0 ? bits - 1 : bits + 1);
}

// How many of the 256 rising thresholds are less than x: the code of x. NaN: 0.
__device__ __forceinline__ u32 dynamic_encode(const float* thresholds, float x) {
    u32 code = 0;
#pragma unroll
    for (u32 step = 128; step > 0; step >>= 1) code += x > thresholds[code + step - 1] ? step : 0;
    return code;
}

// The sixteen values: NF4, FP4. Bits, so that nothing depends on how a decimal is rounded. In global memory: lanes look up
// different ones, which constant memory would serve one after the other.
__device__ const u32 VALUES[2][16] = {
    {0xbf800000, 0xbf3239b1, 0xbf066b30, 0xbeca32a0, 0xbe91a24d, 0xbe3d353f, 0xbdba7871, 0x00000000, 0x3da2faff,
     0x3e24cae3, 0x3e7c04dd, 0x3ead033a, 0x3ee1a4b8, 0x3f1007ab, 0x3f3913b3, 0x3f800000},
    // 0, 1/192, 2/3, 1, 1/3, 1/2, 1/6, 1/4, then the negative ones; number 8 is +0.
    {0x00000000, 0x3baaaaab, 0x3f2aaaab, 0x3f800000, 0x3eaaaaab, 0x3f000000, 0x3e2aaaab, 0x3e800000, 0x00000000,
     0xbbaaaaab, 0xbf2aaaab, 0xbf800000, 0xbeaaaaab, 0xbf000000, 0xbe2aaaab, 0xbe800000},
};

// y = x, this thread's part of n elements; both aligned to 16 bytes. All threads of the grid call it.
__device__ __forceinline__ void cast_elements(const float* x, elem* y, u32 n) {
    u32 step = gridDim.x * blockDim.x * VEC;
    for (u32 i = (blockIdx.x * blockDim.x + threadIdx.x) * VEC; i < n; i += step) {
        if (i + VEC <= n) {
            float v[VEC];
#pragma unroll
            for (int j = 0; j < VEC; j += 4) {
                Words w = *(const Words*)(x + i + j);
#pragma unroll
                for (int l = 0; l < 4; l++) v[j + l] = __uint_as_float(w.w[l]);
            }
            store_vec(y + i, v);
        } else {
            for (u32 j = i; j < n; j++) store(y + j, x[j]);
        }
    }
}
