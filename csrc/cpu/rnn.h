#pragma once
#include <cstdint>

#include "isa.h"
#include "scalar.h"

namespace dlkern::cpu {

enum RnnMode { kRnnTanh, kRnnRelu, kRnnLstm, kRnnGru };

// One layer in one direction. Sequences are numbered from the longest to the shortest, so that the ones that step t
// has are those before batch_sizes[t], which does not grow with t: a packed sequence as it is; a padded one without
// lengths, which has equal batch sizes; and a padded one with lengths, by way of `order`. Rows that no step has
// (padding) are zero in all results.
struct RnnShape {
  int mode;
  bool reverse, projects;
  int64_t inputs, hidden, state, batch, steps, rows;  // state: hidden, or the size that LSTM's projection has
  const int64_t *batch_sizes, *offsets;  // [steps]
  const int64_t* order;  // [batch]: where the n-th longest sequence lies in the batch; null where that is n
  int64_t gates() const { return mode == kRnnLstm ? 4 : mode == kRnnGru ? 3 : 1; }
  // Blocks of `hidden` columns that a row of the saved gates and of their gradient has. For GRU there are four: what the
  // recurrent product adds to n, r, z, n.
  int64_t slots() const { return mode == kRnnGru ? 4 : gates(); }
  int64_t place(int64_t b) const { return order ? order[b] : b; }
  int64_t row(int64_t t, int64_t b) const { return offsets[t] + place(b); }
};

// All contiguous; weights are [gates * hidden, inputs or state] in torch's order of gates, biases and weight_hr may be
// null, cells (c0, c_n, cells) are LSTM's.
template <class T> struct RnnForwardArgs {
  RnnShape shape;
  const T *input, *weight_ih, *weight_hh, *bias_ih, *bias_hh, *weight_hr;
  const T *h0, *c0;  // [batch, state], [batch, hidden]
  T *output, *h_n, *c_n;  // [rows, state], [batch, state], [batch, hidden]
  // For the backward, or null: gates [rows, slots * hidden] after their activations (of RNN, the activation's
  // derivative), and cells [rows, hidden].
  acc_t<T>*gates, *cells;
};

template <class T> struct RnnBackwardArgs {
  RnnShape shape;
  const T *grad_output, *grad_h_n, *grad_c_n;
  const T *input, *weight_ih, *weight_hh, *weight_hr, *h0, *c0, *output;
  const acc_t<T>*gates, *cells;
  // Working memory: [rows, slots * hidden], [rows, state], and of projections [rows, state] and [rows, hidden].
  acc_t<T>*grad_gates, *previous, *grad_states, *unprojected;
  T *grad_input, *grad_weight_ih, *grad_weight_hh, *grad_bias_ih, *grad_bias_hh, *grad_weight_hr;  // null: not wanted
  T *grad_h0, *grad_c0;
};

#define DLKERN_DECLARE_RNN(T)                                 \
  DLKERN_DECLARE(void, rnn_forward, const RnnForwardArgs<T>&) \
  DLKERN_DECLARE(void, rnn_backward, const RnnBackwardArgs<T>&)
DLKERN_DECLARE_RNN(float)
DLKERN_DECLARE_RNN(double)
DLKERN_DECLARE_RNN(bfloat16)
DLKERN_DECLARE_RNN(float16)
#undef DLKERN_DECLARE_RNN

}  // namespace dlkern::cpu
