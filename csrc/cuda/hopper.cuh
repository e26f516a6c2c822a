// Hopper's own instructions (sm_90a): mbarriers, tensor copies (TMA) and wgmma, and what its kernels do between products;
// like ptx.cuh, each a small function with its host twin beside it and a case in conformance_sm90.cu. And, for launchers,
// tensor maps and whether a GPU runs all this.
#pragma once
#include <cstdlib>

#include "ptx.cuh"

#ifdef __CUDACC__
#include <cuda.h>
#endif

// A kernel's body goes between #ifdef DLKERN_HOPPER and #endif: other architectures' copies of it are empty, and
// runs_on_hopper() keeps launches away from them.
#if !defined(__CUDACC__) || !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define DLKERN_HOPPER
#endif

namespace dlkern::cuda {

// ---- mbarriers: a phase ends when `count` arrivals and all announced bytes are there ----

DLKERN_DEVICE void mbarrier_init(uint64_t* barrier, unsigned count) {
#ifdef __CUDACC__
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
#else
  ::cuda_on_host::mbarrier_init(barrier, count);
#endif
}

// By the thread that initialised mbarriers, before the __syncthreads after which others use them.
DLKERN_DEVICE void mbarrier_init_fence() {
#ifdef __CUDACC__
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  ::cuda_on_host::mbarrier_init_fence();
#endif
}

DLKERN_DEVICE void mbarrier_arrive(uint64_t* barrier) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#else
  ::cuda_on_host::mbarrier_arrive(barrier);
#endif
}

// Arrives, and announces copies of so many bytes in this phase.
DLKERN_DEVICE void mbarrier_arrive_expect(uint64_t* barrier, unsigned bytes) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#else
  ::cuda_on_host::mbarrier_arrive_expect(barrier, bytes);
#endif
}

// Waits until the phase of this parity has ended; a fresh mbarrier is in its phase 0, and counts phase "-1" as ended.
DLKERN_DEVICE void mbarrier_wait(uint64_t* barrier, unsigned parity) {
#ifdef __CUDACC__
  unsigned done;
  do {
    asm volatile(
        "{\n.reg .pred ended;\nmbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!done);
#else
  ::cuda_on_host::mbarrier_wait(barrier, parity);
#endif
}

// ---- Barriers of some of a block's threads, numbered 1 to 15: whoever syncs waits for `Threads` that arrive or sync ----

template <int Threads>
DLKERN_DEVICE void barrier_sync(int number) {
#ifdef __CUDACC__
  asm volatile("bar.sync %0, %1;" ::"r"(number), "n"(Threads) : "memory");
#else
  ::cuda_on_host::named_barrier(number, Threads, true);
#endif
}

template <int Threads>
DLKERN_DEVICE void barrier_arrive(int number) {
#ifdef __CUDACC__
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "n"(Threads) : "memory");
#else
  ::cuda_on_host::named_barrier(number, Threads, false);
#endif
}

// Makes what this thread wrote to shared memory visible to tensor copies and wgmma, for whoever is ordered after this.
DLKERN_DEVICE void fence_proxy_async() {
#ifdef __CUDACC__
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
  ::cuda_on_host::fence_proxy_async();
#endif
}

// ---- Tensor copies ----

#ifdef __CUDACC__
using TensorMap = CUtensorMap;
#else
using TensorMap = ::cuda_on_host::TensorMap;
#endif

// Starts copying the map's box at these coordinates to shared memory (a multiple of 1024); its bytes, those outside the
// tensor as zeros, are counted off `barrier`. Rows of 128 bytes: byte b of row r is at 128 r + (b ^ 16 (r % 8)).
DLKERN_DEVICE void tensor_copy_2d(void* destination, const TensorMap& map, uint64_t* barrier, int x, int y) {
#ifdef __CUDACC__
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(shared_address(destination)),
      "l"(&map), "r"(shared_address(barrier)), "r"(x), "r"(y)
      : "memory");
#else
  ::cuda_on_host::tensor_copy(destination, map, barrier, {x, y, 0, 0}, {0, 0});
#endif
}

