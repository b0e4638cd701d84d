#include "common.cuh"
// Base weights on their way into the arena: converted from the dtype of their file, or drawn at random for shapes whose
// files are not at hand (normal by Box-Muller over Philox counters).
//
// out bf16 [n], element first + i of the weight; mean 0, standard deviation std, or `constant` when std is 0.
// grid: ceil(n / 1024), block 256: four elements a thread.
extern "C" __global__ void random_weights(u16* out, u64 first, u64 n, u64 seed, float std, float constant) {
    after_previous();
    u64 four = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (four * 4 >= n) return;
    u64 counter = first / 4 + four;
    Words w = philox((u32)counter, (u32)(counter >> 32), 0x77656967u, 0, seed);
    float v[4];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float u = ((float)(w.w[2 * i] >> 8) + 0.5f) * (1.0f / 16777216.0f);
        float angle = (float)w.w[2 * i + 1] * (6.2831853f / 4294967296.0f);
        float r = sqrtf(-2.0f * logf(u)) * std;
        v[2 * i] = r * cosf(angle);
        v[2 * i + 1] = r * sinf(angle);
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (four * 4 + i < n) out[four * 4 + i] = f32_to_bf16(std == 0.0f ? constant : v[i]);
}

// A dense weight from its file: `source` is bf16 (0), f16 (1) or f32 (2), [n]; `out` is elem, or f32 when `master`.
// grid: ceil(n / 256), block 256.
extern "C" __global__ void convert_weights(void* out, const void* source, u64 n, u32 dtype, u32 master) {
    after_previous();
    u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float x = dtype == 2 ? ((const float*)source)[i] : dtype == 1 ? f16_to_f32(((const u16*)source)[i]) : bf16_to_f32(((const u16*)source)[i]);
    if (master)
        ((float*)out)[i] = x;
    else
        store((elem*)out + i, x);
}
