// The part of an input's gradient that came through LoRA with dropout: dx = sum over modules of mask / (1 - p) * (dxa A).
//
// lora_dx: dx bf16 [rows, k]; of each of up to three modules: dxa bf16, `columns` of a matrix whose rows are `row` elements apart, A bf16
//          [columns, k], mask u8 [rows, k / 8] as dropout_kept of linear.cu writes it, keep = 1 / (1 - p). k is a multiple of 128, columns
//          of 16, row of 8; a module that is not there has no columns.
// Grid (k / 128, ceil(rows / 64)), 128 threads: a block has a tile of 64 x 128, a warp 16 rows of it. Products on mma.sync with f32 sums,
// rounded once.
#include "common.cuh"
#include "attention.cuh"
#include "mma.cuh"

#ifndef ELEM_F32

#define WIDE 128
// Columns of dxa that a block holds at a time.
#define DEEP 64

struct Through {
    const elem* dxa;
    const elem* a;
    const u8* mask;
    float keep;
    u32 columns;
};

extern "C" __global__ void __launch_bounds__(THREADS)
lora_dx(elem* dx, u32 rows, u32 k, u32 row, const elem* dxa0, const elem* a0, const u8* mask0, float keep0, u32 columns0,
        const elem* dxa1, const elem* a1, const u8* mask1, float keep1, u32 columns1, const elem* dxa2, const elem* a2,
        const u8* mask2, float keep2, u32 columns2) {
    after_previous();
    const Through modules[3] = {
        {dxa0, a0, mask0, keep0, columns0}, {dxa1, a1, mask1, keep1, columns1}, {dxa2, a2, mask2, keep2, columns2}};
    __shared__ __align__(16) elem dxa_tile[TILE * (DEEP + 8)];
    __shared__ __align__(16) elem a_tile[DEEP * (WIDE + 8)];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const u32 first_row = blockIdx.y * TILE, first_column = blockIdx.x * WIDE;
    const u32 dxa_at = shared_address(dxa_tile), a_at = shared_address(a_tile);
    const u32 dxa_address = dxa_at + ((warp * 16 + lane % 16) * (DEEP + 8) + lane / 16 * 8) * 2;
    const u32 a_address = a_at + (lane % 16 * (WIDE + 8) + lane / 16 * 8) * 2;

    float sum[WIDE / 8][4] = {};
#pragma unroll
    for (int i = 0; i < 3; i++) {
        const Through m = modules[i];
        if (m.columns == 0) continue;
        float part[WIDE / 8][4] = {};
        for (u32 deep = 0; deep < m.columns; deep += DEEP) {
            const u32 here = m.columns - deep < DEEP ? m.columns - deep : DEEP, chunks = here / 8;
            // All warps have done with what is in the tiles.
            __syncthreads();
            for (u32 n = threadIdx.x; n < TILE * chunks; n += THREADS) {
                u32 r = n / chunks, c = n % chunks * 8, at = first_row + r;
                copy_async(dxa_at + (r * (DEEP + 8) + c) * 2, m.dxa + (u64)(at < rows ? at : 0) * row + deep + c, at < rows);
            }
            for (u32 n = threadIdx.x; n < here * (WIDE / 8); n += THREADS) {
                u32 r = n / (WIDE / 8), c = n % (WIDE / 8) * 8;
                copy_async(a_at + (r * (WIDE + 8) + c) * 2, m.a + (u64)(deep + r) * k + first_column + c, true);
            }
            commit();
            wait_group<0>();
            __syncthreads();
            for (u32 d = 0; d < here; d += 16) {
                u32 left[4];
                load_matrices(left, dxa_address + d * 2);
#pragma unroll
                for (int j = 0; j < WIDE / 16; j++) {
                    u32 right[4];
                    load_matrices_transposed(right, a_address + (d * (WIDE + 8) + j * 16) * 2);
                    multiply(part[2 * j], left, right[0], right[1]);
                    multiply(part[2 * j + 1], left, right[2], right[3]);
                }
            }
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const u32 at = first_row + warp * 16 + lane / 4 + r * 8;
            Words bits = {};
            if (at < rows) bits = *(const Words*)(m.mask + (u64)at * (k / 8) + first_column / 8);
#pragma unroll
            for (int j = 0; j < WIDE / 8; j++) {
                const u32 two = bits.w[j / 4] >> (j % 4 * 8 + lane % 4 * 2);
                sum[j][2 * r] += two & 1 ? m.keep * part[j][2 * r] : 0.0f;
                sum[j][2 * r + 1] += two & 2 ? m.keep * part[j][2 * r + 1] : 0.0f;
            }
        }
    }
    __syncthreads();
    write_rows<WIDE>(
        dx + (u64)(first_row + warp * 16) * k + first_column, k, (i32)rows - (i32)(first_row + warp * 16), sum, 1.0f,
        a_tile + warp * 16 * (WIDE + 8)
    );
}

#endif
