// What the op layers of recurrent layers share: the checks of a sequence, its steps, and the checks of options.
#pragma once
#include "../cpu/rnn.h"
#include "common.h"

namespace dlkern::ops {

// A sequence's shape, checked, and the memory its pointers lead to.
struct Sequence {
  cpu::RnnShape shape;
  std::vector<int64_t> batch_sizes, offsets, order;
};

inline bool together(const Tensor& x, const Tensor& like) {
  return x.is_cpu() ? like.is_cpu() : !like.is_cpu() && x.get_device_index() == like.get_device_index();
}

inline void check_tensor(const char* op, const char* name, const Tensor& x, const Tensor& like,
                         std::vector<int64_t> size) {
  check(together(x, like), op, ": ", name, " is not where input is");
  check(x.scalar_type() == like.scalar_type(), op, ": ", name, " differs in dtype");
  bool fits = x.dim() == static_cast<int64_t>(size.size());
  for (size_t d = 0; fits && d < size.size(); ++d) fits = x.size(static_cast<int64_t>(d)) == size[d];
  check(fits, op, ": ", name, " is not ", Shown{Ints(size.data(), size.size())});
}

inline std::vector<int64_t> numbers(const char* op, const char* name, const Tensor& x) {
  check(x.is_cpu() && x.scalar_type() == ScalarType::Long && x.dim() == 1, op, ": ", name,
        " is not a 1-D int64 tensor on the CPU");
  const Tensor y = as_contiguous(x);
  const int64_t* from = data<int64_t>(y);
  return {from, from + y.size(0)};
}

// Batch sizes of sequences of these lengths, and which of them is the n-th longest (of equals, the first).
inline void order_by_length(const char* op, const std::vector<int64_t>& lengths, int64_t steps, Sequence& result) {
  check(static_cast<int64_t>(lengths.size()) == result.shape.batch, op, ": expected ", result.shape.batch,
        " lengths, got ", lengths.size());
  std::vector<int64_t>& sizes = result.batch_sizes;
  int64_t most = 0;
  for (int64_t length : lengths) {
    check(length > 0, "Length of all samples has to be greater than 0, but found an element in 'lengths' that is <= 0");
    check(length <= steps, op, ": a length of ", length, ", but input has ", steps, " time steps");
    if (length > most) most = length;
  }
  sizes.assign(static_cast<size_t>(most), 0);  // first, how many have each length; then, that or more
  for (int64_t length : lengths) ++sizes[static_cast<size_t>(length - 1)];
  for (size_t t = sizes.size() - 1; t-- > 0;) sizes[t] += sizes[t + 1];
  std::vector<int64_t> next(sizes.begin() + 1, sizes.end());  // where the next of a length goes: behind the longer ones
  next.push_back(0);
  result.order.resize(lengths.size());
  for (size_t b = 0; b < lengths.size(); ++b)
    result.order[static_cast<size_t>(next[static_cast<size_t>(lengths[b] - 1)]++)] = static_cast<int64_t>(b);
}

inline Sequence check_sequence(const char* op, const Tensor& input, const Tensor& weight_ih, const Tensor& weight_hh,
                               const std::optional<Tensor>& weight_hr, const Tensor& h0,
                               const std::optional<Tensor>& c0, const std::optional<Tensor>& batch_sizes,
                               const std::optional<Tensor>& lengths, int64_t mode, bool reverse) {
  check(mode >= 0 && mode <= 3, op, ": no mode ", mode);
  check(input.dim() == (batch_sizes ? 2 : 3), op, ": input has ", input.dim(), " dimensions, expected ",
        batch_sizes ? 2 : 3);
  check(weight_hh.dim() == 2, op, ": weight_hh has ", weight_hh.dim(), " dimensions, expected 2");
  check(!batch_sizes || !lengths, op, ": batch_sizes and lengths exclude each other");
  Sequence result;
  cpu::RnnShape& s = result.shape;
  s.mode = static_cast<int>(mode);
  s.reverse = reverse;
  s.inputs = input.size(input.dim() - 1);
  s.state = weight_hh.size(1);
  s.projects = weight_hr.has_value();
  s.order = nullptr;
  check(!s.projects || (mode == cpu::kRnnLstm && weight_hr->dim() == 2), op, ": weight_hr is LSTM's, [state, hidden]");
  s.hidden = s.projects ? weight_hr->size(1) : s.state;
  check(s.hidden > 0 && s.state > 0 && s.inputs > 0, op, ": input, hidden or state size is zero");
  if (batch_sizes) {
    result.batch_sizes = numbers(op, "batch_sizes", *batch_sizes);
    s.rows = input.size(0);
    s.batch = result.batch_sizes.empty() ? 0 : result.batch_sizes[0];
  } else {
    s.batch = input.size(1);
    s.rows = input.size(0) * s.batch;
    if (lengths)
      order_by_length(op, numbers(op, "lengths", *lengths), input.size(0), result);
    else
      result.batch_sizes.assign(static_cast<size_t>(input.size(0)), s.batch);
  }
  s.steps = static_cast<int64_t>(result.batch_sizes.size());
  check(s.steps > 0 && s.batch > 0, op, ": no time steps, or no sequences");
  int64_t rows = 0, before = s.batch;
  for (int64_t size : result.batch_sizes) {
    check(size > 0 && size <= before, op, ": batch sizes must be positive and not grow");
    check(size <= s.rows - rows, op, ": batch_sizes count more rows than input has");
    result.offsets.push_back(rows);
    rows += lengths ? s.batch : size;
    before = size;
  }
  check(lengths || rows == s.rows, op, ": batch_sizes count ", rows, " rows, input has ", s.rows);
  if (lengths) s.order = result.order.data();
  s.batch_sizes = result.batch_sizes.data();
  s.offsets = result.offsets.data();
  check_tensor(op, "weight_ih", weight_ih, input, {s.gates() * s.hidden, s.inputs});
  check_tensor(op, "weight_hh", weight_hh, input, {s.gates() * s.hidden, s.state});
  if (weight_hr) check_tensor(op, "weight_hr", *weight_hr, input, {s.state, s.hidden});
  check_tensor(op, "h0", h0, input, {s.batch, s.state});
  check(c0.has_value() == (mode == cpu::kRnnLstm), op, ": c0 is for LSTM, and LSTM wants one");
  if (c0) check_tensor(op, "c0", *c0, input, {s.batch, s.hidden});
  return result;
}

// What rnn_options_forward and rnn_options_backward have beyond the others; see cpu/rnn_options.h.
struct RnnOptions {
  std::optional<Tensor> peephole, norm_ih, norm_hh, norm_c, norm_c_bias, mask, fresh_h, fresh_c;
  double zoneout_h, zoneout_c;
};

inline void check_options(const char* op, const RnnOptions& o, const cpu::RnnShape& s, const Tensor& input) {
  const int64_t width = s.gates() * s.hidden;
  const bool lstm = s.mode == cpu::kRnnLstm;
  const auto weight = [&](const char* name, const std::optional<Tensor>& x, std::vector<int64_t> size) {
    if (x) check_tensor(op, name, *x, input, size);
  };
  weight("peephole", o.peephole, {3, s.hidden});
  weight("norm_ih", o.norm_ih, {width});
  weight("norm_hh", o.norm_hh, {width});
  weight("norm_c", o.norm_c, {s.hidden});
  weight("norm_c_bias", o.norm_c_bias, {s.hidden});
  check(lstm || (!o.peephole && !o.fresh_c && o.zoneout_c == 0), op, ": peephole, fresh_c and zoneout_c are LSTM's");
  check(o.norm_ih.has_value() == o.norm_hh.has_value() && o.norm_c.has_value() == (lstm && o.norm_ih) &&
            (o.norm_c || !o.norm_c_bias),
        op, ": norm_ih, norm_hh and, of LSTM, norm_c come together, norm_c_bias with norm_c");
  const auto factors = [&](const char* name, const std::optional<Tensor>& x, int64_t rows, int64_t units) {
    check(!x || (together(*x, input) && x->scalar_type() == sum_type(input) && x->dim() > 1 &&
                 x->numel() == rows * units && x->size(x->dim() - 1) == units),
          op, ": ", name, " is not one number of the type of sums for each of ", rows, " x ", units, " units");
  };
  factors("mask", o.mask, s.batch, s.state);
  factors("fresh_h", o.fresh_h, s.rows, s.state);
  factors("fresh_c", o.fresh_c, s.rows, s.hidden);
  for (double share : {o.zoneout_h, o.zoneout_c})
    check<std::invalid_argument>(share >= 0 && share <= 1, op, ": zoneout has to be between 0 and 1, but got ", share);
}

inline RnnOptions dense(const RnnOptions& o) {
  return {as_contiguous(o.peephole),
          as_contiguous(o.norm_ih),
          as_contiguous(o.norm_hh),
          as_contiguous(o.norm_c),
          as_contiguous(o.norm_c_bias),
          as_contiguous(o.mask),
          as_contiguous(o.fresh_h),
          as_contiguous(o.fresh_c),
          o.zoneout_h,
          o.zoneout_c};
}

}  // namespace dlkern::ops
