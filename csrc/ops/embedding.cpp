// Embedding, op layer: embedding_forward, embedding_backward.
#include "../cpu/embedding.h"

#include "common.h"

namespace dlkern::ops {
namespace {

// Indices side by side as int64, all of them rows of the table.
Tensor checked_indices(const char* op, const Tensor& indices, int64_t rows) {
  check(indices.is_cpu(), op, ": expected CPU tensors");
  const ScalarType dtype = indices.scalar_type();
  check(dtype == ScalarType::Long || dtype == ScalarType::Int, op, ": indices are not int64 or int32");
  Tensor result = as_contiguous(indices);
  const int64_t count = result.numel();  // a call into torch, as are the tensors' addresses
  if (dtype == ScalarType::Int) {
    const Tensor narrow = result;
    result = allocate(narrow.sizes(), ScalarType::Long, narrow);
    const int32_t* from = data<int32_t>(narrow);
    int64_t* to = mutable_data<int64_t>(result);
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  }
  const int64_t* at = data<int64_t>(result);
  bool inside = true;
  for (int64_t i = 0; i < count; ++i) inside &= at[i] >= 0 && at[i] < rows;
  check<std::out_of_range>(inside, "index out of range in self");
  return result;
}

Tensor embedding_forward_cpu(const Tensor& weight, const Tensor& indices) {
  const char* op = "embedding";
  check(weight.is_cpu(), op, ": expected CPU tensors");
  check(weight.dim() == 2, "'weight' must be 2-D");
  const Tensor rows = checked_indices(op, indices, weight.size(0));
  const int64_t width = weight.size(1);
  const Tensor table = weight.stride(1) == 1 || width == 1 ? weight : as_contiguous(weight);
  const Ints places = indices.sizes();
  check(places.size() < kMostDims, op, ": more than ", kMostDims, " dimensions");
  int64_t size[kMostDims] = {};
  for (size_t d = 0; d < places.size(); ++d) size[d] = places[d];
  size[places.size()] = width;
  Tensor output = allocate(Ints(size, places.size() + 1), weight.scalar_type(), weight);
  dispatch_floating(weight.scalar_type(), op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    cpu::EmbeddingArgs<T> args{rows.numel(),        width,          table.stride(0),
                               data<int64_t>(rows), data<T>(table), mutable_data<T>(output)};
    DLKERN_CALL(embedding, args);
  });
  return output;
}

Tensor embedding_backward_cpu(const Tensor& grad_output, const Tensor& indices, int64_t num_embeddings,
                              int64_t padding_idx, bool scale_grad_by_freq) {
  const char* op = "embedding_backward";
  check(grad_output.is_cpu(), op, ": expected CPU tensors");
  constexpr int64_t kLargest = int64_t{1} << 48;  // rows, and elements: no product below can overflow
  check(num_embeddings >= 0 && num_embeddings < kLargest, op, ": num_embeddings is ", num_embeddings);
  const int64_t dims = indices.dim();
  check(grad_output.dim() == dims + 1, op, ": grad_output has ", grad_output.dim(), " dimensions, expected ", dims + 1);
  for (int64_t d = 0; d < dims; ++d)
    check(grad_output.size(d) == indices.size(d), op, ": size ", d, " of grad_output does not fit indices");
  const Tensor rows = checked_indices(op, indices, num_embeddings), grad = as_contiguous(grad_output);
  const int64_t width = grad_output.size(dims);
  check(width == 0 || num_embeddings < kLargest / width, op, ": a gradient of ", num_embeddings, " x ", width,
        " elements is too large");
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
