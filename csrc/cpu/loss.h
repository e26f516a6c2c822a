#pragma once
#include <cstdint>

#include "isa.h"
#include "scalar.h"

namespace dlkern::cpu {
// Logits of `positions` = outer * inner places: class c of place (n, d) is at input[n * outer_stride + c *
// class_stride + d * place_stride]. Either class_stride or place_stride is 1. Targets lie in the order (n, d).
struct CrossEntropyShape {
  int64_t outer, inner, classes;
  int64_t outer_stride, class_stride, place_stride;
};
template <class T> struct CrossEntropyArgs {
  CrossEntropyShape shape;
  const T* input;
  const int64_t* target;
  const T* weight;         // of each class, or null
  const T* sample_weight;  // of each place, or null
  int reduction;    // 0 none, 1 mean, 2 sum
  int64_t ignore_index;
  double label_smoothing;
  T* loss;
  acc_t<T>* largest;  // with log_sum, the two halves of lse: [positions] each
  acc_t<T>* log_sum;
  acc_t<T>* total_weight;
};
template <class T> struct CrossEntropyBackwardArgs {
  CrossEntropyShape shape;
  const T* grad_loss;
  const T* input;
  const int64_t* target;
  const T* weight;
  const T* sample_weight;
  const acc_t<T>* largest;
  const acc_t<T>* log_sum;
  const acc_t<T>* total_weight;
  int reduction;
  int64_t ignore_index;
  double label_smoothing;
  T* grad_input;  // laid out as input
};
// Targets that are a probability for each class, laid out as input.
template <class T> struct ProbabilitiesArgs {
  CrossEntropyShape shape;
  const T* input;
  const T* target;
  const T* weight;  // of each class, or null
  int reduction;    // 0 none, 1 mean over the places, 2 sum
  double label_smoothing;
  T* loss;
  double* largest;  // with sum and mass, what is kept of each place: [positions] each
  double* sum;      // of exp(x - largest)
  double* mass;     // the sum of its smoothed and weighted targets
};
template <class T> struct ProbabilitiesBackwardArgs {
  CrossEntropyShape shape;
  const T* grad_loss;
  const T* input;
  const T* target;
  const T* weight;
  const double* largest;
  const double* sum;
  const double* mass;
  int reduction;
  double label_smoothing;
  T* grad_input;   // laid out as input; null where it is not wanted
  T* grad_target;  // likewise
};
#define DLKERN_LOSS(T)                                                             \
  DLKERN_DECLARE(void, cross_entropy_forward, const CrossEntropyArgs<T>&)          \
  DLKERN_DECLARE(void, cross_entropy_backward, const CrossEntropyBackwardArgs<T>&) \
  DLKERN_DECLARE(void, probabilities_forward, const ProbabilitiesArgs<T>&)         \
  DLKERN_DECLARE(void, probabilities_backward, const ProbabilitiesBackwardArgs<T>&)
DLKERN_LOSS(float)
DLKERN_LOSS(double)
DLKERN_LOSS(bfloat16)
DLKERN_LOSS(float16)
#undef DLKERN_LOSS
}  // namespace dlkern::cpu
