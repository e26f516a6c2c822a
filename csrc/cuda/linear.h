// Launchers of linear.cu, in plain C++ for the op layer. Matrices are row-major, of one element: bfloat16 or
// float16.
// Each throws std::runtime_error where its launch fails.
#pragma once
#include <cstdint>

#include "element.h"

namespace dlkern::cuda {

// output[rows, out_features] = activation(input[rows, in_features] weight^T + bias); bias may be null.
// activation: 0 none, 1 relu, 2 tanh, 3 sigmoid.
void linear_forward(Element element, const void* input, const void* weight, const void* bias, void* output,
                    int64_t rows, int64_t in_features, int64_t out_features, int activation, void* stream);

// grad_input[rows, in_features] = grad_output weight
void linear_backward_input(Element element, const void* grad_output, const void* weight, void* grad_input, int64_t rows,
                           int64_t in_features, int64_t out_features, void* stream);

// grad_weight[out_features, in_features] = grad_output^T input; grad_bias, where not null, the column sums of
// grad_output.
void linear_backward_weight(Element element, const void* grad_output, const void* input, void* grad_weight,
                            void* grad_bias, int64_t rows, int64_t in_features, int64_t out_features, void* stream);

// The same by linear_sm90.cu, where the GPU is a Hopper and the matrices fit it; false where nothing was done.
bool linear_forward_sm90(Element element, const void* input, const void* weight, const void* bias, void* output,
                         int64_t rows, int64_t in_features, int64_t out_features, int activation, void* stream);
bool linear_backward_input_sm90(Element element, const void* grad_output, const void* weight, void* grad_input,
                                int64_t rows, int64_t in_features, int64_t out_features, void* stream);
bool linear_backward_weight_sm90(Element element, const void* grad_output, const void* input, void* grad_weight,
                                 void* grad_bias, int64_t rows, int64_t in_features, int64_t out_features,
                                 void* stream);

// grad_input = grad_output * activation'(.), from the activation's output; `count` elements, float32 too.
void activation_backward(Element element, const void* grad_output, const void* output, void* grad_input, int64_t count,
                         int activation, void* stream);

}  // namespace dlkern::cuda
