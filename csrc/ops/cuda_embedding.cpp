// Embedding, op layer of the CUDA column: embedding_forward, embedding_backward. float32, bfloat16 and float16. Indices
// are looked at on the host only: on a GPU that would wait for it.
#include "../cuda/embedding.h"

#include "cuda_common.h"
#include "embedding_checks.h"

namespace dlkern::ops {
namespace {

constexpr int64_t kMost = int64_t{1} << 31;

auto beside(const char* op, const Tensor& like) {
  return [op, &like](const char* name, const Tensor& x) { check_device(op, name, x, like); };
}

Tensor checked_indices(const Tensor& indices, int64_t rows) {
  Tensor result = as_contiguous(indices);
#ifdef DLKERN_CUDA_ON_HOST
  if (cuda_on_host::looks_at_indices()) check_inside(result, rows);
#else
  (void)rows;
#endif
  return result;
}

Tensor embedding_forward_cuda(const Tensor& weight, const Tensor& indices) {
  const char* op = "embedding";
  check_embedding(op, weight, indices, beside(op, weight));
  check_element(op, weight);
  const Tensor places = checked_indices(indices, weight.size(0)), table = dense_table(weight);
  Tensor output = allocate_embedding(op, weight, indices);
  if (output.numel() == 0) return output;
  Call call(weight);
  cuda::Embedding args{};
  args.count = places.numel();
  args.rows = weight.size(0), args.width = weight.size(1), args.stride = table.stride(0);
  args.wide_indices = places.scalar_type() == ScalarType::Long;
  args.element_bytes = static_cast<int64_t>(element_bytes(weight.scalar_type()));
  args.indices = call.reads(places), args.weight = call.reads(table), args.output = call.writes(output);
  cuda::embedding_forward(args, call.stream());
  return output;
}

// Values in order and where each was; equal ones stay in their order.
std::tuple<Tensor, Tensor> sorted(const Tensor& x) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  StableIValue stack[] = {from(x), from(std::optional<bool>(true)), from(int64_t{0}), from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack, TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

Tensor embedding_backward_cuda(const Tensor& grad_output, const Tensor& indices, int64_t num_embeddings,
                               int64_t padding_idx, bool scale_grad_by_freq) {
  const char* op = "embedding_backward";
  check_embedding_backward(op, grad_output, indices, num_embeddings, beside(op, grad_output));
  check_element(op, grad_output);
  check(num_embeddings < kMost && indices.numel() < kMost, op, ": more than 2^31 - 1 rows or indices (cuda column)");
  const Tensor places = checked_indices(indices, num_embeddings), grad = as_contiguous(grad_output);
  cuda::EmbeddingBackward args{};
  args.element = element_of(grad);
  args.count = places.numel();
  args.width = grad.size(indices.dim());
  args.scale_grad_by_freq = scale_grad_by_freq;
  Tensor grad_weight = allocate({num_embeddings, args.width}, grad.scalar_type(), grad);
  torch::stable::zero_(grad_weight);
  if (grad.numel() == 0 || num_embeddings == 0) return grad_weight;
  const Tensor keys = allocate({args.count}, ScalarType::Int, grad);
  const Tensor parts = allocate({cuda::embedding_parts(args.count), args.width}, ScalarType::Float, grad);
  Call call(grad);
  cuda::embedding_keys(args.count, num_embeddings, padding_idx, places.scalar_type() == ScalarType::Long,
                       call.reads(places), static_cast<int32_t*>(call.writes(keys)), call.stream());
  const auto [in_order, order] = sorted(keys);
  args.keys = static_cast<const int32_t*>(call.reads(in_order));
  args.order = static_cast<const int64_t*>(call.reads(order));
  args.grad_output = call.reads(grad);
  args.parts = static_cast<float*>(call.writes(parts));
  args.grad_weight = call.updates(grad_weight);
  cuda::embedding_backward(args, call.stream());
  return grad_weight;
}

}  // namespace

DLKERN_REGISTER(DLKERN_CUDA_KEY, m) {
  m.impl("embedding_forward_cuda", TORCH_BOX(&embedding_forward_cuda));
  m.impl("embedding_backward_cuda", TORCH_BOX(&embedding_backward_cuda));
}

}  // namespace dlkern::ops