DLKERN_DEVICE void tensor_copy_3d(void* destination, const TensorMap& map, uint64_t* barrier, int x, int y, int z) {
#ifdef __CUDACC__
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];" ::"r"(shared_address(destination)),
      "l"(&map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
#else
  ::cuda_on_host::tensor_copy(destination, map, barrier, {x, y, z, 0}, {0, 0});
#endif
}

DLKERN_DEVICE void tensor_copy_4d(void* destination, const TensorMap& map, uint64_t* barrier, int x, int y, int z,
                                  int w) {
#ifdef __CUDACC__
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(destination)),
      "l"(&map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
#else
  ::cuda_on_host::tensor_copy(destination, map, barrier, {x, y, z, w}, {0, 0});
#endif
}

// The pixels of an im2col map from the one at (w, h, n) on, each read offset_w, offset_h further.
DLKERN_DEVICE void tensor_copy_im2col(void* destination, const TensorMap& map, uint64_t* barrier, int c, int w, int h,
                                      int n, int offset_w, int offset_h) {
#ifdef __CUDACC__
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5, %6}], [%2], {%7, %8};" ::"r"(shared_address(destination)),
      "l"(&map), "r"(shared_address(barrier)), "r"(c), "r"(w), "r"(h), "r"(n), "h"(static_cast<uint16_t>(offset_w)),
      "h"(static_cast<uint16_t>(offset_h))
      : "memory");
#else
  ::cuda_on_host::tensor_copy(destination, map, barrier, {c, w, h, n}, {offset_w, offset_h});
#endif
}

// ---- wgmma: products by warpgroups of 128 threads, B in shared memory, A there or in registers ----

// Where an operand of 128-byte swizzled rows lies. k last: rows of 64 k, any number of them. k first: rows of 64 outer
// elements, one a k; the next 64 outer elements begin `next_outer` bytes further (16 where there are none, or k is last).
DLKERN_DEVICE uint64_t matrix_descriptor(const void* tile, unsigned next_outer) {
#ifdef __CUDACC__
  const uint32_t address = shared_address(tile);
#else
  const uint32_t address = ::cuda_on_host::shared_address(tile);
#endif
  constexpr uint64_t kEightRows = 1024 >> 4, kSwizzle128 = 1;
  return (address & 0x3ffff) >> 4 | static_cast<uint64_t>(next_outer >> 4) << 16 | kEightRows << 32 | kSwizzle128 << 62;
}

#ifdef __CUDACC__
// Keeps the compiler from moving what is done with these registers over this place.
template <int N>
DLKERN_DEVICE void pin(float (&registers)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int N>
DLKERN_DEVICE void pin(uint32_t (&registers)[N][4]) {
#pragma unroll
  for (int i = 0; i < 4 * N; i++) asm volatile("" : "+r"(registers[i / 4][i % 4])::"memory");
}
#endif

// Before the first product, and wherever the thread itself has written registers of products: accumulators, and A.
template <class... Registers>
DLKERN_DEVICE void wgmma_fence(Registers&... registers) {
#ifdef __CUDACC__
  (pin(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  ((void)registers, ...);
  ::cuda_on_host::wgmma_fence();
#endif
}

DLKERN_DEVICE void wgmma_commit() {
#ifdef __CUDACC__
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  ::cuda_on_host::wgmma_commit();
#endif
}

// Waits for all but the latest `GroupsLeft` groups: their operands may be overwritten, and `registers` of theirs alone be
// read and written.
template <int GroupsLeft, class... Registers>
DLKERN_DEVICE void wgmma_wait(Registers&... registers) {
#ifdef __CUDACC__
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GroupsLeft) : "memory");
  (pin(registers), ...);
#else
  ((void)registers, ...);
  ::cuda_on_host::wgmma_wait(GroupsLeft);
#endif
}

// Waits for all groups: the accumulators may be read.
template <int N>
DLKERN_DEVICE void wgmma_wait_all(float (&c)[N]) {
  wgmma_wait<0>(c);
}

#ifdef __CUDACC__
// Operands of the instructions below, as text and as constraints.
#define DLKERN_REGISTERS_32                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define DLKERN_REGISTERS_64                                                          \
  DLKERN_REGISTERS_32                                                                \
  ", "                                                                               \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define DLKERN_REGISTERS_128                                                                     \
  DLKERN_REGISTERS_64                                                                            \
  ", "                                                                                           \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define DLKERN_C8(i)                                                                                          \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), \
      "+f"(c[i + 7])
