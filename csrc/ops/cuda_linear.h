// The linear ops of the CUDA column, for families whose products they are.
#pragma once
#include "cuda_common.h"

namespace dlkern::ops {

// activation(input weight^T + bias); input [..., in_features], weight [out_features, in_features].
Tensor linear_forward_cuda(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                           int64_t activation);
// grad_output weight
Tensor linear_backward_input_cuda(const Tensor& grad_output, const Tensor& weight);
// grad_output^T input, and the column sums of grad_output where `bias` says so
std::tuple<Tensor, Tensor> linear_backward_weight_cuda(const Tensor& grad_output, const Tensor& input, bool bias);

}  // namespace dlkern::ops
