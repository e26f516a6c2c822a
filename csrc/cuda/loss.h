// Launchers of loss.cu, in plain C++ for the op layer. Each throws std::runtime_error where its launch fails.
#pragma once
#include <cstdint>

#include "element.h"

namespace dlkern::cuda {

// Logits of outer * inner places: class c of place (n, d) is at input[n * classes * inner + c * class_stride + d *
// place_stride]; one of the strides is 1. Targets lie in the order (n, d).
struct Logits {
  Element element;
  int64_t outer, inner, classes;
  int64_t class_stride, place_stride;
};

// What all kernels of a call read. Weights may be null, and have the logits' type.
struct LossArgs {
  const void* input;
  const void* target;         // int64 of each place, or numbers as the logits lie
  const void* weight;         // of each class
  const void* sample_weight;  // of each place
  int reduction;              // 0 none, 1 mean, 2 sum
  int64_t ignore_index;
  double label_smoothing;
};

// How many numbers `scratch` has, forward and backward.
int64_t cross_entropy_scratch(const Logits& shape);

// lse: [2, places], the largest logit and log(sum(exp(x - largest))). loss: [places], or one number of the reduction.
void cross_entropy_forward(const Logits& shape, const LossArgs& args, double* scratch, void* loss, float* lse,
                           float* total_weight, void* stream);
void cross_entropy_backward(const Logits& shape, const LossArgs& args, double* scratch, const void* grad_loss,
                            const float* lse, const float* total_weight, void* grad_input, void* stream);

// kept: [3, places], the largest logit, sum(exp(x - largest)) and the sum of weighted targets. Gradients that are not
// wanted are null.
void probabilities_forward(const Logits& shape, const LossArgs& args, double* scratch, void* loss, double* kept,
                           void* stream);
void probabilities_backward(const Logits& shape, const LossArgs& args, const void* grad_loss, const double* kept,
                            void* grad_input, void* grad_target, void* stream);

}  // namespace dlkern::cuda
