// Working memory of the CPU column: one growing, 64-byte aligned buffer a thread and purpose, reused by every
// call and kept between calls, so that kernels neither allocate nor touch fresh pages. Contents are made anew each
// call. A kernel that calls another keeps its own slot: gemm uses the gemm_ and tiles_ slots (convolution the latter,
// too), families the others.
#pragma once
#include <cstddef>
#include <cstdint>

namespace dlkern::cpu {

enum class Slot {
  gemm_a,
  gemm_b,
  gemm_c,
  family_0,
  family_1,
  family_2,
  family_3,
  family_4,
  tiles_a,
  tiles_b,
  tiles_c,
  rnn_rows,
  rnn_again,
  count
};

// At least `bytes` bytes for the calling thread; valid until the same thread asks for the same slot again.
void* scratch(Slot slot, size_t bytes);

template <class T> inline T* scratch(Slot slot, int64_t count) {
  return static_cast<T*>(scratch(slot, static_cast<size_t>(count) * sizeof(T)));
}

}  // namespace dlkern::cpu
