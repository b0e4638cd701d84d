// Matrix instructions of compute capability 9.0: a warpgroup (128 threads) multiplies tiles that lie in shared memory.
//
// A tile has 64 rows of D elements (bf16), in D / 64 parts of 64 x 64: rows of 128 bytes, whose 16-byte chunks are
// exchanged by row (chunk ^ row % 8), as the instructions want them. A part has 8 KiB, aligned to 1 KiB. The same tile
// serves as rows times columns of D, and transposed as D columns.
#pragma once

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

#define PART 8192

// All copies are done, and the matrix units may read them after the next barrier.
__device__ __forceinline__ void copies_done() {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Where chunk `chunk` (16 bytes) of a row lies in a tile.
__device__ __forceinline__ u32 place(u32 row, u32 chunk) {
    return chunk / 8 * PART + row * 128 + ((chunk % 8) ^ (row % 8)) * 16;
}

// Starts copying 64 rows of D elements, `stride` elements apart; zeros from row `valid` on.
template <int D>
__device__ __forceinline__ void load_tile(u32 to, const elem* from, i64 stride, i32 valid) {
    constexpr int CHUNKS = D / 8, DOWN = THREADS / CHUNKS;
    const int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
    from += row * stride + chunk * 8;
#pragma unroll
    for (int i = 0; i < TILE / DOWN; i++) {
        copy_async(to + place(row + i * DOWN, chunk), from + i * DOWN * stride, row + i * DOWN < valid);
    }
}

// Descriptors of 16 elements of D of all rows (`step` of D / 16), and of 16 rows of all D, transposed (`step` of 4).
// Fields: address, distance of parts, distance of groups of 8 rows (all / 16), and the exchange of chunks (1 << 62).
__device__ __forceinline__ u64 columns(u32 tile, int step) {
    return (u64)((tile + step / 4 * PART + step % 4 * 32) >> 4) | 1ull << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62;
}
__device__ __forceinline__ u64 rows(u32 tile, int step) {
    return (u64)((tile + step * 2048) >> 4) | (u64)(PART >> 4) << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62;
}

// Before the first product that reads or adds to registers.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most N of the newest groups are under way.
template <int N>
__device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

#define ACC4(c, j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define ACC32(c, j) \
    ACC4(c, j), ACC4(c, j + 1), ACC4(c, j + 2), ACC4(c, j + 3), ACC4(c, j + 4), ACC4(c, j + 5), ACC4(c, j + 6), \
        ACC4(c, j + 7)
#define NAMES32                                                                                                   \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES64                                                                                                   \
    NAMES32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, "    \
            "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// Nothing that reads or writes these sums is moved across this place by the compiler, which does not know that products
// go on until they are waited for.
template <int N>
__device__ __forceinline__ void pin(float (&c)[N][4]) {
#pragma unroll
    for (int j = 0; j < N; j++) asm volatile("" : ACC4(c, j)::"memory");
}

// c [64, 64] (+)= a b^T, both described; 16 elements of D.
__device__ __forceinline__ void multiply(float (&c)[8][4], u64 a, u64 b, bool add) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NAMES32 "}, %32, %33, p, 1, 1, 0, 0; }"
        : ACC32(c, 0)
        : "l"(a), "l"(b), "r"((u32)add));
}
// The same with a [64, 16] in registers.
__device__ __forceinline__ void multiply(float (&c)[8][4], const u32 (&a)[4], u64 b, bool add) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NAMES32 "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0; }"
        : ACC32(c, 0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((u32)add));
}
// c [64, D] += a b, a [64, 16] in registers, b 16 rows of a tile.
__device__ __forceinline__ void add_rows(float (&c)[8][4], const u32 (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NAMES32 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
        : ACC32(c, 0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void add_rows(float (&c)[16][4], const u32 (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NAMES64 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
        : ACC32(c, 0), ACC32(c, 8)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// A [64, 64] of f32, rounded, as the left side of four products.
__device__ __forceinline__ void pack(u32 (&a)[4][4], const float (&c)[8][4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        a[i][0] = pack_bf16(c[2 * i][0], c[2 * i][1]);
        a[i][1] = pack_bf16(c[2 * i][2], c[2 * i][3]);
        a[i][2] = pack_bf16(c[2 * i + 1][0], c[2 * i + 1][1]);
        a[i][3] = pack_bf16(c[2 * i + 1][2], c[2 * i + 1][3]);
    }
}

#endif
