// Embedding, op layer: embedding_forward, embedding_backward.
#include "../cpu/embedding.h"

#include "embedding_checks.h"

namespace dlkern::ops {
namespace {

void check_cpu(const char* op, const char*, const Tensor& x, const Tensor&) {
  check(x.is_cpu(), op, ": expected CPU tensors");
}

Tensor embedding_forward_cpu(const Tensor& weight, const Tensor& indices) {
  const char* op = "embedding";
  const EmbeddingForward f = checked_forward<check_cpu>(op, weight, indices);
  dispatch_floating(weight.scalar_type(), op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    cpu::EmbeddingArgs<T> args{f.rows.numel(),        f.width,          f.table.stride(0),
                               data<int64_t>(f.rows), data<T>(f.table), mutable_data<T>(f.output)};
    DLKERN_CALL(embedding, args);
  });
  return f.output;
}

Tensor embedding_backward_cpu(const Tensor& grad_output, const Tensor& indices, int64_t num_embeddings,
                              int64_t padding_idx, bool scale_grad_by_freq) {
  const char* op = "embedding_backward";
  const EmbeddingBackward b = checked_backward<check_cpu>(op, grad_output, indices, num_embeddings);
  Tensor grad_weight = allocate({num_embeddings, b.width}, b.grad.scalar_type(), b.grad);
  dispatch_floating(b.grad.scalar_type(), op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    cpu::EmbeddingBackwardArgs<T> args{b.rows.numel(),
                                       num_embeddings,
                                       b.width,
                                       data<int64_t>(b.rows),
                                       data<T>(b.grad),
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
