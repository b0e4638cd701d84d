// 4-bit block quantization (NF4, FP4), nested scales, and back: bit for bit as src/nf4.
//
// A tensor is one flat list of n elements in blocks of `blocksize` (a power of two from 32 to 4096; the last one may be
// short). packed: u8 [ceil(n / 2)], the first element in the high nibble; absmax: f32 [ceil(n / blocksize)], or nested:
// u8 codes [ceil(n / blocksize)], f32 scales [ceil(codes / nested_blocksize)] and one f32 offset.
//
// nf4_quantize_{f32,bf16,f16}: 256 threads, any grid; 8 elements a thread.
// nf4_absmax_mean:             256 threads, at most MEAN_BLOCKS thread blocks.
// nf4_absmax_nest:             256 threads per nested block, any grid.
// nf4_dequantize[_nested]:     256 threads, any grid; `out` and `packed` aligned to 16 bytes; n below 2^34. On the way two
//                              f32 arrays are cast to elem (the adapter's A and B): a launch less for each.
#include "common.cuh"

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
// threshold at most: the code is that of the cell, plus one above the threshold. Index: the cell modulo 32.
struct Cell {
    float threshold;
    u32 code;
};

__device__ __forceinline__ u32 cell_of(float s) {
    // Added to 1.5 * 2^23, whose last bit counts ones, rounding down.
    return __float_as_uint(__fadd_rd(__fmul_rn(s, 15.5f), 12582912.0f)) & 31;
}

__device__ __forceinline__ Cell make_cell(u32 index) {
    const u32 thresholds[15] = {0xbf591cd9, 0xbf1c5270, 0xbeeb8480, 0xbeadea76, 0xbe703cec,
                                0xbe0d38bc, 0xbd3a7871, 0x3d22faff, 0x3df64863, 0x3e5067e0,
                                0x3e9582d4, 0x3ec753f9, 0x3f006d03, 0x3f248daf, 0x3f5c89d9};
    Cell cell = {__int_as_float(0x7f800000), 0};
    // In the order of the numbers: -16 first.
    u32 rank = (index + 16) & 31;
#pragma unroll
    for (int i = 0; i < 15; i++) {
        float t = __uint_as_float(thresholds[i]);
        u32 at = (cell_of(t) + 16) & 31;
        if (at < rank) cell.code++;
        if (at == rank) cell.threshold = t;
    }
    return cell;
}

