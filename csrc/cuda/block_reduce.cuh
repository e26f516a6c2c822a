// Sum over a block, in an order that depends on nothing but the number of threads.
#pragma once
#include "platform.cuh"

namespace dlkern::cuda {

// Sum of floats or doubles over the warp's 32 lanes; every lane receives it.
template <class N>
DLKERN_DEVICE N warp_sum(N value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// Sum over the block's THREADS threads (a multiple of 32); every thread receives it. `partial`: shared, 32 numbers, free
// again after the next barrier.
template <int THREADS, class N>
DLKERN_DEVICE N block_sum(N value, N* partial) {
  static_assert(THREADS % 32 == 0 && THREADS <= 1024);
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  N sum = 0;
#pragma unroll
  for (int warp = 0; warp < THREADS / 32; warp++) sum += partial[warp];
  return sum;
}

}  // namespace dlkern::cuda
