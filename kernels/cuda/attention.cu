// Causal attention inside each example, with a running softmax (arXiv 2205.14135): bf16, head sizes 64, 80, 96, 128, 256.
//
// q [T, H, D], k and v [T, K, D], out [T, H, D] bf16; lse [T, H] f32 = log(sum(exp(score))), score = q k^T / sqrt(D);
// cu_seqlens [B + 1] u32. With `window` > 0 the query at position p sees the keys p - window + 1 ..= p, else 0 ..= p.
//
// attention_D: grid (ceil(longest example / 64), H, B).
// cached_attention_D: one example whose T queries stand at the positions `before` .. `before` + T of the cached keys and
// values [S, K, D]; no lse; grid (ceil(T / 64), H).
//
// 128 threads: a block owns 64 queries of one head, a warp 16 of them. Dynamic
// shared memory: a tile of 64 keys and one of 64 values (and for D = 256 the queries), rows padded by 16 bytes so that
// ldmatrix has no bank conflicts. Values travel while scores are computed, the next keys while P V is.
#include "common.cuh"
#include "attention.cuh"
#include "mma.cuh"

#ifndef ELEM_F32

// One tile of queries of an example: q, out and lse from its first query on, k and v from its first key on. `length`
// queries, the first of them with `before` keys before its own.
template <int D>
__device__ __forceinline__ void attend(
    const elem* q, const elem* k, const elem* v, elem* out, float* lse, i32 length, i32 before, u32 heads, u32 kv_heads,
    u32 window
) {
    constexpr int STRIDE = D + 8;
    constexpr bool Q_IN_REGISTERS = D <= 128;
    extern __shared__ Words dynamic_shared[];
    elem* keys_tile = (elem*)dynamic_shared;
    elem* values_tile = keys_tile + TILE * STRIDE;
    // Where the queries stay in shared memory they have a place of their own, else they pass through the values'.
    elem* queries_tile = Q_IN_REGISTERS ? values_tile : values_tile + TILE * STRIDE;

    // The longest rows first.
    const i32 tile = gridDim.x - 1 - blockIdx.x;
    const u32 head = blockIdx.y, kv_head = head / (heads / kv_heads);
    const i32 first_query = tile * TILE;
    if (first_query >= length) return;

    const i32 reach = window ? (i32)window : 0x3fffffff;
    // The position of the first query, and the end of the keys that the block sees.
    const i32 first = before + first_query, end = before + min(first_query + TILE, length);
    const i32 first_key = max(first - reach + 1, 0) / TILE * TILE;
    const i64 q_stride = (i64)heads * D, k_stride = (i64)kv_heads * D;
    q += first_query * q_stride + head * D;
    out += first_query * q_stride + head * D;
    k += kv_head * D;
    v += kv_head * D;

    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    // ldmatrix addresses: an A operand and a transposed B operand take their rows alike.
    const u32 keys_at = shared_address(keys_tile), values_at = shared_address(values_tile);
    const u32 q_address = shared_address(queries_tile) + ((warp * 16 + lane % 16) * STRIDE + lane / 16 * 8) * 2;
    const u32 k_address = keys_at + ((lane % 8 + lane / 16 * 8) * STRIDE + lane / 8 % 2 * 8) * 2;
    const u32 v_address = values_at + (lane % 16 * STRIDE + lane / 16 * 8) * 2;

    load_tile<D>(shared_address(queries_tile), q, q_stride, length - first_query);
    commit();
    load_tile<D>(keys_at, k + first_key * k_stride, k_stride, end - first_key);
    commit();

    u32 q_fragments[Q_IN_REGISTERS ? D / 16 : 1][4];
    if (Q_IN_REGISTERS) {
        wait_group<1>();
        __syncthreads();
#pragma unroll
        for (int i = 0; i < (Q_IN_REGISTERS ? D / 16 : 0); i++) load_matrices(q_fragments[i], q_address + i * 32);
    }

    // Rows of this lane: this and 8 after.
    const i32 row = warp * 16 + lane / 4;
    constexpr float D_AS_FLOAT = D;
    const float scale = 1.0f / sqrtf(D_AS_FLOAT), scale_log2 = scale * LOG2_E;
    float o[D / 8][4] = {};
    float top[2] = {MINUS_INFINITY, MINUS_INFINITY}, sum[2] = {0.0f, 0.0f};

    for (i32 key = first_key; key < end; key += TILE) {
        wait_group<0>();
        // The keys are here; all warps have done with the values (and, at first, the queries) that lie in the other tile.
        __syncthreads();
        load_tile<D>(values_at, v + key * k_stride, k_stride, end - key);
        commit();

        float s[TILE / 8][4] = {};
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
            u32 a[4];
            if (!Q_IN_REGISTERS) load_matrices(a, q_address + i * 32);
#pragma unroll
            for (int j = 0; j < TILE / 16; j++) {
                u32 b[4];
                load_matrices(b, k_address + (j * 16 * STRIDE + i * 16) * 2);
                multiply(s[2 * j], Q_IN_REGISTERS ? q_fragments[Q_IN_REGISTERS ? i : 0] : a, b[0], b[1]);
                multiply(s[2 * j + 1], Q_IN_REGISTERS ? q_fragments[Q_IN_REGISTERS ? i : 0] : a, b[2], b[3]);
            }
        }

        wait_group<0>();
        // The values are here; all warps have done with the keys.
        __syncthreads();
        if (key + TILE < end) load_tile<D>(keys_at, k + (key + TILE) * k_stride, k_stride, end - key - TILE);
        commit();

        if (key + TILE - 1 > first || first + TILE - 1 - key >= reach) hide(s, first + row, key, reach);

        softmax(s, top, sum, o, scale_log2);

#pragma unroll
        for (int i = 0; i < TILE / 16; i++) {
            u32 p[4] = {
                pack_bf16(s[2 * i][0], s[2 * i][1]), pack_bf16(s[2 * i][2], s[2 * i][3]),
                pack_bf16(s[2 * i + 1][0], s[2 * i + 1][1]), pack_bf16(s[2 * i + 1][2], s[2 * i + 1][3])
            };
#pragma unroll
            for (int j = 0; j < D / 16; j++) {
                u32 b[4];
                load_matrices_transposed(b, v_address + (i * 16 * STRIDE + j * 16) * 2);
                multiply(o[2 * j], p, b[0], b[1]);
                multiply(o[2 * j + 1], p, b[2], b[3]);
            }
        }
    }

    // Through the warp's own rows of the keys' tile, which nobody reads any more, so that whole lines are written.
    elem* staged = keys_tile + warp * 16 * STRIDE;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float total = quad_sum(sum[r]), inverse = 1.0f / total;
        if (lse && lane % 4 == 0 && first_query + row + r * 8 < length) {
            lse[(i64)(first_query + row + r * 8) * heads + head] = top[r] * scale + logf(total);
        }
