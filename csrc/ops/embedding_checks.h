// What embedding's op layers of all columns share. `place(name, tensor)` throws where a tensor is
// not where the column works.
#pragma once
#include "common.h"

namespace dlkern::ops {

template <class Index> bool all_inside(const Tensor& indices, int64_t rows) {
  const Index* at = data<Index>(indices);
  const int64_t count = indices.numel();  // a call into torch, as is the tensor's address
  bool inside = true;
  for (int64_t i = 0; i < count; ++i) inside &= at[i] >= 0 && at[i] < rows;
  return inside;
}
// Of indices side by side in the host's memory: all are rows of the table.
inline void check_inside(const Tensor& indices, int64_t rows) {
  const bool wide = indices.scalar_type() == ScalarType::Long;
  check<std::out_of_range>(wide ? all_inside<int64_t>(indices, rows) : all_inside<int32_t>(indices, rows),
                           "index out of range in self");
}

template <class Place> void check_indices(const char* op, const Tensor& indices, Place&& place) {
  place("indices", indices);
  const ScalarType dtype = indices.scalar_type();
  check(dtype == ScalarType::Long || dtype == ScalarType::Int, op, ": indices are not int64 or int32");
}

template <class Place>
void check_embedding(const char* op, const Tensor& weight, const Tensor& indices, Place&& place) {
  place("weight", weight);
  check(weight.dim() == 2, "'weight' must be 2-D");
  check_indices(op, indices, place);
}

// A table with numbers side by side in each row.
inline Tensor dense_table(const Tensor& weight) {
  return weight.stride(1) == 1 || weight.size(1) == 1 ? weight : as_contiguous(weight);
}

inline Tensor allocate_embedding(const char* op, const Tensor& weight, const Tensor& indices) {
  const Ints places = indices.sizes();
  check(places.size() < kMostDims, op, ": more than ", kMostDims, " dimensions");
  int64_t size[kMostDims] = {};
  for (size_t d = 0; d < places.size(); ++d) size[d] = places[d];
  size[places.size()] = weight.size(1);
  return allocate(Ints(size, places.size() + 1), weight.scalar_type(), weight);
}

template <class Place>
void check_embedding_backward(const char* op, const Tensor& grad_output, const Tensor& indices, int64_t num_embeddings,
                              Place&& place) {
  place("grad_output", grad_output);
  constexpr int64_t kLargest = int64_t{1} << 48;  // rows, and elements: no product in a column can overflow
  check(num_embeddings >= 0 && num_embeddings < kLargest, op, ": num_embeddings is ", num_embeddings);
  const int64_t dims = indices.dim();
  check(grad_output.dim() == dims + 1, op, ": grad_output has ", grad_output.dim(), " dimensions, expected ", dims + 1);
  for (int64_t d = 0; d < dims; ++d)
    check(grad_output.size(d) == indices.size(d), op, ": size ", d, " of grad_output does not fit indices");
  check_indices(op, indices, place);
  const int64_t width = grad_output.size(dims);
  check(width == 0 || num_embeddings < kLargest / width, op, ": a gradient of ", num_embeddings, " x ", width,
        " elements is too large");
}

}  // namespace dlkern::ops
