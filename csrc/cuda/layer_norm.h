// Launchers of layer_norm.cu, in plain C++ for the op layer. Each throws std::runtime_error where its launch fails.
#pragma once
#include <cstdint>

#include "element.h"

namespace dlkern::cuda {

// Rows of `columns` numbers side by side. Weight and bias may be null; they are floats where
// wide_parameters says so, else of the rows' type. A row's mean and reciprocal deviation are floats.
struct LayerNormRows {
  Element element;
  bool wide_parameters;
  int64_t rows, columns;
};

void layer_norm_forward(const LayerNormRows& shape, const void* input, const void* weight, const void* bias, double eps,
                        void* output, float* mean, float* rstd, void* stream);

// How many parts the sums down columns are cut into.
int layer_norm_parts(const LayerNormRows& shape);

// The gradient of the input, and of weight and bias: null where none is wanted. Where either of the latter is, `parts`
// holds layer_norm_parts * 2 * columns floats. The gradients of parameters have the parameters' type.
void layer_norm_backward(const LayerNormRows& shape, const void* grad_output, const void* input, const void* weight,
                         const float* mean, const float* rstd, void* grad_input, float* parts, void* grad_weight,
                         void* grad_bias, void* stream);

}  // namespace dlkern::cuda
