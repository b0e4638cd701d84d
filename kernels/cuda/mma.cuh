// Matrix instructions of compute capability 8.0 on tiles whose rows are padded by 16 bytes, so that ldmatrix has no bank conflicts.
#pragma once

// c [16, 8] += a [16, 16] b [16, 8].
__device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Starts copying ROWS rows of D elements, `stride` elements apart; zeros from row `valid` on.
template <int D, int ROWS = TILE>
__device__ __forceinline__ void load_tile(u32 to, const elem* from, i64 stride, i32 valid) {
    // Threads side by side along a row: the power of two in its number of 16-byte chunks, so that addresses are linear.
    constexpr int CHUNKS = D / 8, ACROSS = CHUNKS & -CHUNKS, DOWN = THREADS / ACROSS;
    const int row = threadIdx.x / ACROSS, chunk = threadIdx.x % ACROSS;
    from += row * stride + chunk * 8;
    to += (row * (D + 8) + chunk * 8) * 2;
#pragma unroll
    for (int i = 0; i < (ROWS + DOWN - 1) / DOWN; i++) {
        if (DOWN > ROWS && row >= ROWS) break;
#pragma unroll
        for (int j = 0; j < CHUNKS / ACROSS; j++) {
            copy_async(
                to + (i * DOWN * (D + 8) + j * ACROSS * 8) * 2, from + i * DOWN * stride + j * ACROSS * 8,
                row + i * DOWN < valid
            );
        }
    }
}
