// Launcher of positions.cu, in plain C++ for the op layer. It throws std::runtime_error where its launch fails.
#pragma once
#include <cstdint>

#include "element.h"

namespace dlkern::cuda {

// x and output [a, b, length, depth] with rows of numbers side by side; cos and sin [a, b, length, half] with strides of
// 0 where they broadcast, floats where wide_angles says so, else of x's type. Elements from 2 * half on are copied.
struct Rotary {
  Element element;
  bool wide_angles;
  int64_t a, b, length, depth, half;
  const void *x, *cos, *sin;
  int64_t x_stride[3], angle_stride[3], output_stride[3];
  bool interleaved;  // pairs are (2i, 2i + 1), else (i, i + half)
  bool inverse;  // turn the other way
  void* output;
};

void rotary(const Rotary& args, void* stream);

}  // namespace dlkern::cuda
