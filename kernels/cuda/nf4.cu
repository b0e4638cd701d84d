// 4-bit block quantization (NF4, FP4), nested scales, and back: bit for bit as src/nf4.
//
// A tensor is one flat list of n elements in blocks of `blocksize` (a power of two from 32 to 4096; the last one may be
// short). packed: u8 [ceil(n / 2)], the first element in the high nibble; absmax: f32 [ceil(n / blocksize)], or nested:
// u8 codes [ceil(n / blocksize)], f32 scales [ceil(codes / nested_blocksize)] and one f32 offset.
//
// nf4_quantize_{f32,bf16,f16}: 256 threads, any grid; 8 elements a thread.
// nf4_absmax_mean:             256 threads, at most MEAN_BLOCKS thread blocks.
// nf4_absmax_nest:             256 threads, any grid; a warp has a nested block at a time.
// nf4_dequantize[_nested]:     256 threads, any grid (of one block at least); `out` and `packed` aligned to 16 bytes; n below 2^34. On the way
//                              the scaled B of a LoRA pair is laid beside the rows: a launch less.
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
// Eight elements as they lie in memory, and as numbers.
template <typename T>
struct Raw {
    u32 w[2 * sizeof(T)];
};
__device__ __forceinline__ void unpack(const Raw<float>& raw, float (&v)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = __uint_as_float(raw.w[i]);
}
__device__ __forceinline__ void unpack(const Raw<Bf16>& raw, float (&v)[8]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        v[2 * i] = __uint_as_float(raw.w[i] << 16);
        v[2 * i + 1] = __uint_as_float(raw.w[i] & 0xffff0000u);
    }
}
__device__ __forceinline__ void unpack(const Raw<F16>& raw, float (&v)[8]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        v[2 * i] = f16_to_f32((u16)raw.w[i]);
        v[2 * i + 1] = f16_to_f32((u16)(raw.w[i] >> 16));
    }
}
__device__ __forceinline__ u32 bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ u32 bits_of(Bf16 x) { return x.bits; }
__device__ __forceinline__ u32 bits_of(F16 x) { return x.bits; }

// Elements e to e + 8 of x [n]; zeros past the end.
template <typename T>
__device__ __forceinline__ Raw<T> read_input(const T* x, u64 e, u64 n, bool aligned) {
    Raw<T> raw = {};
    if (aligned && e + 8 <= n) {
#pragma unroll
        for (int part = 0; part < (int)sizeof(T) / 2; part++) {
            Words words = ((const Words*)(x + e))[part];
#pragma unroll
            for (int i = 0; i < 4; i++) raw.w[4 * part + i] = words.w[i];
        }
    } else {
        const int per_word = 4 / sizeof(T);
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (e + i < n) raw.w[i / per_word] |= bits_of(x[e + i]) << (i % per_word * (int)sizeof(T) * 8);
    }
    return raw;
}

template <typename T>
__device__ __forceinline__ void unpack_flushed(const Raw<T>& raw, float (&v)[8]) {
    unpack(raw, v);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = flush_input(v[i]);
}

// The largest magnitude by its bits: NaN is larger than all else.
__device__ __forceinline__ u32 largest_of(const float (&v)[8]) {
    u32 largest = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        u32 magnitude = __float_as_uint(v[i]) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
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

// Eight codes of elements times `reciprocal`; `zero`: of a block of zeros.
__device__ __forceinline__ u32 encode_word(const Cells& cells, const float (&v)[8], float reciprocal, bool zero, u32 quant_type) {
    u32 word = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float s = __fmul_rn(v[i], reciprocal);
        u32 code = quant_type == FP4 ? encode_fp4(s) : encode_nf4(cells, s);
        word |= code << (8 * (i / 2) + (i % 2 == 0 ? 4 : 0));
    }
    return zero ? 0 : word;
}

__device__ __forceinline__ void store_word(u8* packed, u64 e, u64 n, u32 word) {
    if (e + 8 <= n) {
        *(u32*)(packed + e / 2) = word;
    } else {
        for (u64 j = e; j < n; j += 2) packed[j / 2] = (u8)(word >> (4 * (u32)(j - e)));
    }
}

// The largest of `lanes` neighbouring threads, a power of two, 32 at most.
__device__ __forceinline__ u32 lanes_max(u32 x, u32 lanes) {
#pragma unroll
    for (u32 d = WARP / 2; d > 0; d >>= 1) {
        if (d >= lanes) continue;
        u32 other = __shfl_xor_sync(FULL_MASK, x, d);
        x = other > x ? other : x;
    }
    return x;
}

