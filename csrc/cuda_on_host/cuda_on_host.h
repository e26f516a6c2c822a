// CUDA C++ for the host compiler: what kernels see instead of cuda_runtime.h. Keywords, built-in variables, vector
// types, bfloat16 and float16, warp intrinsics, atomics and launches, over the runtime in this folder (see README.md).
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <new>
#include <type_traits>

#include "../cpu/scalar.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// bfloat16 as cuda_bf16.h has it; rounds to nearest even, NaN becomes the canonical one.
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 value) {
  const uint32_t word = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &word, 4);
  return result;
}
inline __nv_bfloat16 __float2bfloat16(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  if ((word & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {static_cast<uint16_t>((word + 0x7fffu + ((word >> 16) & 1u)) >> 16)};
}

// float16 as cuda_fp16.h has it; rounds to nearest even, NaN becomes the canonical one.
struct __half {
  uint16_t bits;
};
inline float __half2float(__half value) {
  dlkern::float16 half;
  half.bits = value.bits;
  return half;
}
inline __half __float2half(float value) {
  return {value == value ? dlkern::float16(value).bits : static_cast<uint16_t>(0x7fff)};
}

namespace cuda_on_host {

// The thread that runs now. Plain data, so that reading threadIdx costs a load.
struct ThisThread {
  uint3 thread_index, block_index;
  dim3 block_size, grid_size;
  int lane;
};
extern ThisThread this_thread;

// scheduler.cpp. `where` is the source line, told in reports of divergence and deadlock.
void block_barrier(const char* where);
void grid_barrier(const char* where);
void yield(const char* where);
extern std::recursive_mutex launch_mutex;        // one launch at a time
inline constexpr size_t kParameterBytes = 4096;  // CUDA's limit for kernel arguments
extern unsigned char parameters[kParameterBytes];
void run_grid(const char* name, dim3 grid, dim3 block, size_t shared_bytes, bool cooperative, void (*body)(void*));

// The launch of body(), a callable that holds the kernel's arguments by value; they are copied once, as CUDA does.
template <class Body>
void launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes, bool cooperative, const Body& body) {
  static_assert(sizeof(Body) <= kParameterBytes && alignof(Body) <= 64 && std::is_trivially_destructible_v<Body>);
  const std::lock_guard<std::recursive_mutex> lock(launch_mutex);
  new (parameters) Body(body);
  run_grid(name, grid, block, shared_bytes, cooperative, [](void* held) { (*static_cast<Body*>(held))(); });
}

// control.cpp: notes a finding: "kernel: message [block 0,0,0 thread 5,0,0]".
void report(const char* format, ...) __attribute__((format(printf, 1, 2)));

// shared_memory.cpp. A static array is named by the address of its tag.
void* dynamic_shared();
void* static_shared(const void* tag, size_t bytes);

// warp.cpp. Values are passed by address and size, so that one function serves every type.
void shuffle(unsigned mask, void* value, size_t bytes, int source_lane, const char* where);
unsigned ballot(unsigned mask, bool vote, const char* where);
void warp_barrier(unsigned mask, const char* where);
void ldmatrix_x4(uint32_t (&fragment)[4], const void* row, bool transposed);
void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool half);
void mma_tf32_16x8x8(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
uint32_t to_tf32(float value);

// cp_async.cpp
void cp_async(void* destination, const void* source, int bytes, int source_bytes);
void cp_async_commit();
void cp_async_wait(int groups_left);

// counters.cpp. A thread that spins sleeps until some counter is added to.
void red_release_add(unsigned* counter, unsigned value);
unsigned ld_acquire(const unsigned* counter);
void spin(const char* where);
int64_t blocks_at_once(int64_t shared_bytes);  // of a kernel, on the device that this pretends to be
int most_shared_bytes();
int multiprocessors();
bool is_hopper();
int64_t most_numbers();

// ---- Hopper: mbarrier.cpp, tensor_copy.cpp, wgmma.cpp ----

uint32_t shared_address(const void* pointer);  // as descriptors hold it: the offset in the block's shared memory

void mbarrier_init(uint64_t* barrier, unsigned count);
void mbarrier_init_fence();
void mbarrier_arrive(uint64_t* barrier);
void mbarrier_arrive_expect(uint64_t* barrier, unsigned bytes);
void mbarrier_wait(uint64_t* barrier, unsigned parity);
void fence_proxy_async();
void named_barrier(int number, unsigned threads, bool waits);

// What a CUtensorMap says of a tensor of 16-bit elements, 128-byte swizzle; the first dimension is the one without gaps.
// Tiled: `box` elements a dimension. im2col ([C, W, H, N]): box[0] channels of box[1] pixels; see tensor_copy.cpp.
struct TensorMap {
  const void* base;
  int rank;
  bool im2col;
  uint64_t size[4], stride[4];  // strides in bytes
  uint32_t box[4];
  int lower[2], upper[2], step[2];  // of w and h
};
// Looks at what the driver would refuse: false where it would.
bool tensor_map_is_valid(const TensorMap& map);
void tensor_copy(void* destination, const TensorMap& map, uint64_t* barrier, const int (&at)[4],
                 const int (&offset)[2]);

void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int groups_left);
void wgmma(float* c, int n, uint64_t a, uint64_t b, bool a_transposed, bool b_transposed, bool adds, bool half);
void wgmma(float* c, int n, const uint32_t (&a)[4], uint64_t b, bool b_transposed, bool adds, bool half);

template <class T>
T shuffled(unsigned mask, T value, int source_lane, const char* where) {
  static_assert(sizeof(T) <= 16);
  shuffle(mask, &value, sizeof(T), source_lane, where);
  return value;
}

}  // namespace cuda_on_host