#define DLKERN_C32(i) DLKERN_C8(i), DLKERN_C8(i + 8), DLKERN_C8(i + 16), DLKERN_C8(i + 24)
#define DLKERN_WGMMA(type, n, registers, a, b, p, ta, tb)                                                          \
  "{\n.reg .pred adds;\nsetp.ne.b32 adds, " p ", 0;\nwgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type \
  " {" registers "}, " a ", " b ", adds, 1, 1, " ta ", " tb ";\n}"
#define DLKERN_WGMMA_REGISTERS(type, n, registers, a, b, p, tb)                                                    \
  "{\n.reg .pred adds;\nsetp.ne.b32 adds, " p ", 0;\nwgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type \
  " {" registers "}, {" a "}, " b ", adds, 1, 1, " tb ";\n}"
#endif

// c[64][2 N] (+)= a[64][16] b[16][2 N], bfloat16 or float16 (T), asynchronously; an operand FIRST lies k first. Without
// `adds`, c is overwritten.
// With w, g and t a thread's warp, lane / 4 and lane % 4: c[4 j + 2 i + e] is row 16 w + 8 i + g, column 8 j + 2 t + e.
template <class T, bool A_FIRST, bool B_FIRST, int N>
DLKERN_DEVICE void wgmma(float (&c)[N], uint64_t a, uint64_t b, bool adds) {
  constexpr bool kHalf = std::is_same_v<T, fp16>;
  static_assert(kHalf || std::is_same_v<T, bf16>);
  static_assert(N == 32 || N == 64 || N == 128);
#ifdef __CUDACC__
#define DLKERN_INPUTS "l"(a), "l"(b), "r"(static_cast<int>(adds)), "n"(A_FIRST), "n"(B_FIRST)
#define DLKERN_WGMMA_64(type)                                                                   \
  asm volatile(DLKERN_WGMMA(type, "64", DLKERN_REGISTERS_32, "%32", "%33", "%34", "%35", "%36") \
               : DLKERN_C32(0)                                                                  \
               : DLKERN_INPUTS)
#define DLKERN_WGMMA_128(type)                                                                   \
  asm volatile(DLKERN_WGMMA(type, "128", DLKERN_REGISTERS_64, "%64", "%65", "%66", "%67", "%68") \
               : DLKERN_C32(0), DLKERN_C32(32)                                                   \
               : DLKERN_INPUTS)
#define DLKERN_WGMMA_256(type)                                                                         \
  asm volatile(DLKERN_WGMMA(type, "256", DLKERN_REGISTERS_128, "%128", "%129", "%130", "%131", "%132") \
               : DLKERN_C32(0), DLKERN_C32(32), DLKERN_C32(64), DLKERN_C32(96)                         \
               : DLKERN_INPUTS)
  if constexpr (N == 32 && kHalf)
    DLKERN_WGMMA_64("f16");
  else if constexpr (N == 32)
    DLKERN_WGMMA_64("bf16");
  else if constexpr (N == 64 && kHalf)
    DLKERN_WGMMA_128("f16");
  else if constexpr (N == 64)
    DLKERN_WGMMA_128("bf16");
  else if constexpr (kHalf)
    DLKERN_WGMMA_256("f16");
  else
    DLKERN_WGMMA_256("bf16");
#else
  ::cuda_on_host::wgmma(c, 2 * N, a, b, A_FIRST, B_FIRST, adds, kHalf);
#endif
}

