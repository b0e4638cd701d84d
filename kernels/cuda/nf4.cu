// 4-bit block quantization (NF4, FP4), nested scales, and back: bit for bit as src/nf4.
//
// A tensor is one flat list of n elements in blocks of `blocksize` (a power of two from 32 to 4096; the last one may be
// short). packed: u8 [ceil(n / 2)], the first element in the high nibble; absmax: f32 [ceil(n / blocksize)], or nested:
// u8 codes [ceil(n / blocksize)], f32 scales [ceil(codes / nested_blocksize)] and one f32 offset.
//
// nf4_quantize_{f32,bf16,f16}: 256 threads, any grid; 8 elements a thread.
// nf4_absmax_mean:             256 threads, at most MEAN_BLOCKS thread blocks.
// nf4_absmax_nest:             256 threads per nested block, any grid.
// nf4_dequantize[_nested]:     256 threads, ceil(n / 4096) thread blocks or more; `out` and `packed` aligned to 16 bytes; n below 2^34. On the
//                              way the scaled B of a LoRA pair is laid beside the rows: a launch less.
#include "common.cuh"
#include "dynamic_map.cuh"
#include "low_rank.cuh"

#define FP4 1u

// -------------------------------------------------------------------------------------------------------- quantize

// Denormals count as zero of the same sign.
__device__ __forceinline__ float flush(float x) {
    u32 bits = __float_as_uint(x);
    return __uint_as_float((bits & 0x7fffffffu) < 0x00800000u ? bits & 0x80000000u : bits);
}

// The same for numbers that come from memory, in one instruction.
__device__ __forceinline__ float flush_input(float x) {
    float y;
    asm("mul.rn.ftz.f32 %0, %1, 0f3F800000;" : "=f"(y) : "f"(x));
    return y;
}

struct Bf16 {
    u16 bits;
};
struct F16 {
    u16 bits;
};
__device__ __forceinline__ float read_f32(const float* p) { return *p; }
__device__ __forceinline__ float read_f32(const Bf16* p) { return bf16_to_f32(p->bits); }
__device__ __forceinline__ float read_f32(const F16* p) { return f16_to_f32(p->bits); }

// 16-byte loads.
__device__ __forceinline__ void read8(const float* p, float (&v)[8]) {
    Words a = ((const Words*)p)[0], b = ((const Words*)p)[1];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        v[i] = __uint_as_float(a.w[i]);
        v[4 + i] = __uint_as_float(b.w[i]);
    }
}
__device__ __forceinline__ void read8(const Bf16* p, float (&v)[8]) {
    Words a = *(const Words*)p;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        v[2 * i] = __uint_as_float(a.w[i] << 16);
        v[2 * i + 1] = __uint_as_float(a.w[i] & 0xffff0000u);
    }
}
__device__ __forceinline__ void read8(const F16* p, float (&v)[8]) {
    Words a = *(const Words*)p;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        v[2 * i] = f16_to_f32((u16)a.w[i]);
        v[2 * i + 1] = f16_to_f32((u16)(a.w[i] >> 16));
    }
}