#define threadIdx (::cuda_on_host::this_thread.thread_index)
#define blockIdx (::cuda_on_host::this_thread.block_index)
#define blockDim (::cuda_on_host::this_thread.block_size)
#define gridDim (::cuda_on_host::this_thread.grid_size)

#define CUDA_ON_HOST_TEXT_(x) #x
#define CUDA_ON_HOST_TEXT(x) CUDA_ON_HOST_TEXT_(x)
#define CUDA_ON_HOST_HERE __FILE__ ":" CUDA_ON_HOST_TEXT(__LINE__)

#define __syncthreads() ::cuda_on_host::block_barrier(CUDA_ON_HOST_HERE)
#define __syncwarp(...) ::cuda_on_host::warp_barrier(0xffffffffu __VA_OPT__(&(__VA_ARGS__)), CUDA_ON_HOST_HERE)
#define __ballot_sync(mask, vote) ::cuda_on_host::ballot(mask, vote, CUDA_ON_HOST_HERE)
#define __any_sync(mask, vote) (__ballot_sync(mask, vote) != 0)
#define __shfl_sync(mask, value, lane) ::cuda_on_host::shuffled(mask, value, (lane) & 31, CUDA_ON_HOST_HERE)
#define __shfl_xor_sync(mask, value, bits) \
  ::cuda_on_host::shuffled(mask, value, ::cuda_on_host::this_thread.lane ^ (bits), CUDA_ON_HOST_HERE)
// From a lane beyond the warp, a thread gets its own value back.
#define __shfl_down_sync(mask, value, by)                                                                          \
  ::cuda_on_host::shuffled(mask, value,                                                                            \
                           ::cuda_on_host::this_thread.lane + (by) > 31 ? ::cuda_on_host::this_thread.lane         \
                                                                        : ::cuda_on_host::this_thread.lane + (by), \
                           CUDA_ON_HOST_HERE)

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32); }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

// atomics.cpp
int atomicAdd(int* address, int value);
unsigned atomicAdd(unsigned* address, unsigned value);
float atomicAdd(float* address, float value);
