// Causal attention and its gradients for any head size up to 256, f32 or bf16, in f32 arithmetic: the plain form of
// attention.cu and attention_backward.cu, against which they are checked, and what other sizes and f32 run.
//
// q, out, dout, dq [T, H, D], k, v, dk, dv [T, K, D]; lse and delta [T, H] f32; cu_seqlens [B + 1] u32; `window` > 0: the
// query at position p sees the keys p - window + 1 ..= p, else 0 ..= p. Scores are `scale` q . k; with `cap` > 0 they are
// cap * tanh(that / cap).
//
// 128 threads, 4 warps. A warp owns one row of queries (attention_plain, attention_plain_queries: grid
// (ceil(longest example / 4), H, B)) or of keys (attention_plain_keys: grid (ceil(longest example / 4), K, B)) and goes
// over 32 rows of the other side at a time: first each lane makes the products with one of them, then each lane adds
// 1/32 of the columns of all.
#include "common.cuh"

#define WARPS 4
#define MAX_DIM 256
#define COLUMNS (MAX_DIM / WARP)

__device__ __forceinline__ float capped(float score, float cap) { return cap > 0.0f ? cap * tanhf(score / cap) : score; }

// The derivative of `capped` from its value.
__device__ __forceinline__ float slope(float score, float cap) {
    const float share = cap > 0.0f ? score / cap : 0.0f;
    return 1.0f - share * share;
}

// Copies a row to shared memory, as f32.
__device__ __forceinline__ void load_row(float* to, const elem* from, u32 dim) {
    for (u32 i = threadIdx.x % WARP; i < dim; i += WARP) to[i] = load(from + i);
}

// a (16-byte aligned, in shared memory) . b
__device__ __forceinline__ float dot(const float* a, const elem* b, u32 dim) {
    float sum = 0.0f;
    if (dim % VEC == 0) {
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

// acc += sum over `count` rows of weight (of lane i for row i) * row, the columns lane, lane + 32, ... in acc.
__device__ __forceinline__ void add_rows(
    float (&acc)[COLUMNS], float weight, const elem* rows, i64 stride, i32 count, u32 dim
) {
    const u32 lane = threadIdx.x % WARP;
    for (i32 i = 0; i < count; i++) {
        const float w = __shfl_sync(FULL_MASK, weight, i);
        const elem* row = rows + i * stride;
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            if (lane + c * WARP < dim) acc[c] += w * load(row + lane + c * WARP);
        }
    }
}

__device__ __forceinline__ void write_row(elem* to, const float (&acc)[COLUMNS], float factor, u32 dim) {
    const u32 lane = threadIdx.x % WARP;
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
        if (lane + c * WARP < dim) store(to + lane + c * WARP, acc[c] * factor);
    }
}

extern "C" __global__ void __launch_bounds__(128, 1) attention_plain(
    const elem* __restrict__ q, const elem* __restrict__ k, const elem* __restrict__ v, elem* __restrict__ out,
    float* __restrict__ lse, const u32* __restrict__ cu_seqlens, u32 heads, u32 kv_heads, u32 dim, u32 window,
    float scale, float cap
) {
    after_previous();
    __shared__ __align__(16) float rows[WARPS][MAX_DIM];
    const i32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const u32 head = blockIdx.y, kv_head = head / (heads / kv_heads);
    const i64 start = cu_seqlens[blockIdx.z];
    const i32 length = (i32)(cu_seqlens[blockIdx.z + 1] - start), query = blockIdx.x * WARPS + warp;
    if (query >= length) return;
    const i64 stride = (i64)kv_heads * dim, row = (start + query) * heads + head;
    k += start * stride + (i64)kv_head * dim;
    v += start * stride + (i64)kv_head * dim;
    load_row(rows[warp], q + row * dim, dim);
    __syncwarp();

    const float minus_infinity = __int_as_float(0xff800000);
    float acc[COLUMNS] = {};
    float top = minus_infinity, sum = 0.0f;
    for (i32 key = window ? max(query + 1 - (i32)window, 0) : 0; key <= query; key += WARP) {
        const i32 count = min(query + 1 - key, WARP);
        const float s = lane < count ? capped(scale * dot(rows[warp], k + (key + lane) * stride, dim), cap) : minus_infinity;
        const float largest = fmaxf(top, warp_max(s)), shrink = expf(top - largest), p = expf(s - largest);
        top = largest;
        sum = sum * shrink + warp_sum(p);
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) acc[c] *= shrink;
        add_rows(acc, p, v + key * stride, stride, count, dim);
    }
    write_row(out + row * dim, acc, 1.0f / sum, dim);
    if (lane == 0) lse[row] = top + logf(sum);
}