// Elements e to e + 8 of x [n]; zeros past the end.
template <typename T>
__device__ __forceinline__ void read_input(const T* x, u64 e, u64 n, bool aligned, float (&v)[8]) {
    if (aligned && e + 8 <= n) {
        read8(x + e, v);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = e + i < n ? read_f32(x + e + i) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = flush_input(v[i]);
}

// A number from -1 to 1 times 15.5, rounded down, is one of 32 cells from -16 to 15, so narrow that each holds one
// threshold at most: the code is that of the cell, plus one above the threshold. Index: the cell modulo 32. Two tables of
// 32 words each: no two lanes of a warp meet in a bank.
struct Cells {
    float threshold[32];
    u32 code[32];
};

// The byte offset of s's cell in a table.
__device__ __forceinline__ u32 cell_of(float s) {
    // Quarters of a cell, added to 1.5 * 2^23, whose last bit counts ones, rounding down.
    return __float_as_uint(__fmaf_rd(s, 62.0f, 12582912.0f)) & 0x7cu;
}

__device__ __forceinline__ void make_cell(Cells& cells, u32 index) {
    const u32 thresholds[15] = {0xbf591cd9, 0xbf1c5270, 0xbeeb8480, 0xbeadea76, 0xbe703cec,
                                0xbe0d38bc, 0xbd3a7871, 0x3d22faff, 0x3df64863, 0x3e5067e0,
                                0x3e9582d4, 0x3ec753f9, 0x3f006d03, 0x3f248daf, 0x3f5c89d9};
    float threshold = __int_as_float(0x7f800000);
    u32 code = 0;
    // In the order of the numbers: -16 first.
    u32 rank = (index + 16) & 31;
#pragma unroll
    for (int i = 0; i < 15; i++) {
        float t = __uint_as_float(thresholds[i]);
        u32 at = (cell_of(t) / 4 + 16) & 31;
        if (at < rank) code++;
        if (at == rank) threshold = t;
    }
    cells.threshold[index] = threshold;
    cells.code[index] = code;
}

// How many thresholds are less than s, a number of magnitude 1 at most up to rounding.
__device__ __forceinline__ u32 encode_nf4(const Cells& cells, float s) {
    u32 at = cell_of(s);
    float threshold = *(const float*)((const char*)cells.threshold + at);
    return *(const u32*)((const char*)cells.code + at) + (s > threshold ? 1 : 0);
}

__device__ __forceinline__ u32 encode_fp4(float s) {
    const float thresholds[7] = {0.00260417f, 0.0859375f, 0.20833333f, 0.29166667f, 0.4166667f, 0.583333f, 0.8333333f};
    u32 magnitude = 0;
#pragma unroll
    for (int i = 0; i < 7; i++) magnitude += fabsf(s) > thresholds[i] ? 1 : 0;
    // The bits of the magnitudes in rising order: 0 1 6 7 4 5 2 3, a nibble each.
    return ((0x32547610u >> (4 * magnitude)) & 7u) | (s < 0.0f ? 8u : 0u);
}

// `lanes` neighbouring threads (a power of two, 32 at most) have a block, 8 elements each at a time.
template <typename T>
__device__ __forceinline__ void quantize(const T* src, u64 n, u32 blocksize, u32 quant_type, u8* packed,
                                         float* absmax) {
    __shared__ Cells cells;
    if (threadIdx.x < 32) make_cell(cells, threadIdx.x);
    __syncthreads();
    u32 lanes = blocksize < 8 * WARP ? blocksize / 8 : WARP;
    u32 rounds = blocksize / (8 * lanes), per_warp = WARP / lanes;
    u32 lane = threadIdx.x % WARP, part = lane % lanes;
    u32 blocks = (u32)((n + blocksize - 1) / blocksize), step = gridDim.x * (256 / WARP) * per_warp;
    bool aligned = (u64)src % 16 == 0;
    for (u32 first = (blockIdx.x * (256 / WARP) + threadIdx.x / WARP) * per_warp; first < blocks; first += step) {
        u32 b = first + lane / lanes;
        u64 start = (u64)b * blocksize + part * 8;
        float v[8];
        // The largest by its bits: NaN is larger than all else.
        u32 largest = 0;
        for (u32 r = 0; r < rounds; r++) {
            read_input(src, start + r * lanes * 8, n, aligned, v);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                u32 magnitude = __float_as_uint(v[i]) & 0x7fffffffu;
                largest = magnitude > largest ? magnitude : largest;
            }
        }
        for (u32 d = lanes / 2; d > 0; d >>= 1) {
            u32 other = __shfl_xor_sync(FULL_MASK, largest, d);
            largest = other > largest ? other : largest;
        }
        if (part == 0 && b < blocks) absmax[b] = __uint_as_float(largest);
        // Multiplied by the reciprocal, not divided: some codes differ. In an all-zero block 0 * inf is NaN: code 0.
        float reciprocal = __fdiv_rn(1.0f, __uint_as_float(largest));
        for (u32 r = 0; r < rounds; r++) {
            u64 e = start + r * lanes * 8;
            if (rounds > 1) read_input(src, e, n, aligned, v);
            u32 word = 0;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                float s = __fmul_rn(v[i], reciprocal);
                u32 code = quant_type == FP4 ? encode_fp4(s) : encode_nf4(cells, s);
                word |= code << (8 * (i / 2) + (i % 2 == 0 ? 4 : 0));
            }
            if (largest == 0) word = 0;
            if (e + 8 <= n) {
                *(u32*)(packed + e / 2) = word;
            } else {
                for (u64 j = e; j < n; j += 2) packed[j / 2] = (u8)(word >> (4 * (u32)(j - e)));
            }
        }
    }
}

