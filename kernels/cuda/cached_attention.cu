// Attention of new tokens over a cache of keys and values, for any head size up to 256, f32 or bf16.
//
// q, out [T, H, D]; k, v [T, K, D]; k_cache, v_cache [S, K, D]; positions [T] u32: where each token's key and value go. The
// token at position p sees the cached keys 0 ..= p (with `window` > 0: p - window + 1 ..= p). Scores are `scale` q . k; with `cap` > 0 they are
// cap * tanh(that / cap).
//
// cache_append: grid (ceil(K * D / 256), T), 256 threads; runs first, since tokens see each other.
// cached_attention: grid (H, T), 512 threads; a block owns one token and head, its 16 warps every sixteenth 32 keys: first each
// lane makes the score of one key, then the lanes add up the values, 16 bytes of a row each, several keys at a time. The warps' sums
// are joined in order.
#include "common.cuh"

#define WARPS 16
#define MAX_DIM 256
// Rows of values that a lane asks for before it adds the first.
#define AT_ONCE 4

extern "C" __global__ void __launch_bounds__(256) cache_append(
    const elem* __restrict__ k, const elem* __restrict__ v, elem* __restrict__ k_cache, elem* __restrict__ v_cache,
    const u32* __restrict__ positions, u32 width
) {
    after_previous();
    const u32 column = blockIdx.x * 256 + threadIdx.x;
    if (column >= width) return;
    const i64 from = (i64)blockIdx.y * width + column, to = (i64)positions[blockIdx.y] * width + column;
    k_cache[to] = k[from];
    v_cache[to] = v[from];
}

// a (16-byte aligned, in shared memory) . b
__device__ __forceinline__ float dot(const float* a, const elem* b, u32 dim) {
    float sum = 0.0f;
    if (dim % VEC == 0) {
#pragma unroll 8
        for (u32 i = 0; i < dim; i += VEC) {
            float x[VEC];
            load_vec(b + i, x);
#pragma unroll
            for (int j = 0; j < VEC; j++) sum += a[i + j] * x[j];
        }
    } else {
        for (u32 i = 0; i < dim; i++) sum += a[i] * load(b + i);
    }
    return sum;
}

extern "C" __global__ void __launch_bounds__(WARPS * WARP, 1) cached_attention(
    const elem* __restrict__ q, const elem* __restrict__ k_cache, const elem* __restrict__ v_cache,
    elem* __restrict__ out, const u32* __restrict__ positions, u32 heads, u32 kv_heads, u32 dim, u32 window,
    float scale, float cap
) {
    after_previous();
    __shared__ __align__(16) float q_row[MAX_DIM];
    __shared__ float sums[WARPS][MAX_DIM], weights[WARPS][WARP], warp_tops[WARPS], warp_totals[WARPS];
    const i32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const u32 head = blockIdx.x, kv_head = head / (heads / kv_heads);
    const i32 position = (i32)positions[blockIdx.y];
    const i64 row = ((i64)blockIdx.y * heads + head) * dim, stride = (i64)kv_heads * dim;
    k_cache += (i64)kv_head * dim;
    v_cache += (i64)kv_head * dim;
    if (threadIdx.x < dim) q_row[threadIdx.x] = load(q + row + threadIdx.x);
    __syncthreads();

    // A row of values is shared by `lanes` lanes, so that a warp reads `groups` rows at once; with an odd head size, and where a row has
    // more than 32 vectors, a lane takes one column after the other of a single row.
    const bool whole = dim % VEC == 0 && dim <= WARP * VEC;
    const i32 lanes = whole ? dim / VEC : WARP, groups = WARP / lanes, group = lane / lanes, slot = lane % lanes;
    const float minus_infinity = __int_as_float(0xff800000);
    float acc[VEC] = {};
    float top = minus_infinity, total = 0.0f;
    if (!whole) {
        for (u32 c = lane; c < MAX_DIM; c += WARP) sums[warp][c] = 0.0f;
    }
    const i32 first = window ? max(position + 1 - (i32)window, 0) : 0;
    for (i32 key = first + warp * WARP; key <= position; key += WARPS * WARP) {
        const i32 count = min(position + 1 - key, WARP);
        float s = minus_infinity;
        if (lane < count) {
            s = scale * dot(q_row, k_cache + (key + lane) * stride, dim);
            if (cap > 0.0f) s = cap * tanhf(s / cap);
        }
        const float largest = fmaxf(top, warp_max(s)), shrink = expf(top - largest), p = expf(s - largest);
        top = largest;
        total = total * shrink + warp_sum(p);
        if (!whole) {
            weights[warp][lane] = p;
            __syncwarp();
            for (u32 c = lane; c < dim; c += WARP) {
                float x = sums[warp][c] * shrink;
                for (i32 i = 0; i < count; i++) x += weights[warp][i] * load(v_cache + (key + i) * stride + c);
                sums[warp][c] = x;
            }
            __syncwarp();
            continue;
        }
#pragma unroll
        for (int c = 0; c < VEC; c++) acc[c] *= shrink;
        for (i32 begin = 0; begin < count; begin += groups * AT_ONCE) {
            float w[AT_ONCE], x[AT_ONCE][VEC];
#pragma unroll
            for (int a = 0; a < AT_ONCE; a++) {
                const i32 i = begin + a * groups + group;
                const float weight = __shfl_sync(FULL_MASK, p, min(i, WARP - 1));
                const bool there = group < groups && i < count;
                w[a] = there ? weight : 0.0f;
                load_vec(v_cache + (key + (there ? i : 0)) * stride + slot * VEC, x[a]);
            }
#pragma unroll
            for (int a = 0; a < AT_ONCE; a++) {
#pragma unroll
                for (int c = 0; c < VEC; c++) acc[c] += w[a] * x[a][c];
            }
        }
    }
    // groups * dim is at most WARP * VEC.
    if (whole && group < groups) {
#pragma unroll
        for (int c = 0; c < VEC; c++) sums[warp][group * dim + slot * VEC + c] = acc[c];
    }
    if (lane == 0) {
        warp_tops[warp] = top;
        warp_totals[warp] = total;
    }
    __syncthreads();

    // The first warp has at least one key, so the largest is finite; warps without any add nothing.
    float largest = minus_infinity;
    for (int w = 0; w < WARPS; w++) largest = fmaxf(largest, warp_tops[w]);
    if (threadIdx.x < dim) {
        float x = 0.0f, sum = 0.0f;
        for (int w = 0; w < WARPS; w++) {
            const float shrink = expf(warp_tops[w] - largest);
            float part = 0.0f;
            for (i32 g = 0; g < (whole ? groups : 1); g++) part += sums[w][g * dim + threadIdx.x];
            x += shrink * part;
            sum += shrink * warp_totals[w];
        }
        store(out + row + threadIdx.x, x / sum);
    }
}
