// Gradients of causal attention on the matrix units of compute capability 9.0: as attention_backward.cu, which see, for
// head size 128.
//
// attention_backward_keys_hopper_D: grid (ceil(longest example / 64), K, B), 128 threads; a warpgroup owns 64 keys.
// attention_backward_queries_hopper_D: grid (ceil(longest example / 64), H, B), 128 threads; it owns 64 queries.
// Both hold the two tiles of their own rows in shared memory and stream tiles of the other side through it, two of each
// (hopper.cuh).
#include "common.cuh"
#include "attention.cuh"
#include "hopper.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) && !defined(ELEM_F32)

// KEYS: the own rows are keys, else queries. `own` points to the block's first row; `other` to row 0 of the example, first
// head; heads lie D apart. `lse` and `delta` point to row 0 of the example, first head of the group, `heads` apart. dx: the
// gradient by the own `x`; dy: of the own `y`, where the own rows are keys.
template <int D, bool KEYS>
__device__ __forceinline__ void pass(
    Side own, Side other, const float* lse, const float* delta, elem* dx, elem* dy, i32 first, i32 length, u32 heads,
    i32 group, i32 reach
) {
    constexpr int BYTES = D / 64 * PART;
    extern __shared__ __align__(1024) u8 dynamic_shared[];
    const u32 own_x = shared_address(dynamic_shared), own_y = own_x + BYTES;
    const u32 stream_x = own_x + 2 * BYTES, stream_y = own_x + 4 * BYTES;
    // lse and delta of the streamed queries, two tiles of each.
    float* stats = (float*)(dynamic_shared + 6 * BYTES);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;

    // The streamed rows that have to do with the block's: whole tiles.
    const i32 last = min(first + TILE, length) - 1;
    const i32 from = KEYS ? first : max(first - reach + 1, 0) / TILE * TILE;
    const i32 end = KEYS ? min((i64)last + reach, (i64)length) : last + 1;

    auto load = [&](i32 head, i32 row, u32 stage) {
        const i64 at = row * other.stride + head * D;
        load_tile<D>(stream_x + stage * BYTES, other.x + at, other.stride, length - row);
        load_tile<D>(stream_y + stage * BYTES, other.y + at, other.stride, length - row);
        if (KEYS) {
            const i32 i = threadIdx.x % TILE;
            const i64 stat = (i64)(row + i) * heads + head;
            const u32 to = shared_address(stats + stage * 2 * TILE + threadIdx.x);
            copy_async_4(to, (threadIdx.x < TILE ? lse : delta) + stat, row + i < length);
        }
    };

    load_tile<D>(own_x, own.x, own.stride, length - first);
    load_tile<D>(own_y, own.y, own.stride, length - first);
    load(0, from, 0);
    commit();

    // Rows of this lane: `own_row` and `own_row + 8`.
    const i32 own_row = first + warp * 16 + lane / 4;
    float own_lse[2] = {0.0f, 0.0f}, own_delta[2] = {0.0f, 0.0f};
    if (!KEYS) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            if (own_row + r * 8 < length) {
                own_lse[r] = lse[(i64)(own_row + r * 8) * heads] * LOG2_E;
                own_delta[r] = delta[(i64)(own_row + r * 8) * heads];
            }
        }
    }

    constexpr float D_AS_FLOAT = D;
    const float scale = 1.0f / sqrtf(D_AS_FLOAT), scale_log2 = scale * LOG2_E;
    const float minus_infinity = __int_as_float(0xff800000);
    float x_sum[D / 8][4] = {}, y_sum[KEYS ? D / 8 : 1][4] = {};

    i32 head = 0, row = from;
    u32 stage = 0;
    while (head < group) {
        const i32 next_row = row + TILE < end ? row + TILE : from, next_head = head + (next_row == from);
        // This tile is here, and all warps have done with the one before it.
        copies_done();
        __syncthreads();
        if (next_head < group) load(next_head, next_row, stage ^ 1);
        commit();
        const u32 x = stream_x + stage * BYTES, y = stream_y + stage * BYTES;
        const float* stat = stats + stage * 2 * TILE;

        float p[TILE / 8][4], ds[TILE / 8][4];
        pin(p);
        pin(ds);
        products_begin();
#pragma unroll
        for (int i = 0; i < D / 16; i++) multiply(p, columns(own_x, i), columns(x, i), i > 0);
        products_commit();
#pragma unroll
        for (int i = 0; i < D / 16; i++) multiply(ds, columns(own_y, i), columns(y, i), i > 0);
        products_commit();
        products_wait<1>();
        pin(p);

        // Position of the query minus that of the key, where it is smallest and largest in this tile.
        const i32 nearest = KEYS ? row - (first + TILE - 1) : first - (row + TILE - 1);
        const i32 farthest = KEYS ? row + TILE - 1 - first : first + TILE - 1 - row;
        if (nearest < 0 || farthest >= reach) {
#pragma unroll
            for (int j = 0; j < TILE / 8; j++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    i32 distance = own_row + e / 2 * 8 - (row + j * 8 + lane % 4 * 2 + e % 2);
                    if (KEYS) distance = -distance;
                    if (distance < 0 || distance >= reach) p[j][e] = minus_infinity;
                }
            }
        }
