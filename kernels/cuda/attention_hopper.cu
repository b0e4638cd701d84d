// Causal attention on the matrix units of compute capability 9.0: as attention.cu, which see, for head size 128.
//
// attention_hopper_D: grid (ceil(longest example / 64), H, B), 128 threads: a warpgroup owns 64 queries, which it keeps in
// registers, and streams tiles of 64 keys and values, two of each in shared memory (hopper.cuh). Three blocks share a
// multiprocessor: while one computes exponentials, another multiplies.
#include "common.cuh"
#include "attention.cuh"
#include "hopper.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) && !defined(ELEM_F32)

template <int D>
__device__ __forceinline__ void attend(
    const elem* q, const elem* k, const elem* v, elem* out, float* lse, i32 length, u32 heads, u32 kv_heads, u32 window
) {
    constexpr int BYTES = D / 64 * PART;
    extern __shared__ __align__(1024) u8 dynamic_shared[];
    const u32 shared = shared_address(dynamic_shared);
    // Keys and values of the even and the odd tiles; the queries come first through the odd tile's keys.
    const u32 keys_at = shared, values_at = shared + 2 * BYTES;

    // The longest rows first.
    const i32 first = (gridDim.x - 1 - blockIdx.x) * TILE;
    const u32 head = blockIdx.y, kv_head = head / (heads / kv_heads);
    if (first >= length) return;
    const i32 reach = window ? (i32)window : 0x3fffffff;
    const i32 end = min(first + TILE, length), first_key = max(first - reach + 1, 0) / TILE * TILE;
    const i64 q_stride = (i64)heads * D, k_stride = (i64)kv_heads * D;
    q += first * q_stride + head * D;
    out += first * q_stride + head * D;
    k += kv_head * D;
    v += kv_head * D;

    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    load_tile<D>(keys_at + BYTES, q, q_stride, length - first);
    load_tile<D>(keys_at, k + first_key * k_stride, k_stride, end - first_key);
    load_tile<D>(values_at, v + first_key * k_stride, k_stride, end - first_key);
    commit();
    copies_done();
    __syncthreads();
    u32 queries[D / 16][4];
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        load_matrices(queries[i], keys_at + BYTES + place(warp * 16 + lane % 16, i * 2 + lane / 16));
    }

    // Rows of this lane: this and 8 after.
    const i32 row = first + warp * 16 + lane / 4;
    constexpr float D_AS_FLOAT = D;
    const float scale = 1.0f / sqrtf(D_AS_FLOAT), scale_log2 = scale * LOG2_E;
    float o[D / 8][4] = {};
    float top[2] = {MINUS_INFINITY, MINUS_INFINITY}, sum[2] = {0.0f, 0.0f};

    u32 stage = 0;
    for (i32 key = first_key; key < end; key += TILE) {
        // This tile's keys and values are here, and all warps have done with the other tile.
        copies_done();
        __syncthreads();
        const u32 keys = keys_at + stage * BYTES, values = values_at + stage * BYTES;
        stage ^= 1;
        if (key + TILE < end) {
            const i64 next = (i64)(key + TILE) * k_stride;
            load_tile<D>(keys_at + stage * BYTES, k + next, k_stride, end - key - TILE);
            load_tile<D>(values_at + stage * BYTES, v + next, k_stride, end - key - TILE);
        }
        commit();

        float s[TILE / 8][4];
        pin(s);
        products_begin();
#pragma unroll
        for (int i = 0; i < D / 16; i++) multiply(s, queries[i], columns(keys, i), i > 0);
        products_commit();
        products_wait<0>();
        pin(s);

        if (key + TILE - 1 > first || first + TILE - 1 - key >= reach) hide(s, row, key, reach);

        softmax(s, top, sum, o, scale_log2);

        u32 p[4][4];
        pack(p, s);
        pin(o);
        products_begin();
#pragma unroll
        for (int i = 0; i < TILE / 16; i++) add_rows(o, p[i], rows(values, i));
        products_commit();
        products_wait<0>();
        pin(o);
    }

    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float total = quad_sum(sum[r]);
        inverse[r] = 1.0f / total;
        if (lane % 4 == 0 && row + r * 8 < length) {
            lse[(i64)(row + r * 8) * heads + head] = top[r] * scale + logf(total);
        }
    }
    // All warps have done with the tiles.
    __syncthreads();
    write_rows<D>(
        out + warp * 16 * q_stride, q_stride, length - first - warp * 16, o, inverse,
        (elem*)dynamic_shared + warp * 16 * (D + 8)
    );
}

#define ATTENTION(D)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 3) attention_hopper_##D(                                    \
        const elem* __restrict__ q, const elem* __restrict__ k, const elem* __restrict__ v, elem* __restrict__ out,   \
        float* __restrict__ lse, const u32* __restrict__ cu_seqlens, u32 heads, u32 kv_heads, u32 window              \
    ) {                                                                                                               \
        after_previous();                                                                                             \
        const i64 start = cu_seqlens[blockIdx.z], at = start * heads * D, kv_at = start * kv_heads * D;               \
        const i32 length = (i32)(cu_seqlens[blockIdx.z + 1] - start);                                                 \
        attend<D>(q + at, k + kv_at, v + kv_at, out + at, lse + start * heads, length, heads, kv_heads, window);      \
    }

ATTENTION(128)

#endif