// The same with A in registers, which must stay as they are until the wait: 16 rows a warp, as mma_16x8x16 takes them.
// Columns 16 k .. 16 k + 15 of a product become such an A as pack_pair<T>(c[8 k + 2 r], c[8 k + 2 r + 1]), r = 0 .. 3.
template <class T, bool B_FIRST, int N>
DLKERN_DEVICE void wgmma_registers(float (&c)[N], const uint32_t (&a)[4], uint64_t b, bool adds) {
  constexpr bool kHalf = std::is_same_v<T, fp16>;
  static_assert(kHalf || std::is_same_v<T, bf16>);
  static_assert(N == 32 || N == 64);
#ifdef __CUDACC__
#define DLKERN_INPUTS_REGISTERS \
  "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(adds)), "n"(B_FIRST)
#define DLKERN_WGMMA_REGISTERS_64(type)                                                                           \
  asm volatile(DLKERN_WGMMA_REGISTERS(type, "64", DLKERN_REGISTERS_32, "%32, %33, %34, %35", "%36", "%37", "%38") \
               : DLKERN_C32(0)                                                                                    \
               : DLKERN_INPUTS_REGISTERS)
#define DLKERN_WGMMA_REGISTERS_128(type)                                                                           \
  asm volatile(DLKERN_WGMMA_REGISTERS(type, "128", DLKERN_REGISTERS_64, "%64, %65, %66, %67", "%68", "%69", "%70") \
               : DLKERN_C32(0), DLKERN_C32(32)                                                                     \
               : DLKERN_INPUTS_REGISTERS)
  if constexpr (N == 32 && kHalf)
    DLKERN_WGMMA_REGISTERS_64("f16");
  else if constexpr (N == 32)
    DLKERN_WGMMA_REGISTERS_64("bf16");
  else if constexpr (kHalf)
    DLKERN_WGMMA_REGISTERS_128("f16");
  else
    DLKERN_WGMMA_REGISTERS_128("bf16");
#else
  ::cuda_on_host::wgmma(c, 2 * N, a, b, B_FIRST, adds, kHalf);
#endif
}

// Moves registers between warpgroups: each in a branch of its own, in a kernel with __launch_bounds__(threads, 1).
template <int Registers>
DLKERN_DEVICE void give_registers_back() {
#ifdef __CUDACC__
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
#endif
}
template <int Registers>
DLKERN_DEVICE void take_registers() {
#ifdef __CUDACC__
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
#endif
}

// ---- Between products ----

// Two numbers rounded to bfloat16 or float16, the first one in the lower half.
template <class T>
DLKERN_DEVICE uint32_t pack_pair(float low, float high) {
  constexpr bool kHalf = std::is_same_v<T, fp16>;
  static_assert(kHalf || std::is_same_v<T, bf16>);
#ifdef __CUDACC__
  uint32_t pair;
  if constexpr (kHalf)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  if constexpr (kHalf) return __float2half(low).bits | static_cast<uint32_t>(__float2half(high).bits) << 16;
  return __float2bfloat16(low).bits | static_cast<uint32_t>(__float2bfloat16(high).bits) << 16;
#endif
}

// 2^x but for some last bits, in one instruction; results below 2^-126 are 0.
DLKERN_DEVICE float exp2_fast(float x) {
#ifdef __CUDACC__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return x < -126.0f ? 0.0f : std::exp2(x);
#endif
}

// ---- For launchers ----

// Whether the current GPU is a Hopper and this build has the kernel's code for it, which one for sm_90 without the "a"
// has not. DLKERN_HOPPER=0 in the environment says no.
template <class... Parameters>
bool runs_on_hopper(void (*kernel)(Parameters...)) {
#ifdef __CUDACC__
  static const char* const choice = std::getenv("DLKERN_HOPPER");
  if (choice && choice[0] == '0') return false;
  int device = 0, major = 0, minor = 0;
  throw_on_error(cudaGetDevice(&device), "cudaGetDevice");
  throw_on_error(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "attribute");
  throw_on_error(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "attribute");
  if (major != 9 || minor != 0) return false;
  // A copy that was not compiled for sm_90a is empty: it lacks the mbarriers that every kernel here has.
  cudaFuncAttributes attributes{};
  if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) return cudaGetLastError(), false;
  return attributes.sharedSizeBytes > 0;
#else
  (void)kernel;
  return ::cuda_on_host::is_hopper();
#endif
}

