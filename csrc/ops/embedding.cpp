// Embedding, op layer: embedding_forward, embedding_backward.
#include "../cpu/embedding.h"

#include "common.h"
#include "embedding_checks.h"

namespace dlkern::ops {
namespace {

auto on_cpu(const char* op) {
  return [op](const char*, const Tensor& x) { check(x.is_cpu(), op, ": expected CPU tensors"); };
}

// Indices side by side as int64, all of them rows of the table.
Tensor checked_indices(const Tensor& indices, int64_t rows) {
  Tensor result = as_contiguous(indices);
  check_inside(result, rows);
  if (result.scalar_type() == ScalarType::Int) {
    const Tensor narrow = result;
    result = allocate(narrow.sizes(), ScalarType::Long, narrow);
    const int64_t count = narrow.numel();  // a call into torch
    const int32_t* from = data<int32_t>(narrow);
    int64_t* to = mutable_data<int64_t>(result);
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  }
  return result;
}

Tensor embedding_forward_cpu(const Tensor& weight, const Tensor& indices) {
  const char* op = "embedding";
  check_embedding(op, weight, indices, on_cpu(op));
  const Tensor rows = checked_indices(indices, weight.size(0)), table = dense_table(weight);
  Tensor output = allocate_embedding(op, weight, indices);
  dispatch_floating(weight.scalar_type(), op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    cpu::EmbeddingArgs<T> args{rows.numel(),        weight.size(1), table.stride(0),
                               data<int64_t>(rows), data<T>(table), mutable_data<T>(output)};
    DLKERN_CALL(embedding, args);
  });
  return output;
}

Tensor embedding_backward_cpu(const Tensor& grad_output, const Tensor& indices, int64_t num_embeddings,
                              int64_t padding_idx, bool scale_grad_by_freq) {
  const char* op = "embedding_backward";
  check_embedding_backward(op, grad_output, indices, num_embeddings, on_cpu(op));
  const Tensor rows = checked_indices(indices, num_embeddings), grad = as_contiguous(grad_output);
  const int64_t width = grad_output.size(indices.dim());
  Tensor grad_weight = allocate({num_embeddings, width}, grad.scalar_type(), grad);
  dispatch_floating(grad.scalar_type(), op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    cpu::EmbeddingBackwardArgs<T> args{rows.numel(),
                                       num_embeddings,
                                       width,
                                       data<int64_t>(rows),
                                       data<T>(grad),
                                       padding_idx,
                                       scale_grad_by_freq,
                                       mutable_data<T>(grad_weight)};
    DLKERN_CALL(embedding_backward, args);
  });
  return grad_weight;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkern, CPU, m) {
  m.impl("embedding_forward_cpu", TORCH_BOX(&embedding_forward_cpu));
  m.impl("embedding_backward_cpu", TORCH_BOX(&embedding_backward_cpu));
}

}  // namespace dlkern::ops
