#pragma once
#include <cstdint>

#include "isa.h"
#include "scalar.h"

namespace dlkern::cpu {

// [n, c, inner] in memory, or [n * inner, c] where channels_last.
struct NormShape {
  int64_t n, c, inner;
  bool channels_last;
};

// mean, var (biased) and invstd of each channel, then output = activation((input - mean) * invstd * weight + bias +
// residual). With train = false, mean and invstd are given. Pointers to residual, weight and bias may be null.
template <class T> struct BatchNormArgs {
  NormShape shape;
  const T* input;
  const T* residual;
  const acc_t<T>* weight;
  const acc_t<T>* bias;
  double* mean;
  double* invstd;
  double* var;  // written when training
  double eps;
  bool train;
  int activation;  // activation.h
  T* output;
};
// output may be null without an activation, weight always, grad_residual where it is not wanted.
template <class T> struct BatchNormBackwardArgs {
  NormShape shape;
  const T* grad_output;
  const T* input;
  const T* output;
  const acc_t<T>* weight;
  const acc_t<T>* mean;
  const double* invstd;
  bool train;
  int activation;  // activation.h
  T* grad_input;
  acc_t<T>* grad_weight;
  acc_t<T>* grad_bias;
  T* grad_residual;
};

#define DLKERN_DECLARE_BATCH_NORM(T)                                \
  DLKERN_DECLARE(void, batch_norm_forward, const BatchNormArgs<T>&) \
  DLKERN_DECLARE(void, batch_norm_backward, const BatchNormBackwardArgs<T>&)
DLKERN_DECLARE_BATCH_NORM(float)
DLKERN_DECLARE_BATCH_NORM(double)
DLKERN_DECLARE_BATCH_NORM(bfloat16)
DLKERN_DECLARE_BATCH_NORM(float16)
#undef DLKERN_DECLARE_BATCH_NORM

}  // namespace dlkern::cpu
