// Sum over a block, in an order that depends on nothing but the number of threads.
#pragma once
#include "platform.cuh"

namespace dlkern::cuda {

// Sum over the warp's 32 lanes; every lane receives it.
DLKERN_DEVICE float warp_sum(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// Sum over the block's THREADS threads (a multiple of 32); every thread receives it. `partial`: shared, 32 floats, free
// again after the next barrier.
template <int THREADS>
DLKERN_DEVICE float block_sum(float value, float* partial) {
  static_assert(THREADS % 32 == 0 && THREADS <= 1024);
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < THREADS / 32; warp++) sum += partial[warp];
  return sum;
}

}  // namespace dlkern::cuda