#pragma unroll
        for (int j = 0; j < D / 8; j++) {
            *(u32*)(staged + (lane / 4 + r * 8) * STRIDE + j * 8 + lane % 4 * 2) =
                pack_bf16(o[j][2 * r] * inverse, o[j][2 * r + 1] * inverse);
        }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        int n = lane + i * WARP, r = n / (D / 8), chunk = n % (D / 8);
        if (first_query + warp * 16 + r < length) {
            *(Words*)(out + (warp * 16 + r) * q_stride + chunk * 8) = *(const Words*)(staged + r * STRIDE + chunk * 8);
        }
    }
}

#define ATTENTION(D, BLOCKS)                                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attention_##D(                                    \
        const elem* __restrict__ q, const elem* __restrict__ k, const elem* __restrict__ v, elem* __restrict__ out, \
        float* __restrict__ lse, const u32* __restrict__ cu_seqlens, u32 heads, u32 kv_heads, u32 window            \
    ) {                                                                                                             \
        after_previous();                                                                                           \
        const i64 start = cu_seqlens[blockIdx.z], at = start * heads * D, kv_at = start * kv_heads * D;             \
        const i32 length = (i32)(cu_seqlens[blockIdx.z + 1] - start);                                               \
        attend<D>(q + at, k + kv_at, v + kv_at, out + at, lse + start * heads, length, 0, heads, kv_heads, window); \
    }                                                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) cached_attention_##D(                             \
        const elem* __restrict__ q, const elem* __restrict__ k_cache, const elem* __restrict__ v_cache,             \
        elem* __restrict__ out, u32 tokens, u32 before, u32 heads, u32 kv_heads, u32 window                         \
    ) {                                                                                                             \
        after_previous();                                                                                           \
        attend<D>(q, k_cache, v_cache, out, nullptr, tokens, before, heads, kv_heads, window);                      \
    }

ATTENTION(64, 3)
ATTENTION(80, 3)
ATTENTION(96, 3)
ATTENTION(128, 2)
ATTENTION(256, 2)

#endif
