// Gradients of causal attention from the saved log-sums (arXiv 2205.14135): bf16, head sizes 64, 80, 96, 128, 256.
//
// q, dout, dq [T, H, D], k, v, dk, dv [T, K, D] bf16; lse and delta [T, H] f32, delta = sum(dout * out) of each row;
// cu_seqlens [B + 1] u32; `window` as in attention.cu. With p = exp(score - lse) and ds = p (dout v^T - delta) / sqrt(D):
// dv = p^T dout, dk = ds^T q, dq = ds k. Scores are made again, twice: every sum has one owner and a fixed order.
//
// attention_delta: grid (ceil(T * H / 8)), 256 threads, a warp for each row; any D, also f32.
// attention_backward_keys_D: grid (ceil(longest example / 64), K, B), 128 threads; a block owns 64 keys, a warp 16 of
// them, and sees all query heads of the group and all queries of each, in order.
// attention_backward_queries_D: grid (ceil(longest example / 64), H, B), 128 threads; a block owns 64 queries.
// Both hold the two tiles of their own rows in shared memory and stream tiles of the other side through it, 64 rows (32
// for D = 256) at a time, rows padded by 16 bytes against bank conflicts.
#include "common.cuh"
#include "attention.cuh"
#include "mma.cuh"

extern "C" __global__ void __launch_bounds__(256) attention_delta(
    const elem* __restrict__ out, const elem* __restrict__ dout, float* __restrict__ delta, u64 rows, u32 dim
) {
    after_previous();
    const u64 row = (u64)blockIdx.x * 8 + threadIdx.x / WARP;
    const u32 lane = threadIdx.x % WARP;
    if (row >= rows) return;
    out += row * dim;
    dout += row * dim;
    float sum = 0.0f;
    if (dim % VEC == 0) {
        for (u32 i = lane * VEC; i < dim; i += WARP * VEC) {
            float a[VEC], b[VEC];
            load_vec(out + i, a);
            load_vec(dout + i, b);
#pragma unroll
            for (int j = 0; j < VEC; j++) sum += a[j] * b[j];
        }
    } else {
        for (u32 i = lane; i < dim; i += WARP) sum += load(out + i) * load(dout + i);
    }
    sum = warp_sum(sum);
    if (lane == 0) delta[row] = sum;
}

#ifndef ELEM_F32

// c [16, 8 N] = a [16, D] b^T, b [8 N, D]; lane addresses of both.
template <int D, int N>
__device__ __forceinline__ void product(float (&c)[N][4], u32 a_address, u32 b_address) {
#pragma unroll
    for (int j = 0; j < N; j++) c[j][0] = c[j][1] = c[j][2] = c[j][3] = 0.0f;
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        u32 a[4];
        load_matrices(a, a_address + i * 32);
#pragma unroll
        for (int j = 0; j < N / 2; j++) {
            u32 b[4];
            load_matrices(b, b_address + (j * 16 * (D + 8) + i * 16) * 2);
            multiply(c[2 * j], a, b[0], b[1]);
            multiply(c[2 * j + 1], a, b[2], b[3]);
        }
    }
}

// c [16, D] += a b, a [16, 8 N] in registers (rounded to bf16), b [8 N, D]; lane address of b.
template <int D, int N>
__device__ __forceinline__ void add_product(float (&c)[D / 8][4], const float (&a)[N][4], u32 b_address) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        u32 r[4] = {
            pack_bf16(a[2 * i][0], a[2 * i][1]), pack_bf16(a[2 * i][2], a[2 * i][3]),
            pack_bf16(a[2 * i + 1][0], a[2 * i + 1][1]), pack_bf16(a[2 * i + 1][2], a[2 * i + 1][3])
        };
#pragma unroll
        for (int j = 0; j < D / 16; j++) {
            u32 b[4];
            load_matrices_transposed(b, b_address + (i * 16 * (D + 8) + j * 16) * 2);
            multiply(c[2 * j], r, b[0], b[1]);
            multiply(c[2 * j + 1], r, b[2], b[3]);
        }
    }
}

// Where tiles lie: two of the block's own rows, then the streamed ones. A streamed row of queries has its lse and delta in
// the padding.
template <int D>
struct Tiles {
    static constexpr int STREAM = D <= 128 ? 64 : 32;
    // Buffers of the first streamed tile, which is read until the end of a round.
    static constexpr int BUFFERS = D <= 128 ? 2 : 1;
    static constexpr int OWN = TILE * (D + 8), STREAMED = STREAM * (D + 8);
};

