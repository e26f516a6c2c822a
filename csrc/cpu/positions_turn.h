// Rotary positions of one row: what positions.cpp does to tensors and attention to the operands it has loaded.
#pragma once
#include "scalar.h"
#include "simd.h"

namespace dlkern::cpu::DLKERN_ISA {

// The row's `half` pairs (2d, 2d + 1), or (d, d + half), turned by sign times their angles; y may be x. In the type sums
// are carried in, rounded once.
template <class T>
inline void turn_row(const T* x, const acc_t<T>* cos, const acc_t<T>* sin, int64_t half, bool interleaved,
                     acc_t<T> sign, T* y) {
  using A = acc_t<T>;
  constexpr int64_t lanes = kLanes<T>;
  if (interleaved) {
    for (int64_t d = 0; d < half; ++d) {
      const A p = static_cast<A>(x[2 * d]), q = static_cast<A>(x[2 * d + 1]), s = sin[d] * sign;
      y[2 * d] = static_cast<T>(p * cos[d] - q * s);
      y[2 * d + 1] = static_cast<T>(q * cos[d] + p * s);
    }
  } else {
    for (int64_t d = 0; d < half; d += lanes) {
      const int64_t count = smaller(lanes, half - d);
      const Vec<T> p = load_some(x + d, count), q = load_some(x + half + d, count), c = load_some(cos + d, count),
                   s = load_some(sin + d, count) * sign;
      store_some(y + d, p * c - q * s, count);
      store_some(y + half + d, q * c + p * s, count);
    }
  }
}

}  // namespace dlkern::cpu::DLKERN_ISA
