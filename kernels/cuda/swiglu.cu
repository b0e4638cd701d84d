// act(gate) * up and its gradient, act SiLU (swiglu) or GELU in its tanh form (geglu); element by element over n = T * F.
//
// swiglu, geglu:                   rows of `out` are `row` elements apart (row = width unless width is a multiple of 8); out = gate * sigmoid(z) * up; SiLU: z = gate; GELU: z = 2 sqrt(2 / pi) (gate + 0.044715 gate^3).
// swiglu_backward, geglu_backward: in place: `gate` and `up` become their gradients; dout [T, F] is the gradient of the output.
// Grid: any number of blocks of 256 threads; each thread takes VEC elements at a time.
#include "common.cuh"

#define THREADS 256
#define GELU_LINEAR 1.5957691f
#define GELU_CUBIC 0.071354814f

template <bool GELU>
__device__ __forceinline__ float forward(float gate, float up) {
    float z = GELU ? gate * (GELU_LINEAR + GELU_CUBIC * gate * gate) : gate;
    return gate / (1.0f + expf(-z)) * up;
}

template <bool GELU>
__device__ __forceinline__ void backward(float& gate, float& up, float dout) {
    float square = gate * gate;
    float sigmoid = 1.0f / (1.0f + expf(-(GELU ? gate * (GELU_LINEAR + GELU_CUBIC * square) : gate)));
    float value = gate * sigmoid, bend = value * (1.0f - sigmoid);
    // Where the slope overflows, sigmoid (1 - sigmoid) is 0.
    if (GELU) bend = sigmoid > 0.0f && sigmoid < 1.0f ? bend * (GELU_LINEAR + 3.0f * GELU_CUBIC * square) : 0.0f;
    gate = dout * up * (sigmoid + bend);
    up = dout * value;
}

template <bool GELU>
__device__ __forceinline__ void forward_all(const elem* gate, const elem* up, elem* out, u64 n, u32 width, u32 row) {
    u64 step = (u64)gridDim.x * THREADS * VEC;
    for (u64 i = ((u64)blockIdx.x * THREADS + threadIdx.x) * VEC; i < n; i += step) {
        if (i + VEC <= n) {
            float g[VEC], u[VEC];
            load_vec(gate + i, g);
            load_vec(up + i, u);
#pragma unroll
            for (int j = 0; j < VEC; j++) g[j] = forward<GELU>(g[j], u[j]);
            store_vec(row == width ? out + i : out + i + (u64)((u32)(i / VEC) / (width / VEC)) * (row - width), g);
        } else {
            for (u64 j = i; j < n; j++) store(out + j, forward<GELU>(load(gate + j), load(up + j)));
        }
    }
}

template <bool GELU>
__device__ __forceinline__ void backward_all(elem* gate, elem* up, const elem* dout, u64 n) {
    u64 step = (u64)gridDim.x * THREADS * VEC;
    for (u64 i = ((u64)blockIdx.x * THREADS + threadIdx.x) * VEC; i < n; i += step) {
        if (i + VEC <= n) {
            float g[VEC], u[VEC], d[VEC];
            load_vec(gate + i, g);
            load_vec(up + i, u);
            load_vec(dout + i, d);
#pragma unroll
            for (int j = 0; j < VEC; j++) backward<GELU>(g[j], u[j], d[j]);
            store_vec(gate + i, g);
            store_vec(up + i, u);
        } else {
            for (u64 j = i; j < n; j++) {
                float g = load(gate + j), u = load(up + j);
                backward<GELU>(g, u, load(dout + j));
                store(gate + j, g);
                store(up + j, u);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
swiglu(const elem* gate, const elem* up, elem* out, u64 n, u32 width, u32 row) {
    after_previous();
    forward_all<false>(gate, up, out, n, width, row);
}

extern "C" __global__ void __launch_bounds__(THREADS)
geglu(const elem* gate, const elem* up, elem* out, u64 n, u32 width, u32 row) {
    after_previous();
    forward_all<true>(gate, up, out, n, width, row);
}

extern "C" __global__ void __launch_bounds__(THREADS)
swiglu_backward(elem* gate, elem* up, const elem* dout, u64 n) {
    after_previous();
    backward_all<false>(gate, up, dout, n);
}

extern "C" __global__ void __launch_bounds__(THREADS)
geglu_backward(elem* gate, elem* up, const elem* dout, u64 n) {
    after_previous();
    backward_all<true>(gate, up, dout, n);
}
