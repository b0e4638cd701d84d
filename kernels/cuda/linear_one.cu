// Linear modules for one token: y [N] = W x + scaling * B (A x) + bias, 4-bit weights straight from their codes. Decoding text reads
// every weight once for each token, so bytes are all that counts: nothing is decoded to memory, modules that read the same x share a
// launch, and each warp asks for its first weights while the kernel before this one ends.
//
// lora_one:  xa [R] = A x for up to MODULES adapters; A f32 [R, K], x elem [K]. A block for each row of all.
// dense_one: y [N] elem; W elem [N, K], K a multiple of 32; B, xa and bias as below.
// nf4_one:   y [N] elem; W in NF4 or FP4, [N, K] in blocks of 2^block_shift >= 32, K a multiple of 32, packed aligned to 16
//            bytes; absmax: f32, or nested: u8 codes, f32 scales and an f32 offset. B f32 [N, R] with xa elem [R], and bias elem [N],
//            may be null.
// The last two: 256 threads, a warp for each two rows of all modules, any grid; dynamic shared memory: x.
#include "common.cuh"
#include "dynamic_map.cuh"

#define THREADS 256
#define WARPS (THREADS / WARP)
#define MODULES 3

struct Adapter {
    const float* a;
    elem* xa;
    u64 first;
};

// A row of all adapters belongs to the last one whose `first` it has reached; places that are empty have a `first` beyond all rows.
struct Adapters {
    Adapter items[MODULES];
};

// `first` counts pairs of rows: the second of an odd last one is not there.
struct Module {
    const void* weight;
    const void* absmax;
    const float* scales;
    const float* offset;
    const elem* bias;
    elem* y;
    const float* b;
    const elem* xa;
    u32 first, n, r;
    float scaling;
};

struct Modules {
    Module items[MODULES];
};

template <typename T>
__device__ __forceinline__ u32 find(const T& items, u32 row) {
    u32 at = 0;
#pragma unroll
    for (u32 i = 1; i < MODULES; i++) at = row >= items[i].first ? i : at;
    return at;
}

// Into the second cache.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// The first bytes of a row of `bytes`, by a warp: as much as is worth a place in the cache before it is wanted.
__device__ __forceinline__ void prefetch_row(const void* row, u32 bytes) {
    for (u32 i = threadIdx.x % WARP * 128; i < bytes && i < 8192; i += WARP * 128) prefetch((const char*)row + i);
}

// Where chunk c of 16 bytes of x lies in shared memory: lanes read every fourth one, which would meet in the same banks.
__device__ __forceinline__ u32 place(u32 c) { return c ^ (c >> 3 & 3); }

extern "C" __global__ void __launch_bounds__(THREADS)
lora_one(const __grid_constant__ Adapters adapters, const elem* __restrict__ x, u32 width) {
    __shared__ float shared[WARP];
    const Adapter& adapter = adapters.items[find(adapters.items, blockIdx.x)];
    u32 row = blockIdx.x - (u32)adapter.first;
    const float* a = adapter.a + (u64)row * width;
    for (u32 i = threadIdx.x * 32; i < width; i += THREADS * 32) prefetch(a + i);
    after_previous();
    float sum = 0.0f;
    for (u32 i = threadIdx.x * 4; i < width; i += THREADS * 4) {
        Words w = *(const Words*)(a + i);
#pragma unroll
        for (int j = 0; j < 4; j++) sum += __uint_as_float(w.w[j]) * load(x + i + j);
    }
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) store(adapter.xa + row, sum);
}

// scaling * B xa of one row, this lane's part.
__device__ __forceinline__ float adapter_part(const Module& m, u32 row) {
    if (m.b == nullptr) return 0.0f;
    float low = 0.0f;
    for (u32 i = threadIdx.x % WARP; i < m.r; i += WARP) low += m.b[(u64)row * m.r + i] * load(m.xa + i);
    return m.scaling * low;
}

