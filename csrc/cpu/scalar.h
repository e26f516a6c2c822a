// Element types of the CPU column. bfloat16 is storage only: values are computed in float.
#pragma once
#include <cstdint>
#include <cstring>

namespace dlkern {

struct bfloat16 {
  uint16_t bits;
  bfloat16() = default;
  [[gnu::always_inline]] explicit bfloat16(float value) {
    uint32_t u;
    std::memcpy(&u, &value, 4);
    if ((u & 0x7fffffffu) > 0x7f800000u) {
      bits = static_cast<uint16_t>((u >> 16) | 0x40);  // NaN stays NaN
    } else {
      bits = static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);  // round to nearest even
    }
  }
  [[gnu::always_inline]] operator float() const {
    uint32_t u = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &u, 4);
    return value;
  }
};

// The type sums are carried in: float for float and bfloat16, double for double.
template <class T> struct accumulate_type {
  using type = float;
};
template <> struct accumulate_type<double> {
  using type = double;
};
template <class T> using acc_t = typename accumulate_type<T>::type;

}  // namespace dlkern