#pragma unroll
        for (int j = 0; j < TILE / 8; j++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float l = own_lse[e / 2];
                if (KEYS) l = stat[j * 8 + lane % 4 * 2 + e % 2] * LOG2_E;
                p[j][e] = exp2_fast(p[j][e] * scale_log2 - l);
            }
        }

        u32 left[4][4];
        if constexpr (KEYS) {
            pack(left, p);
            pin(y_sum);
            products_begin();
#pragma unroll
            for (int i = 0; i < TILE / 16; i++) add_rows(y_sum, left[i], rows(y, i));
            products_commit();
            products_wait<1>();
        } else {
            products_wait<0>();
        }
        pin(ds);
#pragma unroll
        for (int j = 0; j < TILE / 8; j++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float d = own_delta[e / 2];
                if (KEYS) d = stat[TILE + j * 8 + lane % 4 * 2 + e % 2];
                ds[j][e] = p[j][e] * (ds[j][e] - d);
            }
        }
        u32 right[4][4];
        pack(right, ds);
        pin(x_sum);
        products_begin();
#pragma unroll
        for (int i = 0; i < TILE / 16; i++) add_rows(x_sum, right[i], rows(x, i));
        products_commit();
        products_wait<0>();
        pin(x_sum);
        pin(y_sum);
        head = next_head;
        row = next_row;
        stage ^= 1;
    }

    // All warps have done with the tiles.
    __syncthreads();
    const i32 valid = length - first - warp * 16;
    const i64 at = warp * 16 * own.stride;
    elem* staged = (elem*)dynamic_shared + warp * 16 * (D + 8);
    const float x_factor[2] = {scale, scale}, y_factor[2] = {1.0f, 1.0f};
    write_rows<D>(dx + at, own.stride, valid, x_sum, x_factor, staged);
    if constexpr (KEYS) write_rows<D>(dy + at, own.stride, valid, y_sum, y_factor, staged);
}

template <int D>
__device__ __forceinline__ void backward_keys(
    const elem* q, const elem* k, const elem* v, const elem* dout, const float* lse, const float* delta, elem* dk,
    elem* dv, const u32* cu_seqlens, u32 heads, u32 kv_heads, u32 window
) {
    const u32 kv_head = blockIdx.y, group = heads / kv_heads;
    const i64 start = cu_seqlens[blockIdx.z];
    const i32 length = (i32)(cu_seqlens[blockIdx.z + 1] - start), first = blockIdx.x * TILE;
    if (first >= length) return;
    const i64 q_stride = (i64)heads * D, k_stride = (i64)kv_heads * D;
    const i64 own_at = (start + first) * k_stride + kv_head * D;
    const i64 other_at = start * q_stride + kv_head * group * D, row_at = start * heads + kv_head * group;
    const Side own = {k + own_at, v + own_at, k_stride}, other = {q + other_at, dout + other_at, q_stride};
    const i32 reach = window ? (i32)window : 0x3fffffff;
    pass<D, true>(
        own, other, lse + row_at, delta + row_at, dk + own_at, dv + own_at, first, length, heads, group, reach
    );
}

template <int D>
__device__ __forceinline__ void backward_queries(
    const elem* q, const elem* k, const elem* v, const elem* dout, const float* lse, const float* delta, elem* dq,
    const u32* cu_seqlens, u32 heads, u32 kv_heads, u32 window
) {
    const u32 head = blockIdx.y, kv_head = head / (heads / kv_heads);
    const i64 start = cu_seqlens[blockIdx.z];
    // The longest rows first.
    const i32 length = (i32)(cu_seqlens[blockIdx.z + 1] - start), first = (gridDim.x - 1 - blockIdx.x) * TILE;
    if (first >= length) return;
    const i64 q_stride = (i64)heads * D, k_stride = (i64)kv_heads * D;
    const i64 own_at = (start + first) * q_stride + head * D, other_at = start * k_stride + kv_head * D;
    const i64 row_at = start * heads + head;
    const Side own = {q + own_at, dout + own_at, q_stride}, other = {k + other_at, v + other_at, k_stride};
    const i32 reach = window ? (i32)window : 0x3fffffff;
    pass<D, false>(own, other, lse + row_at, delta + row_at, dq + own_at, nullptr, first, length, heads, 1, reach);
}

#define BACKWARD(D)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_backward_keys_hopper_##D(                    \
        const elem* __restrict__ q, const elem* __restrict__ k, const elem* __restrict__ v,                         \
        const elem* __restrict__ dout, const float* __restrict__ lse, const float* __restrict__ delta,              \
        elem* __restrict__ dk, elem* __restrict__ dv, const u32* __restrict__ cu_seqlens, u32 heads, u32 kv_heads,  \
        u32 window                                                                                                  \
    ) {                                                                                                             \
        after_previous();                                                                                           \
        backward_keys<D>(q, k, v, dout, lse, delta, dk, dv, cu_seqlens, heads, kv_heads, window);                   \
    }                                                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_backward_queries_hopper_##D(                 \
        const elem* __restrict__ q, const elem* __restrict__ k, const elem* __restrict__ v,                         \
        const elem* __restrict__ dout, const float* __restrict__ lse, const float* __restrict__ delta,              \
        elem* __restrict__ dq, const u32* __restrict__ cu_seqlens, u32 heads, u32 kv_heads, u32 window              \
    ) {                                                                                                             \
        after_previous();                                                                                           \
        backward_queries<D>(q, k, v, dout, lse, delta, dq, cu_seqlens, heads, kv_heads, window);                    \
    }

BACKWARD(128)

#endif
