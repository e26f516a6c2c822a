#pragma once
#include <cstdint>

#include "isa.h"
#include "scalar.h"

namespace dlkern::cpu {

// A [n, c, h, w] input and its [n, c, out_h, out_w] windows, both contiguous or both channels_last.
struct PoolShape {
  int64_t n, c, h, w, out_h, out_w;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  bool channels_last;
};

enum class IndexKind { none, offset8, flat64 };  // r * kernel_w + s as a byte; y * w + x as int64

template <class T> struct MaxPoolArgs {
  PoolShape shape;
  const T* input;
  T* output;
  IndexKind kind;
  void* indices;
};
template <class T> struct MaxPoolBackwardArgs {
  PoolShape shape;
  const T* grad_output;
  IndexKind kind;
  const void* indices;
  T* grad_input;
};
// Divides by `divisor` where it is not 0, else by the window's extent (clipped to h + pad), with or without padding.
// Forward: input -> output. Backward: input is grad_output, output is grad_input.
template <class T> struct AvgPoolArgs {
  PoolShape shape;
  bool count_include_pad;
  int64_t divisor;
  const T* input;
  T* output;
};
// Window i covers [floor(i h / out_h), ceil((i + 1) h / out_h)). Only n, c, h, w, out_h, out_w of shape are read.
template <class T> struct AdaptivePoolArgs {
  PoolShape shape;
  const T* input;
  T* output;
};

template <class T> struct AdaptiveMaxPoolArgs {
  PoolShape shape;
  const T* input;
  T* output;
  int64_t* indices;  // y * w + x
};
template <class T> struct AdaptiveMaxPoolBackwardArgs {
  PoolShape shape;
  const T* grad_output;
  const int64_t* indices;
  T* grad_input;
};
// No padding and no dilation. The norm is finite and not 0.
template <class T> struct LpPoolArgs {
  PoolShape shape;
  double norm;
  const T* input;
  T* output;
};
template <class T> struct LpPoolBackwardArgs {
  PoolShape shape;
  double norm;
  const T* grad_output;
  const T* input;
  double* slopes;  // as many as there are windows: what each passes on to its elements' powers
  T* grad_input;
};

#define DLKERN_DECLARE_POOLING(T)                                                           \
  DLKERN_DECLARE(void, max_pool2d_forward, const MaxPoolArgs<T>&)                           \
  DLKERN_DECLARE(void, max_pool2d_backward, const MaxPoolBackwardArgs<T>&)                  \
  DLKERN_DECLARE(void, avg_pool2d_forward, const AvgPoolArgs<T>&)                           \
  DLKERN_DECLARE(void, avg_pool2d_backward, const AvgPoolArgs<T>&)                          \
  DLKERN_DECLARE(void, adaptive_avg_pool2d_forward, const AdaptivePoolArgs<T>&)             \
  DLKERN_DECLARE(void, adaptive_avg_pool2d_backward, const AdaptivePoolArgs<T>&)            \
  DLKERN_DECLARE(void, adaptive_max_pool2d_forward, const AdaptiveMaxPoolArgs<T>&)          \
  DLKERN_DECLARE(void, adaptive_max_pool2d_backward, const AdaptiveMaxPoolBackwardArgs<T>&) \
  DLKERN_DECLARE(void, lp_pool2d_forward, const LpPoolArgs<T>&)                             \
  DLKERN_DECLARE(void, lp_pool2d_backward, const LpPoolBackwardArgs<T>&)
DLKERN_DECLARE_POOLING(float)
DLKERN_DECLARE_POOLING(double)
DLKERN_DECLARE_POOLING(bfloat16)
DLKERN_DECLARE_POOLING(float16)
#undef DLKERN_DECLARE_POOLING

}  // namespace dlkern::cpu
