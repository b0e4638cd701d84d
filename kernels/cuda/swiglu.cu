// silu(gate) * up and its gradient; element by element over n = T * F.
//
// swiglu:          out = gate / (1 + exp(-gate)) * up.
// swiglu_backward: in place: `gate` and `up` become their gradients; dout [T, F] is the gradient of the output.
// Grid: any number of blocks of 256 threads; each thread takes VEC elements at a time.
#include "common.cuh"

#define THREADS 256

__device__ __forceinline__ float forward(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }

__device__ __forceinline__ void backward(float& gate, float& up, float dout) {
    float sigmoid = 1.0f / (1.0f + expf(-gate));
    float silu = gate * sigmoid;
    gate = dout * up * (sigmoid + silu * (1.0f - sigmoid));
    up = dout * silu;
}

extern "C" __global__ void __launch_bounds__(THREADS)
swiglu(const elem* gate, const elem* up, elem* out, u64 n) {
    u64 step = (u64)gridDim.x * THREADS * VEC;
    for (u64 i = ((u64)blockIdx.x * THREADS + threadIdx.x) * VEC; i < n; i += step) {
        if (i + VEC <= n) {
            float g[VEC], u[VEC];
            load_vec(gate + i, g);
            load_vec(up + i, u);
#pragma unroll
            for (int j = 0; j < VEC; j++) g[j] = forward(g[j], u[j]);
            store_vec(out + i, g);
        } else {
            for (u64 j = i; j < n; j++) store(out + j, forward(load(gate + j), load(up + j)));
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
swiglu_backward(elem* gate, elem* up, const elem* dout, u64 n) {
    u64 step = (u64)gridDim.x * THREADS * VEC;
    for (u64 i = ((u64)blockIdx.x * THREADS + threadIdx.x) * VEC; i < n; i += step) {
        if (i + VEC <= n) {
            float g[VEC], u[VEC], d[VEC];
            load_vec(gate + i, g);
            load_vec(up + i, u);
            load_vec(dout + i, d);
#pragma unroll
            for (int j = 0; j < VEC; j++) backward(g[j], u[j], d[j]);
            store_vec(gate + i, g);
            store_vec(up + i, u);
        } else {
            for (u64 j = i; j < n; j++) {
                float g = load(gate + j), u = load(up + j);
                backward(g, u, load(dout + j));
                store(gate + j, g);
                store(up + j, u);
            }
        }
    }
}