// Blocks of 256 elements at most: neighbouring threads have one, 8 elements each. What comes next is on its way while this is encoded.
template <typename T>
__device__ __forceinline__ void quantize_short(const T* src, u64 n, u32 blocksize, u32 quant_type, u8* packed, float* absmax,
                                               const Cells& cells, bool aligned) {
    u32 lanes = blocksize / 8, lane = threadIdx.x % WARP, shift = (u32)__ffs((int)blocksize) - 1;
    u64 step = (u64)gridDim.x * (256 * 8), e = ((u64)blockIdx.x * 256 + threadIdx.x) * 8;
    Raw<T> next = read_input(src, e, n, aligned);
    // The lanes of a warp leave together.
    for (; e - lane * 8 < n; e += step) {
        float v[8];
        unpack_flushed(next, v);
        next = read_input(src, e + step, n, aligned);
        u32 largest = lanes_max(largest_of(v), lanes);
        if ((lane & (lanes - 1)) == 0 && e < n) absmax[e >> shift] = __uint_as_float(largest);
        // Multiplied by the reciprocal, not divided: some codes differ. In an all-zero block 0 * inf is NaN: code 0.
        float reciprocal = __frcp_rn(__uint_as_float(largest));
        store_word(packed, e, n, encode_word(cells, v, reciprocal, largest == 0, quant_type));
    }
}

// Longer ones: a warp has one, and reads it twice.
template <typename T>
__device__ __forceinline__ void quantize_long(const T* src, u64 n, u32 blocksize, u32 quant_type, u8* packed, float* absmax,
                                              const Cells& cells, bool aligned) {
    u32 rounds = blocksize / (8 * WARP), lane = threadIdx.x % WARP, step = gridDim.x * (256 / WARP);
    u32 blocks = (u32)((n + blocksize - 1) / blocksize);
    for (u32 b = blockIdx.x * (256 / WARP) + threadIdx.x / WARP; b < blocks; b += step) {
        u64 start = (u64)b * blocksize + lane * 8;
        float v[8];
        u32 largest = 0;
        for (u32 r = 0; r < rounds; r++) {
            unpack_flushed(read_input(src, start + r * (WARP * 8), n, aligned), v);
            u32 other = largest_of(v);
            largest = other > largest ? other : largest;
        }
        largest = lanes_max(largest, WARP);
        if (lane == 0) absmax[b] = __uint_as_float(largest);
        float reciprocal = __frcp_rn(__uint_as_float(largest));
        for (u32 r = 0; r < rounds; r++) {
            u64 e = start + r * (WARP * 8);
            unpack_flushed(read_input(src, e, n, aligned), v);
            store_word(packed, e, n, encode_word(cells, v, reciprocal, largest == 0, quant_type));
        }
    }
}

template <typename T>
__device__ __forceinline__ void quantize(const T* src, u64 n, u32 blocksize, u32 quant_type, u8* packed, float* absmax) {
    __shared__ Cells cells;
    if (threadIdx.x < 32) make_cell(cells, threadIdx.x);
    __syncthreads();
    bool aligned = (u64)src % 16 == 0;
    if (blocksize <= 8 * WARP)
        quantize_short(src, n, blocksize, quant_type, packed, absmax, cells, aligned);
    else
        quantize_long(src, n, blocksize, quant_type, packed, absmax, cells, aligned);
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
#define MEAN_BLOCKS 256

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
    bool aligned = (u64)absmax % 16 == 0;
#pragma unroll 4
    for (u32 i = (blockIdx.x * 256 + threadIdx.x) * 4; i < n; i += gridDim.x * 256 * 4) {
        // Zeros past the end change neither sum nor unit.
        Words four = {};
        if (aligned && i + 4 <= n)
            four = *(const Words*)(absmax + i);
        else
            for (u32 j = 0; j < 4 && i + j < n; j++) four.w[j] = __float_as_uint(absmax[i + j]);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float x = __uint_as_float(four.w[j]);
            sum += (double)x;
            unit = min(unit, unit_exponent(x));
        }
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

// The usual block, read once: eight scales a lane, whose codes are one store.
#define NESTED_BLOCK (8 * WARP)
__device__ __forceinline__ void nest_block(const float* absmax, float mean, const float* thresholds, u8* codes, float* scale) {
    u32 lane = threadIdx.x % WARP;
    const Words* from = (const Words*)(absmax + lane * 8);
    Words words[2] = {from[0], from[1]};
    float v[8], largest = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        v[i] = flush(__fsub_rn(__uint_as_float(words[i / 4].w[i % 4]), mean));
        largest = fmaxf(largest, fabsf(v[i]));
    }
    largest = warp_max(largest);
    if (lane == 0) *scale = largest;
    float reciprocal = __fdiv_rn(1.0f, largest);
    u64 bytes = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) bytes |= (u64)(u8)dynamic_encode(thresholds, __fmul_rn(v[i], reciprocal)) << (8 * i);
    *(u64*)(codes + lane * 8) = bytes;
}

