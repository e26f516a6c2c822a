// What the current device gives a block of threads: launchers choose sizes by it.
#pragma once
#include "platform.cuh"

namespace dlkern::cuda {

// Of shared memory that a launch may ask for: what every GPU from compute capability 8.0 on has, and what this one has
// (99 KB with 8.6, 8.9 and 12, 163 with 8.0, 227 with 9.0).
constexpr int kLeastSharedBytes = 99 * 1024;
inline int most_shared_bytes() {
#ifdef __CUDACC__
  int device = 0, bytes = 0;
  throw_on_error(cudaGetDevice(&device), "cudaGetDevice");
  throw_on_error(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "attribute");
  return bytes;
#else
  return ::cuda_on_host::most_shared_bytes();
#endif
}

}  // namespace dlkern::cuda
