// What the op layers of optimisers and clipping share in all columns: lists that fit each other, checked before a tensor
// is written to, and tensors as kernels see them: copied, and copied back, where elements are not laid out as the
// parameter's or have gaps between them.
#pragma once
#include <algorithm>
#include <cmath>

#include "common.h"

namespace dlkern::ops {

using Tensors = std::vector<Tensor>;
using Numbers = std::vector<double>;
using Indices = std::vector<int64_t>;

// Dimensions of more than one element, by stride from the smallest; their number.
inline int order_by_stride(const Tensor& x, int64_t* order) {
  int n = 0;
  for (int64_t d = 0; d < x.dim(); ++d)
    if (x.size(d) != 1) order[n++] = d;
  std::stable_sort(order, order + n, [&](int64_t a, int64_t b) { return x.stride(a) < x.stride(b); });
  return n;
}
// Every element has its own place and there are no gaps.
inline bool is_dense(const Tensor& x) {
  if (x.is_contiguous()) return true;
  int64_t order[kMostDims], expected = 1;
  const int n = order_by_stride(x, order);
  for (int i = 0; i < n; ++i) {
    if (x.stride(order[i]) != expected) return false;
    expected *= x.size(order[i]);
  }
  return true;
}
inline bool laid_out_as(const Tensor& x, const Tensor& model) {
  for (int64_t d = 0; d < model.dim(); ++d)
    if (model.size(d) != 1 && x.stride(d) != model.stride(d)) return false;
  return true;
}

// A tensor of a list as the kernel sees it. `copy` is how the column copies between tensors of one shape and dtype.
class Operand {
 public:
  using Copy = void (*)(const Tensor& from, const Tensor& to);

  Operand(const Tensor& x, const Tensor& model, bool model_is_dense, bool written, Copy copy)
      : original_(x), used_(x), copy_(copy) {
    if (model_is_dense ? laid_out_as(x, model) : x.is_contiguous()) return;
    written_ = written;
    int64_t strides[kMostDims];
    if (model_is_dense)
      for (int64_t d = 0; d < model.dim(); ++d) strides[d] = model.stride(d);
    else
      fill_strides(x.sizes(), false, strides);
    used_ = allocate_strided(x.sizes(), strides, x.scalar_type(), x);
    copy_(x, used_);
  }
  const Tensor& tensor() const { return used_; }
  template <class T> T* pointer() const { return mutable_data<T>(used_); }
  void write_back() const {
    if (written_) copy_(used_, original_);
  }

 private:
  Tensor original_, used_;
  Copy copy_;
  bool written_ = false;
};

// Whether memory that is written belongs to two tensors: then order matters, as in a loop over the parameters.
inline bool overlapping(const std::vector<const Tensors*>& lists) {
  struct Range {
    const char *begin, *end;
  };
  std::vector<Range> ranges;
  for (const Tensors* list : lists)
    for (const Tensor& x : *list) {
      if (x.numel() == 0) continue;
      const auto* begin = static_cast<const char*>(x.const_data_ptr());
      ranges.push_back({begin, begin + span_bytes(x)});
    }
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < ranges.size(); ++i)
    if (ranges[i].begin < ranges[i - 1].end) return true;
  return false;
}

inline void check_written(const char* op, const char* name, const Tensor& x) {
  for (int64_t d = 0; d < x.dim(); ++d)
    check(x.stride(d) != 0 || x.size(d) < 2, op, ": a tensor of ", name,
          " has several elements in one place of memory");
}

// The parameters' lists that every optimiser has. `state` are written beside the parameters; a list may be empty.
struct Step {
  const char* op;
  const Tensors& params;
  const Tensors& grads;
  std::vector<const Tensors*> state;