// absmax - offset in 8 bits, blocks of `nested_blocksize`: codes u8 [n], scales f32 [ceil(n / nested_blocksize)].
// `codes` may not overlap `absmax`.
extern "C" __global__ void __launch_bounds__(256) nf4_absmax_nest(const float* absmax, const float* offset, u32 n,
                                                                  u32 nested_blocksize, u8* codes, float* scales) {
    after_previous();
    __shared__ float thresholds[256];
    thresholds[threadIdx.x] = dynamic_threshold(threadIdx.x, dynamic_value(threadIdx.x, true),
                                                dynamic_value(threadIdx.x < 255 ? threadIdx.x + 1 : 255, true));
    __syncthreads();
    bool aligned = ((u64)absmax | (u64)codes) % 16 == 0;
    float mean = offset[0];
    u32 blocks = (n + nested_blocksize - 1) / nested_blocksize, lane = threadIdx.x % WARP;
    for (u32 b = blockIdx.x * (256 / WARP) + threadIdx.x / WARP; b < blocks; b += gridDim.x * (256 / WARP)) {
        u32 start = b * nested_blocksize;
        u32 end = n - start < nested_blocksize ? n : start + nested_blocksize;
        if (end - start == NESTED_BLOCK && aligned) {
            nest_block(absmax + start, mean, thresholds, codes + start, scales + b);
            continue;
        }
        float largest = 0.0f;
        for (u32 i = start + lane; i < end; i += WARP)
            largest = fmaxf(largest, fabsf(flush(__fsub_rn(absmax[i], mean))));
        largest = warp_max(largest);
        if (lane == 0) scales[b] = largest;
        float reciprocal = __fdiv_rn(1.0f, largest);
        for (u32 i = start + lane; i < end; i += WARP) {
            float x = __fmul_rn(flush(__fsub_rn(absmax[i], mean)), reciprocal);
            codes[i] = (u8)dynamic_encode(thresholds, x);
        }
    }
}

// ------------------------------------------------------------------------------------------------------ dequantize

// The scale of a block in two steps: what comes from far away, then the rest, so that many blocks' can be on their way.
struct Plain {
    const float* absmax;
    typedef float Fetched;
    __device__ __forceinline__ Fetched fetch(u32 block) const { return __ldg(absmax + block); }
    __device__ __forceinline__ float finish(const Fetched& f) const { return f; }
};

struct Nested {
    const u8* codes;
    const float* scales;
    const float* offset;
    u32 nested_shift;
    struct Fetched {
        u32 code;
        float scale;
    };
    __device__ __forceinline__ Fetched fetch(u32 block) const {
        return {__ldg(codes + block), __ldg(scales + (block >> nested_shift))};
    }
    __device__ __forceinline__ float finish(const Fetched& f) const {
        return __fadd_rn(__fmul_rn(__uint_as_float(__ldg(DYNAMIC_MAP + f.code)), f.scale), __ldg(offset));
    }
};

// The sixteen levels in shared memory, each in a bank of its own; an address that is a multiple of 64 takes an offset by `or`.
struct Levels {
    u32 base;
    // The level whose number stands in the bits 2 to 5 of `bits`.
    __device__ __forceinline__ float at(u32 bits) const {
        float level;
        asm("ld.shared.f32 %0, [%1];" : "=f"(level) : "r"((bits & 60u) | base));
        return level;
    }
};