// src: [n], a tensor or the part of it that starts at some block; packed: u8 [ceil(n / 2)], aligned to 4 bytes; absmax:
// f32 [blocks], NaN or infinite where an element is.
#define QUANTIZE(NAME, T)                                                                                      \
    extern "C" __global__ void __launch_bounds__(256) NAME(const T* src, u64 n, u32 blocksize, u32 quant_type, \
                                                           u8* packed, float* absmax) {                        \
        after_previous();                                                                                      \
        quantize(src, n, blocksize, quant_type, packed, absmax);                                               \
    }
QUANTIZE(nf4_quantize_f32, float)
QUANTIZE(nf4_quantize_bf16, Bf16)
QUANTIZE(nf4_quantize_f16, F16)

// ---------------------------------------------------------------------------------------------------------- nested

#define MEAN_TILE 2048
#define MEAN_BLOCKS 64

// What the thread blocks of nf4_absmax_mean hand to the last of them, which leaves `mean_done` at zero.
__device__ double mean_sums[MEAN_BLOCKS];
__device__ int mean_units[MEAN_BLOCKS];
__device__ u32 mean_done;

// The exponent of the lowest bit that is set in x, which is positive; of zero, a large one.
__device__ __forceinline__ int unit_exponent(float x) {
    u32 bits = __float_as_uint(x) & 0x7fffffffu, exponent = bits >> 23;
    u32 mantissa = (bits & 0x7fffffu) | (exponent > 0 ? 0x800000u : 0u);
    return bits == 0 ? 200 : (int)(exponent > 0 ? exponent : 1) - 150 + (__ffs((int)mantissa) - 1);
}

__device__ __forceinline__ int block_min(int x, int* shared) {
    for (int d = WARP / 2; d > 0; d >>= 1) x = min(x, __shfl_xor_sync(FULL_MASK, x, d));
    __syncthreads();
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = x;
    __syncthreads();
    for (u32 w = 0; w < blockDim.x / WARP; w++) x = min(x, shared[w]);
    return x;
}

// The mean as src/nf4/quantize.rs defines it: eight sums in f64, sum k of the elements 8 i + k in the order of i, then
// these in order. Eight lanes add while all threads fetch.
__device__ double sum_in_order(const float* absmax, u32 n) {
    __shared__ double tiles[2][MEAN_TILE];
    double sum = 0.0;
    for (u32 tile = 0; (u64)tile * MEAN_TILE < n; tile++) {
        // Zeros past the end change no sum.
        for (u32 i = threadIdx.x; i < MEAN_TILE; i += 256) {
            u64 at = (u64)tile * MEAN_TILE + i;
            tiles[tile % 2][i] = at < n ? (double)absmax[at] : 0.0;
        }
        __syncthreads();
        if (threadIdx.x < 8) {
            const double* column = &tiles[tile % 2][threadIdx.x];
#pragma unroll 16
            for (u32 i = 0; i < MEAN_TILE / 8; i++) sum = __dadd_rn(sum, column[8 * i]);
        }
    }
    double total = 0.0;
    if (threadIdx.x < WARP)
        for (int k = 0; k < 8; k++) total = __dadd_rn(total, __shfl_sync(FULL_MASK, sum, k));
    return total;
}

