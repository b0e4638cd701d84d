// B of a LoRA pair, scaled, as columns beside a matrix: read by lora.cu and by the launch that decodes a 4-bit weight.
#pragma once

// out[i][c] for c in from .. first + round_up(r, 8): scale * b[i][c - first] where c is one of B's columns, else 0.
// b: f32 [n, r]; rows of out are `row` elements apart; from, first and row are multiples of 8. All threads of the grid call it.
__device__ __forceinline__ void beside(const float* b, elem* out, u32 n, u32 r, u32 from, u32 first, u32 row, float scale) {
    u32 pieces = (first + (r + 7) / 8 * 8 - from) / 8;
    u32 step = gridDim.x * blockDim.x;
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < n * pieces; i += step) {
        u32 at = i / pieces, c = from + i % pieces * 8;
        elem* to = out + (u64)at * row + c;
#pragma unroll
        for (int part = 0; part < 8; part += VEC) {
            float v[VEC];
#pragma unroll
            for (int j = 0; j < VEC; j++) {
                // Left of `first` the difference wraps around: beyond r.
                u32 column = c + part + j - first;
                v[j] = column < r ? scale * b[(u64)at * r + column] : 0.0f;
            }
            store_vec(to + part, v);
        }
    }
}