// How many thresholds are less than s, a number of magnitude 1 at most up to rounding.
__device__ __forceinline__ u32 encode_nf4(const Cell* cells, float s) {
    Cell cell = cells[cell_of(s)];
    return cell.code + (s > cell.threshold ? 1 : 0);
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
    __shared__ Cell cells[32];
    if (threadIdx.x < 32) cells[threadIdx.x] = make_cell(threadIdx.x);
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

// Words of 8 codes that a thread decodes in one go: their loads are in flight together.
#define UNROLL 2
#define TILE (256 * UNROLL)

// The scale of a block that holds 8 codes, before anything is computed from it.
struct Plain {
    const float* absmax;
    typedef float Raw;
    __device__ __forceinline__ void fill() {}
    __device__ __forceinline__ Raw fetch(u32 block) const { return __ldg(absmax + block); }
    __device__ __forceinline__ float decode(Raw raw) const { return raw; }
};

struct Nested {
    const u8* codes;
    const float* scales;
    u32 nested_shift;
    float offset;
    // [256]: the signed dynamic map.
    float* map;
    struct Raw {
        u32 code;
        float scale;
    };
    __device__ __forceinline__ void fill() { map[threadIdx.x] = dynamic_value(threadIdx.x, true); }
    __device__ __forceinline__ Raw fetch(u32 block) const {
        Raw raw;
        raw.code = __ldg(codes + block);
        raw.scale = __ldg(scales + (block >> nested_shift));
        return raw;
    }
    __device__ __forceinline__ float decode(Raw raw) const {
        return __fadd_rn(__fmul_rn(map[raw.code], raw.scale), offset);
    }
};

// out[e + i] = value[code i of word] * absmax for i in 0..8. A nibble at bit 7 is the number of a row of the table, 128
// bytes: 32 copies of one value, one per lane, so that no two lanes meet in a bank.
template <bool DENORMALS>
__device__ __forceinline__ void decode_word(u32 word, float absmax, const char* table, u32 lane4, elem* out) {
    float v[8];
#pragma unroll
    for (int b = 0; b < 4; b++) {
        u32 high = b == 0 ? word << 3 : word >> (8 * b - 3);
        u32 low = b == 0 ? word << 7 : b == 1 ? word >> 1 : word >> (8 * b - 7);
        v[2 * b] = __fmul_rn(*(const float*)(table + ((high & 0x780u) | lane4)), absmax);
        v[2 * b + 1] = __fmul_rn(*(const float*)(table + ((low & 0x780u) | lane4)), absmax);
    }
    if (DENORMALS) {
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = flush(v[i]);
    }
#pragma unroll
    for (int part = 0; part < 8; part += VEC) {
        float w[VEC];
#pragma unroll
        for (int i = 0; i < VEC; i++) w[i] = v[part + i];
        store_vec(out + part, w);
    }
}

template <typename Scale>
__device__ __forceinline__ void dequantize(const u8* packed, Scale scale, u64 n, u32 block_shift, u32 quant_type,
                                           elem* out) {
    __shared__ __align__(16) float table[16 * 32];
    const u32* words = (const u32*)packed;
    // 8 codes per word: a word lies in one block.
    u32 word_count = (u32)(n / 8), shift = block_shift - 3;
    u32 step = gridDim.x * TILE, lane4 = threadIdx.x % WARP * 4;

    u32 word[UNROLL];
    typename Scale::Raw raw[UNROLL];
    u32 first = blockIdx.x * TILE + threadIdx.x;
#pragma unroll
    for (u32 k = 0; k < UNROLL; k++) {
        u32 w = first + k * 256;
        if (w < word_count) {
            word[k] = __ldg(words + w);
            raw[k] = scale.fetch(w >> shift);
        }
    }
    // While those are on their way.
    for (u32 i = threadIdx.x; i < 16 * 32; i += 256) table[i] = __uint_as_float(VALUES[quant_type][i / 32]);
    scale.fill();
    __syncthreads();

    while (first < word_count) {
        u32 next = first + step;
        u32 next_word[UNROLL];
        typename Scale::Raw next_raw[UNROLL];
#pragma unroll
        for (u32 k = 0; k < UNROLL; k++) {
            u32 w = next + k * 256;
            if (w < word_count) {
                next_word[k] = __ldg(words + w);
                next_raw[k] = scale.fetch(w >> shift);
            }
        }
#pragma unroll
        for (u32 k = 0; k < UNROLL; k++) {
            u32 w = first + k * 256;
            if (w < word_count) {
                float absmax = scale.decode(raw[k]);
                // The smallest value that is not zero is 1/192: from 2^-118 on, no product is a denormal.
                if (fabsf(absmax) >= 3.009265538105056e-36f)
                    decode_word<false>(word[k], absmax, (const char*)table, lane4, out + 8 * (u64)w);
                else
                    decode_word<true>(word[k], absmax, (const char*)table, lane4, out + 8 * (u64)w);
            }
        }
#pragma unroll
        for (u32 k = 0; k < UNROLL; k++) {
            word[k] = next_word[k];
            raw[k] = next_raw[k];
        }
        first = next;
    }

    // What is left, seven elements at most.
    u64 e = (u64)word_count * 8 + threadIdx.x;
    if (blockIdx.x == 0 && e < n) {
        u32 code = packed[e / 2] >> (e % 2 == 0 ? 4 : 0) & 15;
        float absmax = scale.decode(scale.fetch((u32)(e >> block_shift)));
        store(out + e, flush(__fmul_rn(table[code * 32], absmax)));
    }
}

// out: elem [n]; blocksize = 2^block_shift; absmax: f32 [blocks]; y0 = x0 [n0], y1 = x1 [n1].
extern "C" __global__ void __launch_bounds__(256) nf4_dequantize(const u8* packed, const float* absmax, u64 n,
                                                                 u32 block_shift, u32 quant_type, elem* out,
                                                                 const float* x0, elem* y0, u32 n0, const float* x1,
                                                                 elem* y1, u32 n1) {
    Plain scale = {absmax};
    dequantize(packed, scale, n, block_shift, quant_type, out);
    cast_elements(x0, y0, n0);
    cast_elements(x1, y1, n1);
}

// absmax' = map[codes[b]] * scales[b >> nested_shift] + offset[0].
extern "C" __global__ void __launch_bounds__(256) nf4_dequantize_nested(const u8* packed, const u8* codes,
                                                                        const float* scales, const float* offset,
                                                                        u64 n, u32 block_shift, u32 nested_shift,
                                                                        u32 quant_type, elem* out, const float* x0,
                                                                        elem* y0, u32 n0, const float* x1, elem* y1,
                                                                        u32 n1) {
    __shared__ float map[256];
    Nested scale = {codes, scales, nested_shift, offset[0], map};
    dequantize(packed, scale, n, block_shift, quant_type, out);
    cast_elements(x0, y0, n0);
    cast_elements(x1, y1, n1);
}