// One pass over all streamed tiles of a block. KEYS: its own rows are keys, else queries. SCORES: the gradient by its own
// `x`, into dx. VALUES: dv, into dy (only where its own rows are keys).
//
// `own` points to the block's first row; `other` to row 0 of the example, first head; heads lie D apart. `lse` and `delta`
// point to row 0 of the example, first head of the group, `heads` apart.
template <int D, bool KEYS, bool SCORES, bool VALUES>
__device__ __forceinline__ void pass(
    Side own, Side other, const float* lse, const float* delta, elem* dx, elem* dy, i32 first, i32 length, u32 heads,
    i32 group, i32 reach
) {
    typedef Tiles<D> L;
    constexpr int STREAM = L::STREAM, N = STREAM / 8, STRIDE = D + 8;
    extern __shared__ Words dynamic_shared[];
    elem* own_x = (elem*)dynamic_shared;
    elem* own_y = own_x + L::OWN;
    elem* stream_x = own_y + L::OWN;
    elem* stream_y = stream_x + L::BUFFERS * L::STREAMED;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;

    // The streamed rows that have to do with the block's: whole tiles.
    const i32 last = min(first + TILE, length) - 1;
    const i32 from = KEYS ? first : max(first - reach + 1, 0) / STREAM * STREAM;
    const i32 end = KEYS ? min((i64)last + reach, (i64)length) : last + 1;

    // `buffer`: 0 or 1, where there are two.
    auto load_x = [&](i32 head, i32 row, i32 buffer) {
        elem* to = stream_x + (L::BUFFERS > 1 ? buffer * L::STREAMED : 0);
        load_tile<D, STREAM>(shared_address(to), other.x + row * other.stride + head * D, other.stride, length - row);
        if (KEYS && threadIdx.x < STREAM) {
            const u32 padding = shared_address(to + threadIdx.x * STRIDE + D);
            const i64 at = (i64)(row + (i32)threadIdx.x) * heads + head;
            const bool valid = row + (i32)threadIdx.x < length;
            copy_async_4(padding, lse + at, valid);
            copy_async_4(padding + 4, delta + at, valid);
        }
    };
    auto load_y = [&](i32 head, i32 row) {
        load_tile<D, STREAM>(
            shared_address(stream_y), other.y + row * other.stride + head * D, other.stride, length - row
        );
    };

    load_tile<D, TILE>(shared_address(own_x), own.x, own.stride, length - first);
    if (SCORES) load_tile<D, TILE>(shared_address(own_y), own.y, own.stride, length - first);
    load_x(0, from, 0);
    commit();
    load_y(0, from);
    commit();

    // Lane addresses for ldmatrix: the block's own rows as A, streamed rows as B, streamed rows transposed as B.
    const int a_offset = (warp * 16 + lane % 16) * STRIDE + lane / 16 * 8;
    const int b_offset = (lane % 8 + lane / 16 * 8) * STRIDE + lane / 8 % 2 * 8;
    const int t_offset = lane % 16 * STRIDE + lane / 16 * 8;
    const u32 a_x = shared_address(own_x + a_offset), a_y = shared_address(own_y + a_offset);
    const u32 b_y = shared_address(stream_y + b_offset), t_y = shared_address(stream_y + t_offset);

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
    float x_sum[SCORES ? D / 8 : 1][4] = {}, y_sum[VALUES ? D / 8 : 1][4] = {};

    i32 head = 0, row = from, buffer = 0;
    while (head < group) {
        const i32 next_row = row + STREAM < end ? row + STREAM : from, next_head = head + (next_row == from);
        // The streamed x is here (with one buffer y as well); with two, all warps have done with the x before it.
        if (L::BUFFERS > 1) {
            wait_group<1>();
        } else {
            wait_group<0>();
        }
        __syncthreads();
        if (L::BUFFERS > 1) {
            if (next_head < group) load_x(next_head, next_row, buffer ^ 1);
            commit();
        }
        const elem* x = stream_x + (L::BUFFERS > 1 ? buffer * L::STREAMED : 0);

        float p[N][4];
        product<D, N>(p, a_x, shared_address(x + b_offset));

        // Position of the query minus that of the key, where it is smallest and largest in this tile.
        const i32 nearest = KEYS ? row - (first + TILE - 1) : first - (row + STREAM - 1);
        const i32 farthest = KEYS ? row + STREAM - 1 - first : first + TILE - 1 - row;
        if (nearest < 0 || farthest >= reach) {
#pragma unroll
            for (int j = 0; j < N; j++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    i32 distance = own_row + e / 2 * 8 - (row + j * 8 + lane % 4 * 2 + e % 2);
                    if (KEYS) distance = -distance;
                    if (distance < 0 || distance >= reach) p[j][e] = minus_infinity;
                }
            }
        }
#pragma unroll
        for (int j = 0; j < N; j++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float l = own_lse[e / 2];
                if (KEYS) l = *(const float*)(x + (j * 8 + lane % 4 * 2 + e % 2) * STRIDE + D) * LOG2_E;
                p[j][e] = exp2_fast(p[j][e] * scale_log2 - l);
            }
        }

        if (L::BUFFERS > 1) {
            wait_group<1>();
            // The streamed y is here.
            __syncthreads();
        }
        if constexpr (VALUES) add_product<D, N>(y_sum, p, t_y);
        if constexpr (SCORES) {
            // In parts where registers are short.
            constexpr int PARTS = KEYS && D == 128 ? 2 : 1, M = N / PARTS;
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                float ds[M][4];
                product<D, M>(ds, a_y, b_y + part * M * 8 * STRIDE * 2);
#pragma unroll
                for (int i = 0; i < M; i++) {
                    const int j = part * M + i;
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        float d = own_delta[e / 2];
                        if (KEYS) d = *(const float*)(x + (j * 8 + lane % 4 * 2 + e % 2) * STRIDE + D + 2);
                        p[j][e] *= ds[i][e] - d;
                    }
                }
            }
        }
        if (L::BUFFERS > 1) {
            // All warps have done with y.
            __syncthreads();
            if (next_head < group) load_y(next_head, next_row);
            commit();
        }
        if constexpr (SCORES) add_product<D, N>(x_sum, p, shared_address(x + t_offset));
        if (L::BUFFERS == 1) {
            __syncthreads();
            if (next_head < group) {
                load_x(next_head, next_row, 0);
                load_y(next_head, next_row);
            }
            commit();
        }
        head = next_head;
        row = next_row;
        buffer ^= 1;
    }

    // A warp's own rows of the own tiles are read by no other warp.
    const i32 valid = length - first - warp * 16;
    const i64 at = warp * 16 * own.stride;
    elem* staged = own_x + warp * 16 * STRIDE;
    if constexpr (SCORES) write_rows<D>(dx + at, own.stride, valid, x_sum, scale, staged);
    if constexpr (VALUES) write_rows<D>(dy + at, own.stride, valid, y_sum, 1.0f, staged);
    wait_group<0>();
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
    lse += row_at;
    delta += row_at;
    dk += own_at;
    dv += own_at;
    if constexpr (D <= 128) {
        pass<D, true, true, true>(own, other, lse, delta, dk, dv, first, length, heads, group, reach);
    } else {
        // Both sums do not fit in registers.
        pass<D, true, false, true>(own, other, lse, delta, dk, dv, first, length, heads, group, reach);
        __syncthreads();
        pass<D, true, true, false>(own, other, lse, delta, dk, dv, first, length, heads, group, reach);
    }
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
    pass<D, false, true, false>(
        own, other, lse + row_at, delta + row_at, dq + own_at, nullptr, first, length, heads, 1, reach
    );
}