inline int multiprocessors() {
#ifdef __CUDACC__
  int device = 0, count = 0;
  throw_on_error(cudaGetDevice(&device), "cudaGetDevice");
  throw_on_error(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "attribute");
  return count;
#else
  return ::cuda_on_host::multiprocessors();
#endif
}

#ifdef __CUDACC__
// The driver's own function, found at run time: the library links no libcuda.
template <class Function>
Function* driver_function(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  throw_on_error(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result), name);
  if (result != cudaDriverEntryPointSuccess) throw std::runtime_error(std::string("dlkern: the driver has no ") + name);
  return reinterpret_cast<Function*>(found);
}
#endif

constexpr int kMapRow = 64;  // elements of a box's row: 128 bytes

// Makes the map of a tensor of 16-bit elements (which ones is all the same: copies add zeros alone) of `rank` dimensions,
// the first one without gaps, strides in elements (from the second dimension on), to be copied in boxes of
// kMapRow x box_rows x 1 x 1. False where the hardware takes no such tensor.
template <int N>
bool make_tiled_map(TensorMap& map, const void* data, int rank, const int64_t (&size)[N],
                    const int64_t (&stride)[N - 1], int box_rows) {
  static_assert(N <= 4);
#ifdef __CUDACC__
  static const auto encode = driver_function<decltype(cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  cuuint64_t sizes[N], strides[N - 1];
  for (int d = 0; d < rank; d++) sizes[d] = static_cast<cuuint64_t>(size[d]);
  for (int d = 0; d + 1 < rank; d++) strides[d] = static_cast<cuuint64_t>(stride[d]) * 2;
  const cuuint32_t box[4] = {kMapRow, static_cast<cuuint32_t>(box_rows), 1, 1}, steps[4] = {1, 1, 1, 1};
  return encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, static_cast<cuuint32_t>(rank), const_cast<void*>(data), sizes,
                strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
#else
  map = TensorMap{data, rank, false, {1, 1, 1, 1}, {}, {kMapRow, static_cast<uint32_t>(box_rows), 1, 1}, {}, {}, {}};
  for (int d = 0; d < rank; d++) map.size[d] = static_cast<uint64_t>(size[d]);
  for (int d = 0; d + 1 < rank; d++) map.stride[d + 1] = static_cast<uint64_t>(stride[d]) * 2;
  return ::cuda_on_host::tensor_map_is_valid(map);
#endif
}

// The same of [n, h, w, c] images, to be copied in `pixels` of kMapRow channels: positions from `lower` to
// size - 1 + upper of each image in reading order, every `step`-th, of w ([0]) and h ([1]).
inline bool make_im2col_map(TensorMap& map, const void* data, const int64_t (&size)[4], const int64_t (&stride)[3],
                            const int (&lower)[2], const int (&upper)[2], const int (&step)[2], int pixels) {
#ifdef __CUDACC__
  static const auto encode = driver_function<decltype(cuTensorMapEncodeIm2col)>("cuTensorMapEncodeIm2col");
  cuuint64_t sizes[4], strides[3];
  for (int d = 0; d < 4; d++) sizes[d] = static_cast<cuuint64_t>(size[d]);
  for (int d = 0; d < 3; d++) strides[d] = static_cast<cuuint64_t>(stride[d]) * 2;
  const cuuint32_t steps[4] = {1, static_cast<cuuint32_t>(step[0]), static_cast<cuuint32_t>(step[1]), 1};
  return encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<void*>(data), sizes, strides, lower, upper,
                kMapRow, static_cast<cuuint32_t>(pixels), steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
#else
  map = TensorMap{data,
                  4,
                  true,
                  {},
                  {},
                  {kMapRow, static_cast<uint32_t>(pixels), 1, 1},
                  {lower[0], lower[1]},
                  {upper[0], upper[1]},
                  {step[0], step[1]}};
  for (int d = 0; d < 4; d++) map.size[d] = static_cast<uint64_t>(size[d]);
  for (int d = 0; d < 3; d++) map.stride[d + 1] = static_cast<uint64_t>(stride[d]) * 2;
  return ::cuda_on_host::tensor_map_is_valid(map);
#endif
}

}  // namespace dlkern::cuda