// offset[0] = mean of absmax [n]. All numbers are multiples of their smallest unit; while the sum stays below 2^53 units
// every sum is exact in f64, and then the order does not matter. So it nearly always is: otherwise it is kept.
extern "C" __global__ void __launch_bounds__(256) nf4_absmax_mean(const float* absmax, u32 n, float* offset) {
    after_previous();
    __shared__ double shared[32];
    __shared__ int units[32];
    __shared__ bool last;
    double sum = 0.0;
    int unit = 200;
#pragma unroll 8
    for (u32 i = blockIdx.x * 256 + threadIdx.x; i < n; i += gridDim.x * 256) {
        float x = absmax[i];
        sum += (double)x;
        unit = min(unit, unit_exponent(x));
    }
    sum = block_sum(sum, shared);
    unit = block_min(unit, units);
    if (threadIdx.x == 0) {
        mean_sums[blockIdx.x] = sum;
        mean_units[blockIdx.x] = unit;
        __threadfence();
        last = atomicAdd(&mean_done, 1u) + 1 == gridDim.x;
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    bool some = threadIdx.x < gridDim.x;
    double total = block_sum(some ? *(volatile double*)&mean_sums[threadIdx.x] : 0.0, shared);
    unit = block_min(some ? *(volatile int*)&mean_units[threadIdx.x] : 200, units);
    double limit = __longlong_as_double((i64)(unit + 53 + 1023) << 52);
    if (!(total < limit)) total = sum_in_order(absmax, n);
    if (threadIdx.x == 0) {
        offset[0] = __double2float_rn(__ddiv_rn(total, (double)n));
        mean_done = 0;
    }
}

// absmax - offset in 8 bits, blocks of `nested_blocksize`: codes u8 [n], scales f32 [ceil(n / nested_blocksize)].
// `codes` may not overlap `absmax`.
extern "C" __global__ void __launch_bounds__(256) nf4_absmax_nest(const float* absmax, const float* offset, u32 n,
                                                                  u32 nested_blocksize, u8* codes, float* scales) {
    after_previous();
    __shared__ float thresholds[256];
    __shared__ float shared[32];
    thresholds[threadIdx.x] = dynamic_threshold(threadIdx.x, dynamic_value(threadIdx.x, true),
                                                dynamic_value(threadIdx.x < 255 ? threadIdx.x + 1 : 255, true));
    __syncthreads();
    float mean = offset[0];
    u32 blocks = (n + nested_blocksize - 1) / nested_blocksize;
    for (u32 b = blockIdx.x; b < blocks; b += gridDim.x) {
        u32 start = b * nested_blocksize;
        u32 end = n - start < nested_blocksize ? n : start + nested_blocksize;
        float largest = 0.0f;
        for (u32 i = start + threadIdx.x; i < end; i += 256)
            largest = fmaxf(largest, fabsf(flush(__fsub_rn(absmax[i], mean))));
        largest = block_max(largest, shared);
        if (threadIdx.x == 0) scales[b] = largest;
        float reciprocal = __fdiv_rn(1.0f, largest);
        for (u32 i = start + threadIdx.x; i < end; i += 256) {
            float x = __fmul_rn(flush(__fsub_rn(absmax[i], mean)), reciprocal);
            codes[i] = (u8)dynamic_encode(thresholds, x);
        }
    }
}

// ------------------------------------------------------------------------------------------------------ dequantize

// The scale of a block.
struct Plain {
    const float* absmax;
    __device__ __forceinline__ float at(u32 block) const { return __ldg(absmax + block); }
};

struct Nested {
    const u8* codes;
    const float* scales;
    const float* offset;
    u32 nested_shift;
    __device__ __forceinline__ float at(u32 block) const {
        float scale = __ldg(scales + (block >> nested_shift)), mean = __ldg(offset);
        float value = __uint_as_float(__ldg(DYNAMIC_MAP + __ldg(codes + block)));
        return __fadd_rn(__fmul_rn(value, scale), mean);
    }
};

// out[i] = level[code i of word] * absmax for i in 0..8. The sixteen levels stay in the first cache.
template <bool DENORMALS>
__device__ __forceinline__ void decode_word(u32 word, float absmax, const u32* levels, elem* out) {
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        u32 code = word >> (i / 2 * 8 + (i % 2 == 0 ? 4 : 0)) & 15;
        v[i] = __fmul_rn(__uint_as_float(__ldg(levels + code)), absmax);
        if (DENORMALS) v[i] = flush(v[i]);
    }
#pragma unroll
    for (int part = 0; part < 8; part += VEC) {
        float w[VEC];
#pragma unroll
        for (int i = 0; i < VEC; i++) w[i] = v[part + i];
        store_vec(out + part, w);
    }
}

