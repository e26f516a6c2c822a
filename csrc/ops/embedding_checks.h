// What the columns' op layers of embedding share: checks of everything a kernel relies on, with torch's exception types.
#pragma once
#include "common.h"

namespace dlkern::ops {

// What a column checks of where a tensor is, beside the first one.
using CheckPlace = void(const char* op, const char* name, const Tensor& x, const Tensor& first);

// Indices side by side as int64, all of them rows of the table. On a GPU, looking at them would wait for it: its
// kernels give NaN where there is no such row, and no gradient.
template <CheckPlace check_place>
Tensor checked_rows(const char* op, const Tensor& indices, const Tensor& other, int64_t rows) {
  check_place(op, "indices", indices, other);
  const ScalarType dtype = indices.scalar_type();
  check(dtype == ScalarType::Long || dtype == ScalarType::Int, op, ": indices are not int64 or int32");
  Tensor result = as_contiguous(indices);
  const int64_t count = result.numel();  // a call into torch, as are the tensors' addresses
  if (!result.is_cpu()) return dtype == ScalarType::Int ? torch::stable::to(result, ScalarType::Long) : result;
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

struct EmbeddingForward {
  Tensor rows, table;  // the indices; the table, whose rows have no gaps
  int64_t width;
  Tensor output;
};

template <CheckPlace check_place>
EmbeddingForward checked_forward(const char* op, const Tensor& weight, const Tensor& indices) {
  check_place(op, "weight", weight, weight);
  check(weight.dim() == 2, "'weight' must be 2-D");
  const Tensor rows = checked_rows<check_place>(op, indices, weight, weight.size(0));
  const int64_t width = weight.size(1);
  const Tensor table = weight.stride(1) == 1 || width == 1 ? weight : as_contiguous(weight);
  const Ints places = indices.sizes();
  check(places.size() < kMostDims, op, ": more than ", kMostDims, " dimensions");
  int64_t size[kMostDims] = {};
  for (size_t d = 0; d < places.size(); ++d) size[d] = places[d];
  size[places.size()] = width;
  return {rows, table, width, allocate(Ints(size, places.size() + 1), weight.scalar_type(), weight)};
}

struct EmbeddingBackward {
  Tensor rows, grad;
  int64_t width;
};

template <CheckPlace check_place>
EmbeddingBackward checked_backward(const char* op, const Tensor& grad_output, const Tensor& indices,
                                   int64_t num_embeddings) {
  check_place(op, "grad_output", grad_output, grad_output);
  constexpr int64_t kLargest = int64_t{1} << 48;  // rows, and elements: no product below can overflow
  check(num_embeddings >= 0 && num_embeddings < kLargest, op, ": num_embeddings is ", num_embeddings);
  const int64_t dims = indices.dim();
  check(grad_output.dim() == dims + 1, op, ": grad_output has ", grad_output.dim(), " dimensions, expected ", dims + 1);
  for (int64_t d = 0; d < dims; ++d)
    check(grad_output.size(d) == indices.size(d), op, ": size ", d, " of grad_output does not fit indices");
  const Tensor rows = checked_rows<check_place>(op, indices, grad_output, num_embeddings),
               grad = as_contiguous(grad_output);
  const int64_t width = grad_output.size(dims);
  check(width == 0 || num_embeddings < kLargest / width, op, ": a gradient of ", num_embeddings, " x ", width,
        " elements is too large");
  return {rows, grad, width};
}

}  // namespace dlkern::ops