#define BACKWARD(D)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_backward_keys_##D(                           \
        const elem* __restrict__ q, const elem* __restrict__ k, const elem* __restrict__ v,                         \
        const elem* __restrict__ dout, const float* __restrict__ lse, const float* __restrict__ delta,              \
        elem* __restrict__ dk, elem* __restrict__ dv, const u32* __restrict__ cu_seqlens, u32 heads, u32 kv_heads,  \
        u32 window                                                                                                  \
    ) {                                                                                                             \
        after_previous();                                                                                           \
        backward_keys<D>(q, k, v, dout, lse, delta, dk, dv, cu_seqlens, heads, kv_heads, window);                   \
    }                                                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_backward_queries_##D(                        \
        const elem* __restrict__ q, const elem* __restrict__ k, const elem* __restrict__ v,                         \
        const elem* __restrict__ dout, const float* __restrict__ lse, const float* __restrict__ delta,              \
        elem* __restrict__ dq, const u32* __restrict__ cu_seqlens, u32 heads, u32 kv_heads, u32 window              \
    ) {                                                                                                             \
        after_previous();                                                                                           \
        backward_queries<D>(q, k, v, dout, lse, delta, dq, cu_seqlens, heads, kv_heads, window);                    \
    }

BACKWARD(64)
BACKWARD(80)
BACKWARD(96)
BACKWARD(128)
BACKWARD(256)

#endif
