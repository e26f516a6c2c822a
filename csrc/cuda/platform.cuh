// What every kernel file includes first: CUDA's own headers under nvcc, csrc/cuda_on_host under the host compiler; and
// the few macros through which kernels declare shared memory and are launched, so that both meanings exist.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

#include "element.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define DLKERN_DEVICE __device__ __forceinline__
// DLKERN_SHARED(float, partial, [32]) declares a shared array.
#define DLKERN_SHARED(T, name, ...) __shared__ T name __VA_ARGS__
// The dynamic shared memory of a launch, 1024-byte aligned.
#define DLKERN_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
// What a kernel relies on, looked at on the host.
#define DLKERN_EXPECT(condition)

#else
#include "../cuda_on_host/cuda_on_host.h"

#define DLKERN_DEVICE inline
#define DLKERN_SHARED(T, name, ...)  \
  using name##_type = T __VA_ARGS__; \
  static const char name##_tag = 0;  \
  name##_type& name = *static_cast<name##_type*>(::cuda_on_host::static_shared(&name##_tag, sizeof(name##_type)))
#define DLKERN_DYNAMIC_SHARED(name) \
  unsigned char* const name = static_cast<unsigned char*>(::cuda_on_host::dynamic_shared())
#define DLKERN_EXPECT(condition) ((condition) ? void() : ::cuda_on_host::report("not so: %s", #condition))
#endif

namespace dlkern::cuda {

using bf16 = __nv_bfloat16;
using fp16 = __half;

DLKERN_DEVICE float to_float(float value) { return value; }
DLKERN_DEVICE float to_float(bf16 value) { return __bfloat162float(value); }
DLKERN_DEVICE float to_float(fp16 value) { return __half2float(value); }
template <class T>
DLKERN_DEVICE T from_float(float value);
template <>
DLKERN_DEVICE float from_float<float>(float value) {
  return value;
}
template <>
DLKERN_DEVICE bf16 from_float<bf16>(float value) {
  return __float2bfloat16(value);
}
template <>
DLKERN_DEVICE fp16 from_float<fp16>(float value) {
  return __float2half(value);
}

// Calls f(T*).
template <class F>
void with_type(Element element, F&& f) {
  if (element == Element::float32 || element == Element::tf32) f(static_cast<float*>(nullptr));
  if (element == Element::bfloat16) f(static_cast<bf16*>(nullptr));
  if (element == Element::float16) f(static_cast<fp16*>(nullptr));
}

// The same of a type of 16 bits.
template <class F>
void with_16_bit_type(Element element, F&& f) {
  if (element == Element::bfloat16) f(static_cast<bf16*>(nullptr));
  if (element == Element::float16) f(static_cast<fp16*>(nullptr));
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How many items kernels that number them by FastDivide may number, launch by launch; tests make it small.
inline int64_t most_numbers() {
#ifdef __CUDACC__
  return INT32_MAX;
#else
  return ::cuda_on_host::most_numbers();
#endif
}

// So many blocks; throws where CUDA has no such grid.
inline dim3 grid_of(int64_t x, int64_t y = 1, int64_t z = 1) {
  if (x > INT32_MAX || y > 65535 || z > 65535)
    throw std::runtime_error("dlkern: a launch of " + std::to_string(x) + " x " + std::to_string(y) + " x " +
                             std::to_string(z) + " blocks; at most 2^31 - 1, 65535 and 65535 (cuda column)");
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
}

#ifdef __CUDACC__
inline void throw_on_error(cudaError_t status, const char* kernel) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("dlkern: ") + kernel + ": " + cudaGetErrorString(status));
}
#endif

// One launch; `cooperative`: all blocks run at once and may meet in grid_sync(). Called through the macros below.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            bool cooperative, const Arguments&... arguments) {
#ifdef __CUDACC__
  if (shared_bytes > 48 * 1024) {
    throw_on_error(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
        name);
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = cooperative;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  throw_on_error(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), name);
#else
  (void)stream;
  ::cuda_on_host::launch(name, grid, block, shared_bytes, cooperative,
                         [kernel, arguments...] { kernel(arguments...); });
#endif
}

// How many blocks of a kernel the current device runs at once; -1 where one has more shared memory than a block may.
template <class... Parameters>
int64_t blocks_at_once(void (*kernel)(Parameters...), int threads, int64_t shared_bytes) {
#ifdef __CUDACC__
  int device = 0, most_shared = 0, multiprocessors = 0, blocks = 0;
  throw_on_error(cudaGetDevice(&device), "cudaGetDevice");
  throw_on_error(cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "attribute");
  if (shared_bytes > most_shared) return -1;
  throw_on_error(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
      "attribute");
  throw_on_error(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "attribute");
  throw_on_error(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes), "occupancy");
  return static_cast<int64_t>(multiprocessors) * blocks;
#else
  (void)kernel, (void)threads;
  return ::cuda_on_host::blocks_at_once(shared_bytes);
#endif
}

}  // namespace dlkern::cuda

// DLKERN_LAUNCH((kernel<float, 4>), grid, block, shared_bytes, stream, arguments...); throws where the launch fails.
#define DLKERN_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::dlkern::cuda::launch(#kernel, kernel, grid, block, shared_bytes, stream, false, __VA_ARGS__)
#define DLKERN_LAUNCH_COOPERATIVE(kernel, grid, block, shared_bytes, stream, ...) \
  ::dlkern::cuda::launch(#kernel, kernel, grid, block, shared_bytes, stream, true, __VA_ARGS__)