// The sum of a warp's parts, and the bias, to y.
__device__ __forceinline__ void finish(const Module& m, u32 row, float sum) {
    sum = warp_sum(sum + adapter_part(m, row));
    if (threadIdx.x % WARP != 0) return;
    // As two operations: the product is rounded before the bias is added.
    if (m.bias != nullptr) sum = round_elem(sum) + load(m.bias + row);
    store(m.y + row, sum);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
dense_one(const __grid_constant__ Modules modules, const elem* __restrict__ x, u32 pairs, u32 width) {
    extern __shared__ Words dynamic_shared[];
    elem* xs = (elem*)dynamic_shared;
    u32 lane = threadIdx.x % WARP, first = blockIdx.x * WARPS + threadIdx.x / WARP;
    if (first < pairs) {
        const Module& m = modules.items[find(modules.items, first)];
        prefetch_row((const elem*)m.weight + (u64)(first - m.first) * 2 * width, 2 * width * sizeof(elem));
    }
    after_previous();
    for (u32 c = threadIdx.x; c < width / VEC; c += THREADS) dynamic_shared[c] = ((const Words*)x)[c];
    __syncthreads();
    for (u32 pair = first; pair < pairs; pair += gridDim.x * WARPS) {
        const Module& m = modules.items[find(modules.items, pair)];
        u32 row = (pair - m.first) * 2;
        bool two = row + 1 < m.n;
        const elem* start = (const elem*)m.weight + (u64)row * width;
        u64 next = two ? width : 0;
        float sum0 = 0.0f, sum1 = 0.0f;
#pragma unroll 4
        for (u32 k = lane * VEC; k < width; k += WARP * VEC) {
            float a[VEC], b[VEC], v[VEC];
            load_vec(start + k, a);
            load_vec(start + next + k, b);
            load_vec(xs + k, v);
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                sum0 += a[i] * v[i];
                sum1 += b[i] * v[i];
            }
        }
        finish(m, row, sum0);
        if (two) finish(m, row + 1, sum1);
    }
}

// The absmax of the block of element e.
__device__ __forceinline__ float scale_of(const Module& m, const float* map, u64 e, u32 block_shift, u32 nested_shift, float mean) {
    u32 block = (u32)(e >> block_shift);
    return m.scales ? __fadd_rn(__fmul_rn(map[((const u8*)m.absmax)[block]], m.scales[block >> nested_shift]), mean)
                    : ((const float*)m.absmax)[block];
}

// The value of the code in the lowest bits of `word`: each half of the warp holds all sixteen. All lanes call it.
__device__ __forceinline__ float value(float level, u32 word) { return __shfl_sync(FULL_MASK, level, word, 16); }

// `scales` null: absmax is f32; else absmax holds codes.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
nf4_one(const __grid_constant__ Modules modules, const elem* __restrict__ x, u32 pairs, u32 width, u32 block_shift,
        u32 nested_shift, u32 quant_type) {
    extern __shared__ Words dynamic_shared[];
    __shared__ float map[256];
    elem* xs = (elem*)dynamic_shared;
    u32 lane = threadIdx.x % WARP, first = blockIdx.x * WARPS + threadIdx.x / WARP;
    if (first < pairs) {
        const Module& m = modules.items[find(modules.items, first)];
        prefetch_row((const u8*)m.weight + (u64)(first - m.first) * width, width);
    }
    map[threadIdx.x] = __uint_as_float(DYNAMIC_MAP[threadIdx.x]);
    float level = __uint_as_float(VALUES[quant_type][lane % 16]);
    after_previous();
    for (u32 c = threadIdx.x; c < width / VEC; c += THREADS) dynamic_shared[place(c)] = ((const Words*)x)[c];
    __syncthreads();
    for (u32 pair = first; pair < pairs; pair += gridDim.x * WARPS) {
        const Module& m = modules.items[find(modules.items, pair)];
        u32 row = (pair - m.first) * 2;
        bool two = row + 1 < m.n;
        u64 start = (u64)row * width, next = two ? width : 0;
        float mean = m.scales ? m.offset[0] : 0.0f, sum0 = 0.0f, sum1 = 0.0f;
#pragma unroll 2
        for (u32 begin = 0; begin < width; begin += WARP * 32) {
            // Lanes beyond the end take part in the look-up: their scale is zero.
            bool some = begin + lane * 32 < width;
            u32 k = some ? begin + lane * 32 : 0;
            Words w0 = *(const Words*)((const u8*)m.weight + (start + k) / 2);
            Words w1 = *(const Words*)((const u8*)m.weight + (start + next + k) / 2);
            float scale0 = scale_of(m, map, start + k, block_shift, nested_shift, mean);
            float scale1 = scale_of(m, map, start + next + k, block_shift, nested_shift, mean);
            float part0 = 0.0f, part1 = 0.0f;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float v[8];
#pragma unroll
                for (int part = 0; part < 8; part += VEC) {
                    float chunk[VEC];
                    load_vec(xs + place((k + 8 * i + part) / VEC) * VEC, chunk);
#pragma unroll
                    for (int j = 0; j < VEC; j++) v[part + j] = chunk[j];
                }
                // Two codes a byte, the first in the high half.
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    u32 shift = j / 2 * 8 + (j % 2 == 0 ? 4 : 0);
                    part0 += value(level, w0.w[i] >> shift) * v[j];
                    part1 += value(level, w1.w[i] >> shift) * v[j];
                }
            }
            sum0 += some ? scale0 * part0 : 0.0f;
            sum1 += some ? scale1 * part1 : 0.0f;
        }
        finish(m, row, sum0);
        if (two) finish(m, row + 1, sum1);
    }
}