// out[i] = level[code i of word] * absmax for i in 0..8.
template <bool DENORMALS>
__device__ __forceinline__ void decode_word(u32 word, float absmax, const Levels& levels, elem* out) {
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int at = i / 2 * 8 + (i % 2 == 0 ? 4 : 0) - 2;
        v[i] = __fmul_rn(levels.at(at < 0 ? word << 2 : word >> (at < 0 ? 0 : at)), absmax);
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

// How a decoded matrix lies in memory.
struct Rows {
    // Elements from row to row beyond those of a row; where there are any, a row has a multiple of 8.
    u32 gap;
    // 2^44 / (words of a row), rounded up: below 2^20 rows the product's upper bits are the quotient.
    u64 reciprocal;
    __device__ __forceinline__ u64 place(u32 word) const {
        u64 at = (u64)word * 8;
        return gap == 0 ? at : at + (u64)(u32)((word * reciprocal) >> 44) * gap;
    }
};

#define THREADS 256
// Words of eight codes for each thread, THREADS apart: what counts is loads in flight and wide stores.
#define WORDS 2
// Thread blocks on a multiprocessor: f32 takes more registers, and consumer cards have room for 1536 threads, not 2048.
#if defined(ELEM_F32) || !defined(__CUDA_ARCH__) || (__CUDA_ARCH__ > 800 && __CUDA_ARCH__ < 900) || __CUDA_ARCH__ >= 1200
#define DECODING 6
#else
#define DECODING 8
#endif
template <typename Scale>
struct Tile {
    u32 word[WORDS];
    typename Scale::Fetched fetched[WORDS];

    __device__ __forceinline__ void fetch(u64 first, u32 words, const u8* packed, const Scale& scale, u32 block_shift) {
#pragma unroll
        for (int j = 0; j < WORDS; j++) {
            // Past the end the last one once more: no branch between the loads.
            u32 i = first + THREADS * j < words ? (u32)first + THREADS * j : words - 1;
            word[j] = __ldg((const u32*)packed + i);
            // A word lies in one block.
            fetched[j] = scale.fetch(i >> (block_shift - 3));
        }
        // The compiler puts what needs one of them after all of them.
        __syncwarp();
    }

    __device__ __forceinline__ void decode(u32 first, u32 words, const Scale& scale, const Levels& levels, elem* out, const Rows& rows) {
#pragma unroll
        for (int j = 0; j < WORDS; j++) {
            u32 i = first + THREADS * j;
            if (i >= words) break;
            float absmax = scale.finish(fetched[j]);
            elem* to = out + rows.place(i);
            // The smallest value that is not zero is 1/192: from 2^-118 on, no product is a denormal.
            if (fabsf(absmax) >= 3.009265538105056e-36f)
                decode_word<false>(word[j], absmax, levels, to);
            else
                decode_word<true>(word[j], absmax, levels, to);
        }
    }
};

// What is left after the words, seven elements at most, for the first threads of the grid.
template <typename Scale>
__device__ __forceinline__ void dequantize_rest(u64 n, const u8* packed, const Scale& scale, u32 block_shift, const Levels& levels,
                                                elem* out) {
    u64 e = n / 8 * 8 + threadIdx.x;
    if (blockIdx.x == 0 && e < n) {
        u32 code = packed[e / 2] >> (e % 2 == 0 ? 4 : 0) & 15;
        store(out + e, flush(__fmul_rn(levels.at(code << 2), scale.finish(scale.fetch((u32)(e >> block_shift))))));
    }
}

template <typename Scale>
__device__ __forceinline__ void dequantize(const u8* packed, const Scale& scale, u64 n, u32 block_shift, u32 quant_type, elem* out,
                                           const Rows& rows) {
    __shared__ __align__(64) float level[16];
    if (threadIdx.x < 16) level[threadIdx.x] = __uint_as_float(VALUES[quant_type][threadIdx.x]);
    __syncthreads();
    Levels levels = {(u32)__cvta_generic_to_shared(level)};
    u32 words = (u32)(n / 8);
    u64 first = (u64)blockIdx.x * (THREADS * WORDS) + threadIdx.x, step = (u64)gridDim.x * (THREADS * WORDS);
    Tile<Scale> tile;
    for (; first - threadIdx.x < words; first += step) {
        tile.fetch(first, words, packed, scale, block_shift);
        tile.decode((u32)first, words, scale, levels, out, rows);
    }
    dequantize_rest(n, packed, scale, block_shift, levels, out);
}

// out: elem [n / k, k], rows `row` elements apart (row = k unless k is a multiple of 8); reciprocal: of k / 8, see Rows; blocksize =
// 2^block_shift; absmax: f32 [blocks]. Beside each row, from column k on, the columns of scaled B, unless b is null: see low_rank.cuh.
extern "C" __global__ void __launch_bounds__(THREADS, DECODING)
nf4_dequantize(const u8* packed, const float* absmax, u64 n, u32 block_shift, u32 quant_type, elem* out, u32 k, u32 row,
               u64 reciprocal, const float* b, u32 r, u32 first, float scaling) {
    after_previous();
    dequantize(packed, Plain{absmax}, n, block_shift, quant_type, out, Rows{row - k, reciprocal});
    if (b != nullptr) beside(b, out, (u32)(n / k), r, k, first, row, scaling);
}

// absmax' = DYNAMIC_MAP[codes[b]] * scales[b >> nested_shift] + offset[0].
extern "C" __global__ void __launch_bounds__(THREADS, DECODING)
nf4_dequantize_nested(const u8* packed, const u8* codes, const float* scales, const float* offset, u64 n, u32 block_shift,
                      u32 nested_shift, u32 quant_type, elem* out, u32 k, u32 row, u64 reciprocal, const float* b, u32 r, u32 first,
                      float scaling) {
    after_previous();
    Nested scale = {codes, scales, offset, nested_shift};
    dequantize(packed, scale, n, block_shift, quant_type, out, Rows{row - k, reciprocal});
    if (b != nullptr) beside(b, out, (u32)(n / k), r, k, first, row, scaling);
}