// WORDS words of eight codes for each thread, 256 words apart: what counts is loads in flight and wide stores.
#define WORDS 2
template <typename Scale>
__device__ __forceinline__ void dequantize(const u8* packed, Scale scale, u64 n, u32 block_shift, u32 quant_type,
                                           elem* out, u32 k, u32 row) {
    const u32* levels = VALUES[quant_type];
    u64 first = (u64)blockIdx.x * (256 * WORDS) + threadIdx.x, words = n / 8;
    u32 word[WORDS];
    float absmax[WORDS];
#pragma unroll
    for (int j = 0; j < WORDS; j++) {
        u64 i = first + 256 * j;
        word[j] = i < words ? __ldg((const u32*)packed + i) : 0;
        // A word lies in one block.
        absmax[j] = i < words ? scale.at((u32)(i >> (block_shift - 3))) : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < WORDS; j++) {
        u64 i = first + 256 * j;
        if (i >= words) continue;
        // With rows apart, k is a multiple of 8: a word lies in one row.
        elem* to = row == k ? out + 8 * i : out + 8 * i + (u64)((u32)i / (k / 8)) * (row - k);
        // The smallest value that is not zero is 1/192: from 2^-118 on, no product is a denormal.
        if (fabsf(absmax[j]) >= 3.009265538105056e-36f)
            decode_word<false>(word[j], absmax[j], levels, to);
        else
            decode_word<true>(word[j], absmax[j], levels, to);
    }
    // What is left, seven elements at most.
    u64 e = words * 8 + first;
    if (e < n && first < 8) {
        u32 code = packed[e / 2] >> (e % 2 == 0 ? 4 : 0) & 15;
        store(out + e, flush(__fmul_rn(__uint_as_float(levels[code]), scale.at((u32)(e >> block_shift)))));
    }
}

// out: elem [n / k, k], rows `row` elements apart (row = k unless k is a multiple of 8); blocksize = 2^block_shift; absmax: f32
// [blocks]. Beside each row, from column k on, the columns of scaled B, unless b is null: see low_rank.cuh.
extern "C" __global__ void __launch_bounds__(256) nf4_dequantize(const u8* packed, const float* absmax, u64 n,
                                                                 u32 block_shift, u32 quant_type, elem* out, u32 k,
                                                                 u32 row, const float* b, u32 r, u32 first,
                                                                 float scaling) {
    after_previous();
    Plain scale = {absmax};
    dequantize(packed, scale, n, block_shift, quant_type, out, k, row);
    if (b != nullptr) beside(b, out, (u32)(n / k), r, k, first, row, scaling);
}

// absmax' = DYNAMIC_MAP[codes[b]] * scales[b >> nested_shift] + offset[0].
extern "C" __global__ void __launch_bounds__(256) nf4_dequantize_nested(const u8* packed, const u8* codes,
                                                                        const float* scales, const float* offset,
                                                                        u64 n, u32 block_shift, u32 nested_shift,
                                                                        u32 quant_type, elem* out, u32 k, u32 row,
                                                                        const float* b, u32 r, u32 first,
                                                                        float scaling) {
    after_previous();
    Nested scale = {codes, scales, offset, nested_shift};
    dequantize(packed, scale, n, block_shift, quant_type, out, k, row);
    if (b != nullptr) beside(b, out, (u32)(n / k), r, k, first, row, scaling);
}
