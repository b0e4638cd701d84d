// Columns of a matrix as tensors of their own, and back: q, k, v of one product.
//
// copy_columns: to[t][to_first + i] = from[t][from_first + i] for i < width; rows of `from_width` and `to_width` elements.
//               Grid: T blocks of 256 threads, one for each row.
#include "common.cuh"

#define THREADS 256

extern "C" __global__ void __launch_bounds__(THREADS)
copy_columns(const elem* __restrict__ from, elem* __restrict__ to, u32 from_width, u32 from_first, u32 to_width,
             u32 to_first, u32 width) {
    after_previous();
    from += (u64)blockIdx.x * from_width + from_first;
    to += (u64)blockIdx.x * to_width + to_first;
    if ((from_width | from_first | to_width | to_first | width) % VEC == 0) {
        for (u32 i = threadIdx.x; i < width / VEC; i += THREADS) ((Words*)to)[i] = ((const Words*)from)[i];
    } else {
        for (u32 i = threadIdx.x; i < width; i += THREADS) to[i] = from[i];
    }
}
