// Embedding, op layer of the CUDA column: embedding_forward, embedding_backward. float32, bfloat16 and float16.
#include "../cuda/embedding.h"

#include <array>

#include "cuda_common.h"
#include "embedding_checks.h"

namespace dlkern::ops {
namespace {

void check_here(const char* op, const char* name, const Tensor& x, const Tensor& first) {
  if (&x == &first) check_element(op, x);
  check_device(op, name, x, first);
}

cuda::EmbeddingTable table_of(const char* op, const Tensor& x, int64_t count, int64_t rows, int64_t width) {
  check(count < int64_t{1} << 31, op, ": more than 2^31 - 1 positions (cuda column)");
  return {element_of(x), count, rows, width};
}

// The indices in rising order and the position of each: torch's stable sort, which runs where they are.
std::array<Tensor, 2> sorted(const Tensor& rows) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const std::array<int64_t, 1> flat{rows.numel()};
  std::array<StableIValue, 4> stack{from(torch::stable::view(rows, flat)), from(std::optional<bool>(true)),
                                    from(int64_t{0}), from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

Tensor embedding_forward_cuda(const Tensor& weight, const Tensor& indices) {
  const char* op = "embedding";
  const EmbeddingForward f = checked_forward<check_here>(op, weight, indices);
  const cuda::EmbeddingTable shape = table_of(op, weight, f.rows.numel(), weight.size(0), f.width);
  if (f.output.numel() == 0) return f.output;
  Call call(f.table);
  cuda::embedding_forward(shape, call.reads(f.table), f.table.stride(0),
                          static_cast<const int64_t*>(call.reads(f.rows)), call.writes(f.output), call.stream());
  return f.output;
}

Tensor embedding_backward_cuda(const Tensor& grad_output, const Tensor& indices, int64_t num_embeddings,
                               int64_t padding_idx, bool scale_grad_by_freq) {
  const char* op = "embedding_backward";
  const EmbeddingBackward b = checked_backward<check_here>(op, grad_output, indices, num_embeddings);
  const cuda::EmbeddingTable shape = table_of(op, b.grad, b.rows.numel(), num_embeddings, b.width);
  Tensor grad_weight = allocate({num_embeddings, b.width}, b.grad.scalar_type(), b.grad);
  torch::stable::zero_(grad_weight);
  if (grad_weight.numel() == 0 || b.grad.numel() == 0) return grad_weight;
  const auto [in_order, order] = sorted(b.rows);
  const Tensor parts = allocate({cuda::embedding_parts(shape)}, ScalarType::Float, b.grad);
  Call call(b.grad);
  cuda::embedding_backward(shape, call.reads(b.grad), static_cast<const int64_t*>(call.reads(in_order)),
                           static_cast<const int64_t*>(call.reads(order)), padding_idx, scale_grad_by_freq,
                           static_cast<float*>(call.writes(parts)), call.updates(grad_weight), call.stream());
  return grad_weight;
}

}  // namespace

DLKERN_REGISTER(DLKERN_CUDA_KEY, m) {
  m.impl("embedding_forward_cuda", TORCH_BOX(&embedding_forward_cuda));
  m.impl("embedding_backward_cuda", TORCH_BOX(&embedding_backward_cuda));
}

}  // namespace dlkern::ops
