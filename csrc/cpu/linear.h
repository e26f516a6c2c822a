#pragma once
#include <cstdint>

#include "isa.h"
#include "scalar.h"

namespace dlkern::cpu {
// output[m, n] = activation(sum_k input[m, k] weight[n, k] + bias[n]); bias may be null.
template <class T> struct LinearArgs {
  int64_t m, n, k;
  const T* input;
  int64_t input_row, input_column;
  const T* weight;
  int64_t weight_row, weight_column;
  const T* bias;
  T* output;  // [m, n] contiguous
  int activation;
};
// grad_input[m, k] = sum_n grad_output[m, n] weight[n, k].
template <class T> struct LinearBackwardInputArgs {
  int64_t m, n, k;
  const T* grad_output;
  int64_t grad_output_row, grad_output_column;
  const T* weight;
  int64_t weight_row, weight_column;
  T* grad_input;  // [m, k] contiguous
};
// grad_weight[n, k] = sum_m grad_output[m, n] input[m, k]; grad_bias[n] = sum_m grad_output[m, n], or null.
template <class T> struct LinearBackwardWeightArgs {
  int64_t m, n, k;
  const T* grad_output;
  int64_t grad_output_row, grad_output_column;
  const T* input;
  int64_t input_row, input_column;
  T* grad_weight;  // [n, k] contiguous
  T* grad_bias;
};
// grad_input[i] = grad_output[i] * activation'(z[i]), by the activation's output.
template <class T> struct ActivationBackwardArgs {
  int64_t count;
  const T* grad_output;
  const T* output;
  T* grad_input;
  int activation;
};
#define DLKERN_LINEAR(T)                                                           \
  DLKERN_DECLARE(void, linear_forward, const LinearArgs<T>&)                       \
  DLKERN_DECLARE(void, linear_backward_input, const LinearBackwardInputArgs<T>&)   \
  DLKERN_DECLARE(void, linear_backward_weight, const LinearBackwardWeightArgs<T>&) \
  DLKERN_DECLARE(void, activation_backward, const ActivationBackwardArgs<T>&)
DLKERN_LINEAR(float)
DLKERN_LINEAR(double)
DLKERN_LINEAR(bfloat16)
DLKERN_LINEAR(float16)
#undef DLKERN_LINEAR
}  // namespace dlkern::cpu