extern "C" __global__ void __launch_bounds__(128, 1) attention_plain_queries(
    const elem* __restrict__ q, const elem* __restrict__ k, const elem* __restrict__ v, const elem* __restrict__ dout,
    const float* __restrict__ lse, const float* __restrict__ delta, elem* __restrict__ dq,
    const u32* __restrict__ cu_seqlens, u32 heads, u32 kv_heads, u32 dim, u32 window,
    float scale, float cap
) {
    after_previous();
    __shared__ __align__(16) float q_rows[WARPS][MAX_DIM], dout_rows[WARPS][MAX_DIM];
    const i32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const u32 head = blockIdx.y, kv_head = head / (heads / kv_heads);
    const i64 start = cu_seqlens[blockIdx.z];
    const i32 length = (i32)(cu_seqlens[blockIdx.z + 1] - start), query = blockIdx.x * WARPS + warp;
    if (query >= length) return;
    const i64 stride = (i64)kv_heads * dim, row = (start + query) * heads + head;
    k += start * stride + (i64)kv_head * dim;
    v += start * stride + (i64)kv_head * dim;
    load_row(q_rows[warp], q + row * dim, dim);
    load_row(dout_rows[warp], dout + row * dim, dim);
    __syncwarp();

    const float row_lse = lse[row], row_delta = delta[row];
    float acc[COLUMNS] = {};
    for (i32 key = window ? max(query + 1 - (i32)window, 0) : 0; key <= query; key += WARP) {
        const i32 count = min(query + 1 - key, WARP);
        float ds = 0.0f;
        if (lane < count) {
            const i64 at = (key + lane) * stride;
            const float s = capped(scale * dot(q_rows[warp], k + at, dim), cap), p = expf(s - row_lse);
            ds = p * (dot(dout_rows[warp], v + at, dim) - row_delta) * slope(s, cap);
        }
        add_rows(acc, ds, k + key * stride, stride, count, dim);
    }
    write_row(dq + row * dim, acc, scale, dim);
}

extern "C" __global__ void __launch_bounds__(128, 1) attention_plain_keys(
    const elem* __restrict__ q, const elem* __restrict__ k, const elem* __restrict__ v, const elem* __restrict__ dout,
    const float* __restrict__ lse, const float* __restrict__ delta, elem* __restrict__ dk, elem* __restrict__ dv,
    const u32* __restrict__ cu_seqlens, u32 heads, u32 kv_heads, u32 dim, u32 window,
    float scale, float cap
) {
    after_previous();
    __shared__ __align__(16) float k_rows[WARPS][MAX_DIM], v_rows[WARPS][MAX_DIM];
    const i32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const u32 kv_head = blockIdx.y, group = heads / kv_heads;
    const i64 start = cu_seqlens[blockIdx.z];
    const i32 length = (i32)(cu_seqlens[blockIdx.z + 1] - start), key = blockIdx.x * WARPS + warp;
    if (key >= length) return;
    const i64 stride = (i64)heads * dim, row = (start + key) * kv_heads + kv_head;
    load_row(k_rows[warp], k + row * dim, dim);
    load_row(v_rows[warp], v + row * dim, dim);
    __syncwarp();

    const i32 end = window ? (i32)min((i64)key + window, (i64)length) : length;
    float dk_acc[COLUMNS] = {}, dv_acc[COLUMNS] = {};
    for (u32 head = kv_head * group; head < (kv_head + 1) * group; head++) {
        const i64 at = start * stride + (i64)head * dim;
        for (i32 query = key; query < end; query += WARP) {
            const i32 count = min(end - query, WARP);
            float p = 0.0f, ds = 0.0f;
            if (lane < count) {
                const i64 other = at + (query + lane) * stride, t = (start + query + lane) * heads + head;
                const float s = capped(scale * dot(k_rows[warp], q + other, dim), cap);
                p = expf(s - lse[t]);
                ds = p * (dot(v_rows[warp], dout + other, dim) - delta[t]) * slope(s, cap);
            }
            add_rows(dv_acc, p, dout + at + query * stride, stride, count, dim);
            add_rows(dk_acc, ds, q + at + query * stride, stride, count, dim);
        }
    }
    write_row(dk + row * dim, dk_acc, scale, dim);
    write_row(dv + row * dim, dv_acc, 1.0f, dim);
}
