#pragma once
#include <cstdint>

#include "isa.h"
#include "scalar.h"

namespace dlkern::cpu {

enum RnnMode { kRnnTanh, kRnnRelu, kRnnLstm, kRnnGru };

// One layer in one direction over a packed sequence: the rows of time step t are offsets[t] + b for b < batch_sizes[t],
// which does not grow with t. Padded input without lengths is the case of equal batch sizes.
struct RnnShape {
  int mode;
  bool reverse;
  int64_t inputs, hidden, batch, steps, rows;
  const int64_t *batch_sizes, *offsets;  // [steps]
  int64_t gates() const { return mode == kRnnLstm ? 4 : mode == kRnnGru ? 3 : 1; }
  // Blocks of `hidden` columns that a row of the saved gates and of their gradient has. For GRU there are four: what the
  // recurrent product adds to n, r, z, n.
  int64_t slots() const { return mode == kRnnGru ? 4 : gates(); }
};

// All contiguous; weights are [gates * hidden, inputs or hidden] in torch's order of gates, biases may be null, cells
// (c0, c_n, cells) are LSTM's.
template <class T> struct RnnForwardArgs {
  RnnShape shape;
  const T *input, *weight_ih, *weight_hh, *bias_ih, *bias_hh;
  const T *h0, *c0;  // [batch, hidden]
  T *output, *h_n, *c_n;  // [rows, hidden], [batch, hidden]
  acc_t<T>* gates;  // [rows, slots * hidden]: after their activations
  acc_t<T>* cells;  // [rows, hidden]
  acc_t<T>* states;  // [rows, hidden]: output before it is rounded to T; output itself where it is not
};

template <class T> struct RnnBackwardArgs {
  RnnShape shape;
  const T *grad_output, *grad_h_n, *grad_c_n;
  const T *input, *weight_ih, *weight_hh, *h0, *c0, *output;
  const acc_t<T>*gates, *cells;
  acc_t<T>* grad_gates;  // [rows, slots * hidden], working memory
  acc_t<T>* previous;  // [rows, hidden], working memory
  T *grad_input, *grad_weight_ih, *grad_weight_hh, *grad_bias_ih, *grad_bias_hh;  // null: not wanted
  T *grad_h0, *grad_c0;
};

#define DLKERN_DECLARE_RNN(T)                                 \
  DLKERN_DECLARE(void, rnn_forward, const RnnForwardArgs<T>&) \
  DLKERN_DECLARE(void, rnn_backward, const RnnBackwardArgs<T>&)
DLKERN_DECLARE_RNN(float)
DLKERN_DECLARE_RNN(double)
DLKERN_DECLARE_RNN(bfloat16)
#undef DLKERN_DECLARE_RNN

}  // namespace dlkern::cpu