  // `place(name, tensor, parameter)` throws where a tensor is none that the column works on.
  template <class Place>
  void check_all(const Indices& groups, const Numbers& settings, int64_t row, Place&& place) const {
    const size_t n = params.size();
    check<std::invalid_argument>(grads.size() == n && groups.size() == n, op, ": expected ", n,
                                 " gradients and indices of groups, got ", grads.size(), " and ", groups.size());
    check<std::invalid_argument>(settings.size() % static_cast<size_t>(row) == 0, op, ": a group has ", row,
                                 " settings");
    for (int64_t group : groups)
      check<std::out_of_range>(group >= 0 && group < static_cast<int64_t>(settings.size()) / row, op, ": no group ",
                               group);
    for (const Tensors* list : state)
      check<std::invalid_argument>(list->empty() || list->size() == n, op, ": expected ", n, " tensors of state, got ",
                                   list->size());
    const auto check_like = [&](const char* name, const Tensor& x, const Tensor& param) {
      place(name, x, param);
      check(x.scalar_type() == param.scalar_type() && same_sizes(x.sizes(), param.sizes()), op, ": ", name,
            " differs from its parameter in shape or dtype");
    };
    for (size_t i = 0; i < n; ++i) {
      place("params", params[i], params[i]);
      check_written(op, "params", params[i]);
      check_like("grads", grads[i], params[i]);
      for (const Tensors* list : state)
        if (!list->empty()) {
          check_like("state", (*list)[i], params[i]);
          check_written(op, "state", (*list)[i]);
        }
    }
  }

  // Whether tensors have to go one at a time.
  bool in_turn() const {
    std::vector<const Tensors*> lists = {&params, &grads};
    lists.insert(lists.end(), state.begin(), state.end());
    return params.size() > 1 && overlapping(lists);
  }

  // Parameter i, its gradient and its state.
  std::vector<Operand> operands(size_t i, Operand::Copy copy) const {
    const Tensor& param = params[i];
    const bool dense = is_dense(param);
    std::vector<Operand> row;
    row.reserve(2 + state.size());
    row.emplace_back(param, param, dense, true, copy);
    row.emplace_back(grads[i], param, dense, false, copy);
    for (const Tensors* list : state)
      if (!list->empty()) row.emplace_back((*list)[i], param, dense, true, copy);
    return row;
  }
};

inline void check_fresh(const Indices& fresh, const Tensors& momentum_buffers) {
  check<std::invalid_argument>(fresh.size() == momentum_buffers.size(), "sgd: fresh has ", fresh.size(),
                               " elements, expected ", momentum_buffers.size());
}

// Adam's lists that may not be empty.
inline void check_adam(size_t n, const Tensors& exp_avgs, const Tensors& exp_avg_sqs, const Tensors& steps) {
  check<std::invalid_argument>(exp_avgs.size() == n && exp_avg_sqs.size() == n && steps.size() == n, "adam: expected ",
                               n, " averages and steps");
}

// Counts a step in the host's memory up, and says how many there were.
inline double counted(const Tensor& x) {
  if (x.scalar_type() == ScalarType::Double) return *mutable_data<double>(x) += 1;
  return static_cast<double>(*mutable_data<float>(x) += 1);
}

// Gradients that are to be changed; `place` as above.
template <class Place> void check_grads(const char* op, const Tensors& grads, Place&& place) {
  for (const Tensor& x : grads) {
    place("grads", x, grads[0]);
    check_written(op, "grads", x);
  }
}
inline void check_norm(const char* op, const Tensors& grads, double norm_type) {
  for (const Tensor& x : grads)
    check(x.numel() > 0 || (norm_type >= 0 && !std::isinf(norm_type)), op, ": no norm of order ", norm_type,
          " of a gradient without elements");
}
inline void check_finite(double norm, double norm_type) {
  check(std::isfinite(norm), "The total norm of order ", norm_type,
        " for gradients from `parameters` is non-finite, so it cannot be clipped. To disable this error and scale the "
        "gradients by the non-finite norm anyway, set `error_if_nonfinite=False`");
}

// Kind is a column's enum of what is summed.
template <class Kind> Kind norm_kind(double norm_type) {
  return std::isinf(norm_type) ? (norm_type > 0 ? Kind::largest : Kind::smallest)
         : norm_type == 0      ? Kind::nonzeros
         : norm_type == 1      ? Kind::magnitudes
         : norm_type == 2      ? Kind::squares
                               : Kind::powers;
}

// What torch promotes the gradients' dtypes to.
inline ScalarType common_type(const Tensors& grads) {
  ScalarType result = grads[0].scalar_type();
  for (const Tensor& x : grads) {
    const ScalarType other = x.scalar_type();
    if (element_bytes(other) > element_bytes(result)) result = other;
    if (other != result && element_bytes(other) == element_bytes(result))
      result = ScalarType::Float;  // the 16-bit ones
  }
  return result;
}

}  // namespace dlkern::ops
