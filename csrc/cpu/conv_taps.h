// Which elements of an image the taps of a convolution, or of its input's gradient, read: an arithmetic progression in
// each dimension. And how direct kernels load and store their vectors.
#pragma once
#include "conv_pack.h"

namespace dlkern::cpu::DLKERN_ISA {

// Taps of one dimension: tap t reads the source at stride * output position + first + t * step, and multiplies by the
// kernel's element kernel + t * kernel_step.
struct Taps {
  int64_t count, first, step, kernel, kernel_step;

  // Those that fall inside [0, size) for a position: [begin, end).
  struct Range {
    int64_t begin, end;
  };
  Range inside(int64_t position, int64_t size) const {
    const int64_t at = position + first;
    const int64_t begin = smaller(count, at >= 0 ? 0 : ceil_div(-at, step));
    const int64_t end = at >= size ? 0 : smaller(count, ceil_div(size - at, step));
    return {begin, larger(begin, end)};
  }
};

inline Taps forward_taps(int64_t count, int64_t padding, int64_t dilation) {
  return Taps{count, -padding, dilation, 0, 1};
}

// Of the input's gradient: the taps that reach input positions residue + i * stride, reading grad_output at i + tap.
// They are evenly spaced, at most one in every `stride`.
inline Taps residue_taps(int64_t residue, int64_t count, int64_t stride, int64_t padding, int64_t dilation) {
  int64_t first = 0, period = 1;
  while (period * dilation % stride != 0) ++period;
  while (first < period && (residue + padding - first * dilation) % stride != 0) ++first;
  if (first == period || first >= count) return Taps{0, 0, 1, 0, 1};
  const int64_t found = ceil_div(count - first, period), last = first + (found - 1) * period;
  return Taps{found, (residue + padding - last * dilation) / stride, period * dilation / stride, last, -period};
}

// Keeps a loaded value in a register: the compiler would rather load it anew for every multiplication.
template <class V> [[gnu::always_inline]] inline void keep([[maybe_unused]] V& value) {
#if defined(__AVX512F__)
  asm("" : "+v"(value));
#elif defined(__AVX2__) && !defined(DLKERN_VECTOR_BYTES)
  asm("" : "+x"(value));
#endif
}

template <class T> [[gnu::always_inline]] inline Vec<T> load_lanes(const T* p, int count) {
  return count == kLanes<T> ? load(p) : load_partial<T>(p, count);
}
template <class T> [[gnu::always_inline]] inline void store_lanes(T* p, Vec<T> v, int count) {
  if (count == kLanes<T>)
    store(p, v);
  else
    store_partial<T>(p, v, count);
}

}  // namespace dlkern::cpu::DLKERN_ISA
