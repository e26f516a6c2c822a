#pragma once
#include <cstdint>

#include "isa.h"
#include "scalar.h"

namespace dlkern::cpu {
// Rows of `columns` numbers side by side. Weight and bias are in the type sums are carried in, or null.
template <class T> struct LayerNormArgs {
  int64_t rows, columns;
  const T* input;
  const acc_t<T>* weight;
  const acc_t<T>* bias;
  double eps;
  T* output;
  acc_t<T>* mean;  // [rows] each
  acc_t<T>* rstd;
};
// Null where no gradient is wanted.
template <class T> struct LayerNormBackwardArgs {
  int64_t rows, columns;
  const T* grad_output;
  const T* input;
  const acc_t<T>* weight;
  const acc_t<T>* mean;
  const acc_t<T>* rstd;
  T* grad_input;
  acc_t<T>* grad_weight;
  acc_t<T>* grad_bias;
};
#define DLKERN_LAYER_NORM(T)                                        \
  DLKERN_DECLARE(void, layer_norm_forward, const LayerNormArgs<T>&) \
  DLKERN_DECLARE(void, layer_norm_backward, const LayerNormBackwardArgs<T>&)
DLKERN_LAYER_NORM(float)
DLKERN_LAYER_NORM(double)
DLKERN_LAYER_NORM(bfloat16)
DLKERN_LAYER_NORM(float16)
#undef DLKERN_LAYER_NORM
}  // namespace dlkern::cpu
