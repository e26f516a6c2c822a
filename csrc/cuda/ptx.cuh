// Every PTX instruction the kernels use, each in one small function: the device body and, beside it, its host twin.
// Kernels hold neither PTX nor host branches. Each function has a case in conformance.cu, which holds the twins
// against the hardware.
#pragma once
#include <type_traits>

#include "platform.cuh"

namespace dlkern::cuda {

#ifdef __CUDACC__
DLKERN_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
#endif

// Starts a copy of 16 bytes from global to shared memory, both addresses 16-byte aligned. Of the source only
// `source_bytes` are read; the rest of the destination becomes zero.
DLKERN_DEVICE void cp_async16(void* destination, const void* source, int source_bytes) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(destination)), "l"(source),
               "r"(source_bytes));
#else
  ::cuda_on_host::cp_async(destination, source, 16, source_bytes);
#endif
}

// The same of 4 bytes, both addresses 4-byte aligned; source_bytes is 4 or 0.
DLKERN_DEVICE void cp_async4(void* destination, const void* source, int source_bytes) {
#ifdef __CUDACC__
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(destination)), "l"(source),
               "r"(source_bytes));
#else
  ::cuda_on_host::cp_async(destination, source, 4, source_bytes);
#endif
}

// Closes the group of the copies this thread started since the last commit.
DLKERN_DEVICE void cp_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;");
#else
  ::cuda_on_host::cp_async_commit();
#endif
}

// Waits until all but this thread's latest `GroupsLeft` groups have arrived.
template <int GroupsLeft>
DLKERN_DEVICE void cp_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(GroupsLeft) : "memory");
#else
  ::cuda_on_host::cp_async_wait(GroupsLeft);
#endif
}

// Four 8x8 matrices of 16-bit elements from shared memory; lane 8m + r passes the address of row r of matrix m and
// lane i receives of each matrix elements 2(i % 4), 2(i % 4) + 1 of row i / 4.
DLKERN_DEVICE void ldmatrix_x4(uint32_t (&fragment)[4], const void* row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row)));
#else
  ::cuda_on_host::ldmatrix_x4(fragment, row, false);
#endif
}

// The same of the transposed matrices: elements 2(i % 4), 2(i % 4) + 1 of column i / 4.
DLKERN_DEVICE void ldmatrix_x4_transposed(uint32_t (&fragment)[4], const void* row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row)));
#else
  ::cuda_on_host::ldmatrix_x4(fragment, row, true);
#endif
}

// c[16][8] += a[16][16] b[16][8] over a warp, bfloat16 or float16 (T) with float sums. With g = lane / 4 and
// t = lane % 4, a lane holds a: rows g, g + 8 of columns 2t.., then of 2t + 8..; b: rows 2t.., 2t + 8.. of column g;
// c: rows g, g + 8, columns 2t...
template <class T>
DLKERN_DEVICE void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  constexpr bool kHalf = std::is_same_v<T, fp16>;
  static_assert(kHalf || std::is_same_v<T, bf16>);
#ifdef __CUDACC__
#define DLKERN_MMA(type)                                                              \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (kHalf)
    DLKERN_MMA("f16");
  else
    DLKERN_MMA("bf16");
#undef DLKERN_MMA
#else
  ::cuda_on_host::mma_16x8x16(c, a, b0, b1, kHalf);
#endif
}

// The nearest TF32 number, of two as near the one away from zero: a float whose last 13 bits are zero.
DLKERN_DEVICE uint32_t to_tf32(float value) {
#ifdef __CUDACC__
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(value));
  return rounded;
#else
  return ::cuda_on_host::to_tf32(value);
#endif
}

// c[16][8] += a[16][8] b[8][8] over a warp, TF32 with float sums. With g = lane / 4 and t = lane % 4, a lane holds a: rows
// g, g + 8 of column t, then of t + 4; b: rows t, t + 4 of column g; c: rows g, g + 8, columns 2t...
DLKERN_DEVICE void mma_tf32_16x8x8(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  ::cuda_on_host::mma_tf32_16x8x8(c, a, b0, b1);
#endif
}

// Adds to a counter in global memory. Whoever reads the new value by ld_acquire then sees what this thread wrote before,
// and what the others of its block wrote before a barrier.
DLKERN_DEVICE void red_release_add(unsigned* counter, unsigned value) {
#ifdef __CUDACC__
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
#else
  ::cuda_on_host::red_release_add(counter, value);
#endif
}

DLKERN_DEVICE unsigned ld_acquire(const unsigned* counter) {
#ifdef __CUDACC__
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
#else
  return ::cuda_on_host::ld_acquire(counter);
#endif
}

// In a loop that waits for a counter: lets others go on.
DLKERN_DEVICE void spin_wait() {
#ifndef __CUDACC__
  ::cuda_on_host::spin("spin_wait");
#endif
}

}  // namespace dlkern::cuda
