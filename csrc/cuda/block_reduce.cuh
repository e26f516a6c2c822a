// Reductions over a warp and over a block, in an order that depends on nothing but the number of threads.
#pragma once
#include "platform.cuh"

namespace dlkern::cuda {

// The warp's 32 values combined; every lane receives the result.
template <class T, class F>
DLKERN_DEVICE T warp_reduce(T value, F&& combine) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, distance));
  return value;
}

// The values of the block's THREADS threads (a multiple of 32) combined; every thread receives the result. `partial`:
// shared, 32 numbers, free again after the next barrier.
template <int THREADS, class T, class F>
DLKERN_DEVICE T block_reduce(T value, T* partial, F&& combine) {
  static_assert(THREADS % 32 == 0 && THREADS <= 1024);
  value = warp_reduce(value, combine);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  T result = partial[0];
#pragma unroll
  for (int warp = 1; warp < THREADS / 32; warp++) result = combine(result, partial[warp]);
  return result;
}

template <class N>
DLKERN_DEVICE N warp_sum(N value) {
  return warp_reduce(value, [](N a, N b) { return a + b; });
}
template <int THREADS, class N>
DLKERN_DEVICE N block_sum(N value, N* partial) {
  return block_reduce<THREADS>(value, partial, [](N a, N b) { return a + b; });
}

}  // namespace dlkern::cuda
