#pragma once
#include <cstdint>

#include "isa.h"
#include "scalar.h"

namespace dlkern::cpu {
// x and output [a, b, length, depth] with rows of numbers side by side; cos and sin [a, b, length, half] with strides of
// 0 where they broadcast. Elements from 2 * half on are copied.
template <class T> struct RotaryArgs {
  int64_t a, b, length, depth, half;
  const T* x;
  int64_t x_stride[3];
  const acc_t<T>* cos;
  const acc_t<T>* sin;
  int64_t angle_stride[3];
  bool interleaved;  // pairs are (2i, 2i + 1), else (i, i + half)
  bool inverse;  // turn the other way
  T* output;
  int64_t output_stride[3];
};
#define DLKERN_ROTARY(T) DLKERN_DECLARE(void, rotary, const RotaryArgs<T>&)
DLKERN_ROTARY(float)
DLKERN_ROTARY(double)
DLKERN_ROTARY(bfloat16)
DLKERN_ROTARY(float16)
#undef DLKERN_ROTARY
}  // namespace dlkern::cpu
