// A linear module for one token: y [N] = W x + scaling * B (A x), 4-bit weights straight from their codes. Decoding text
// reads every weight once for each token, so bytes are all that counts: nothing is decoded to memory.
//
// lora_one: xa [R] = A x; A f32 [R, K], x elem [K]; a block for each row.
// dense_one: y [N] elem; W elem [N, K], K a multiple of 32; B and xa as below.
// nf4_one:  y [N] elem; W in NF4 or FP4, [N, K] in blocks of 2^block_shift >= 32, K a multiple of 32, packed aligned to 16
//           bytes; absmax: f32, or nested: u8 codes, f32 scales and an f32 offset. B f32 [N, R] and xa may be null.
// The last two: 256 threads, a warp for each row, any grid; dynamic shared memory: x.
#include "common.cuh"

#define THREADS 256

// Where chunk c of 16 bytes of x lies in shared memory: lanes read every fourth one, which would meet in the same banks.
__device__ __forceinline__ u32 place(u32 c) { return c ^ (c >> 3 & 3); }

// K is a multiple of 32.
__device__ __forceinline__ void load_x(elem* shared, const elem* x, u32 width) {
    for (u32 c = threadIdx.x; c < width / VEC; c += THREADS) ((Words*)shared)[place(c)] = ((const Words*)x)[c];
}

// A block for each row: there are few.
extern "C" __global__ void __launch_bounds__(THREADS)
lora_one(const float* __restrict__ a, const elem* __restrict__ x, elem* __restrict__ xa, u32 width) {
    __shared__ float shared[WARP];
    a += (u64)blockIdx.x * width;
    float sum = 0.0f;
    for (u32 i = threadIdx.x * 4; i < width; i += THREADS * 4) {
        Words w = *(const Words*)(a + i);
#pragma unroll
        for (int j = 0; j < 4; j++) sum += __uint_as_float(w.w[j]) * load(x + i + j);
    }
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) store(xa + blockIdx.x, sum);
}

// scaling * B xa of one row, this lane's part.
__device__ __forceinline__ float adapter_part(const float* b, const elem* xa, u32 r, u32 row, float scaling) {
    if (b == nullptr) return 0.0f;
    float low = 0.0f;
    for (u32 i = threadIdx.x % WARP; i < r; i += WARP) low += b[(u64)row * r + i] * load(xa + i);
    return scaling * low;
}

extern "C" __global__ void __launch_bounds__(THREADS)
dense_one(const elem* __restrict__ w, const elem* __restrict__ x, elem* __restrict__ y, u32 n, u32 width,
          const float* __restrict__ b, const elem* __restrict__ xa, u32 r, float scaling) {
    extern __shared__ Words dynamic_shared[];
    elem* xs = (elem*)dynamic_shared;
    for (u32 c = threadIdx.x; c < width / VEC; c += THREADS) dynamic_shared[c] = ((const Words*)x)[c];
    __syncthreads();
    u32 lane = threadIdx.x % WARP, warps = gridDim.x * (THREADS / WARP);
    for (u32 row = blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP; row < n; row += warps) {
        const elem* start = w + (u64)row * width;
        float sum = 0.0f;
#pragma unroll 4
        for (u32 k = lane * VEC; k < width; k += WARP * VEC) {
            float a[VEC], v[VEC];
            load_vec(start + k, a);
            load_vec(xs + k, v);
#pragma unroll
            for (int i = 0; i < VEC; i++) sum += a[i] * v[i];
        }
        sum = warp_sum(sum + adapter_part(b, xa, r, row, scaling));
        if (lane == 0) store(y + row, sum);
    }
}

// The dot product of 8 codes with x from element k on. A nibble at bit 7 is the number of a row of the table, 128 bytes: 32 copies of one
// value, one per lane, so that no two lanes meet in a bank.
__device__ __forceinline__ float dot(u32 word, const elem* x, u32 k, const char* table, u32 lane4) {
    float v[8];
#pragma unroll
    for (int part = 0; part < 8; part += VEC) {
        float some[VEC];
        load_vec(x + place((k + part) / VEC) * VEC, some);
#pragma unroll
        for (int i = 0; i < VEC; i++) v[part + i] = some[i];
    }
    float sum = 0.0f;
#pragma unroll
    for (int b = 0; b < 4; b++) {
        u32 high = b == 0 ? word << 3 : word >> (8 * b - 3);
        u32 low = b == 0 ? word << 7 : b == 1 ? word >> 1 : word >> (8 * b - 7);
        sum += *(const float*)(table + ((high & 0x780u) | lane4)) * v[2 * b];
        sum += *(const float*)(table + ((low & 0x780u) | lane4)) * v[2 * b + 1];
    }
    return sum;
}

// `scales` null: absmax is f32; else absmax holds codes.
extern "C" __global__ void __launch_bounds__(THREADS)
nf4_one(const u8* __restrict__ packed, const void* __restrict__ absmax, const float* __restrict__ scales,
        const float* __restrict__ offset, u32 block_shift, u32 nested_shift, u32 quant_type, const elem* __restrict__ x,
        elem* __restrict__ y, u32 n, u32 width, const float* __restrict__ b, const elem* __restrict__ xa, u32 r,
        float scaling) {
    extern __shared__ Words dynamic_shared[];
    __shared__ __align__(16) float table[16 * 32];
    __shared__ float map[256];
    elem* xs = (elem*)dynamic_shared;
    for (u32 i = threadIdx.x; i < 16 * 32; i += THREADS) table[i] = __uint_as_float(VALUES[quant_type][i / 32]);
    if (scales) map[threadIdx.x] = dynamic_value(threadIdx.x, true);
    load_x(xs, x, width);
    __syncthreads();
    u32 lane = threadIdx.x % WARP, lane4 = lane * 4, warps = gridDim.x * (THREADS / WARP);
    float mean = scales ? offset[0] : 0.0f;
    for (u32 row = blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP; row < n; row += warps) {
        u64 start = (u64)row * width;
        float sum = 0.0f;
#pragma unroll 4
        for (u32 k = lane * 32; k < width; k += WARP * 32) {
            Words w = *(const Words*)(packed + (start + k) / 2);
            u32 block = (u32)((start + k) >> block_shift);
            float scale = scales ? __fadd_rn(__fmul_rn(map[((const u8*)absmax)[block]], scales[block >> nested_shift]), mean)
                                 : ((const float*)absmax)[block];
            float part = 0.0f;
#pragma unroll
            for (int i = 0; i < 4; i++) part += dot(w.w[i], xs, k + 8 * i, (const char*)table, lane4);
            sum += scale * part;
        }
        sum = warp_sum(sum + adapter_part(b, xa, r, row, scaling));
        if (lane == 0) store(y + row, sum);
    }
}
