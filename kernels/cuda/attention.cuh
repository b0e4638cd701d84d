// What the tiled attention kernels share: asynchronous copies, matrices from shared memory, the running softmax of a tile of scores
// (arXiv 2205.14135), and how a warp writes its rows. A block of THREADS owns a tile of TILE rows, a warp 16 of them; a lane holds the rows
// lane / 4 and 8 after, of each the columns 2 (lane % 4) and 1 after of every 8.
#pragma once

#define TILE 64
#define THREADS 128
#define LOG2_E 1.4426950408889634f
#define MINUS_INFINITY __int_as_float(0xff800000)

// 16 bytes from global to shared memory, or zeros.
__device__ __forceinline__ void copy_async(u32 to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy_async_4(u32 to, const void* from, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(valid ? 4 : 0) : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most N of the newest groups are under way.
template <int N>
__device__ __forceinline__ void wait_group() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8x8 matrices; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Max and sum over the four lanes that hold a row of a product.
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(FULL_MASK, x, 1));
    return fmaxf(x, __shfl_xor_sync(FULL_MASK, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(FULL_MASK, x, 1);
    return x + __shfl_xor_sync(FULL_MASK, x, 2);
}

// Scores of keys that a query does not see: those after it, and those `reach` or more before. `query`: the position of the lane's first
// row; `key`: of the tile's first key.
__device__ __forceinline__ void hide(float (&s)[TILE / 8][4], i32 query, i32 key, i32 reach) {
#pragma unroll
    for (int j = 0; j < TILE / 8; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            i32 distance = query + e / 2 * 8 - (key + j * 8 + threadIdx.x % 4 * 2 + e % 2);
            if (distance < 0 || distance >= reach) s[j][e] = MINUS_INFINITY;
        }
    }
}

// A tile of scores becomes probabilities, up to a factor that changes with the largest score `top`: what was summed before, in `sum` and
// in the rows `o`, shrinks with it.
template <int N>
__device__ __forceinline__ void softmax(float (&s)[TILE / 8][4], float (&top)[2], float (&sum)[2], float (&o)[N][4], float scale_log2) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float largest = top[r];
#pragma unroll
        for (int j = 0; j < TILE / 8; j++) largest = fmaxf(largest, fmaxf(s[j][2 * r], s[j][2 * r + 1]));
        largest = quad_max(largest);
        // Where nothing is visible yet all scores are -inf: any finite number will do.
        float base = (largest == MINUS_INFINITY ? 0.0f : largest) * scale_log2;
        float shrink = exp2_fast(top[r] * scale_log2 - base);
        top[r] = largest;
        float part = 0.0f;
#pragma unroll
        for (int j = 0; j < TILE / 8; j++) {
            s[j][2 * r] = exp2_fast(s[j][2 * r] * scale_log2 - base);
            s[j][2 * r + 1] = exp2_fast(s[j][2 * r + 1] * scale_log2 - base);
            part += s[j][2 * r] + s[j][2 * r + 1];
        }
        sum[r] = sum[r] * shrink + part;
#pragma unroll
        for (int j = 0; j < N; j++) {
            o[j][2 * r] *= shrink;
            o[j][2 * r + 1] *= shrink;
        }
    }
}

__device__ __forceinline__ float factor_of(float factor, int) { return factor; }
__device__ __forceinline__ float factor_of(const float (&factor)[2], int half) { return factor[half]; }

// Writes a warp's 16 rows, times one factor or each half times its own, through `staged` (16 rows of D + 8 elements of shared memory
// that only this warp uses) so that whole lines are written.
template <int D, typename Factor>
__device__ __forceinline__ void write_rows(
    elem* to, i64 stride, i32 valid, const float (&c)[D / 8][4], const Factor& factor, elem* staged
) {
    const int lane = threadIdx.x % WARP;
    __syncwarp();
#pragma unroll
    for (int j = 0; j < D / 8; j++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            *(u32*)(staged + (lane / 4 + r * 8) * (D + 8) + j * 8 + lane % 4 * 2) =
                pack_bf16(c[j][2 * r] * factor_of(factor, r), c[j][2 * r + 1] * factor_of(factor, r));
        }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        int n = lane + i * WARP, row = n / (D / 8), chunk = n % (D / 8);
        if (row < valid) *(Words*)(to + row * stride + chunk * 8) = *(const Words*)(staged + row * (D + 8) + chunk * 8);
    }
}

// What a block works on. Its own rows and the streamed ones are keys (`x` = k, `y` = v) or queries (`x` = q, `y` = dout):
// scores are products of `x`, gradients of probabilities products of `y`.
struct Side {
    const elem *x, *y;
    i64 stride;
};
