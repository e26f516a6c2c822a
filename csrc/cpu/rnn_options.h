#pragma once
#include "rnn.h"

namespace dlkern::cpu {

// What the options of a recurrent layer (layer_norm, recurrent_dropout, zoneout, peephole) add to it; null and 0 where
// they are off.
template <class T> struct RnnOptions {
  const T* peephole;  // [3, hidden]: weights of the cell in i, f and o
  const T *norm_ih, *norm_hh, *norm_c, *norm_c_bias;  // [gates * hidden] twice, [hidden] twice, LSTM's
  const acc_t<T>* mask;  // [batch, state]: factors of the state in the recurrent product
  const acc_t<T>*fresh_h, *fresh_c;  // [rows, state], [rows, hidden]: 0 where a unit stays what it was
  double zoneout_h, zoneout_c;  // the share of what a unit was, where there is no fresh_h, fresh_c
};

constexpr double kRnnNormEps = 1e-5;

// A row of what the normalisations leave: input part, hidden part, LSTM's cell, and three reciprocal deviations.
inline int64_t rnn_norm_size(const RnnShape& s) {
  return 2 * s.gates() * s.hidden + (s.mode == kRnnLstm ? s.hidden : 0) + 3;
}

// norms: [rows, rnn_norm_size], for the backward of layers with normalisation, or null.
template <class T> struct RnnOptionsForwardArgs {
  RnnForwardArgs<T> layer;
  RnnOptions<T> options;
  acc_t<T>* norms;
};

template <class T> struct RnnOptionsBackwardArgs {
  RnnBackwardArgs<T>
      layer;  // its grad_gates, [rows, gates * hidden], is that of the input part after its normalisation
  RnnOptions<T> options;
  const acc_t<T>* norms;
  // Working memory, [rows, gates * hidden]: the gradients of the hidden part after its normalisation (the same as
  // grad_gates but for GRU) and before it (the same as after it without one); [rows, hidden]: of the normalised cell.
  acc_t<T>*grad_hidden, *grad_product, *grad_normed_cell;
  T *grad_peephole, *grad_norm_ih, *grad_norm_hh, *grad_norm_c, *grad_norm_c_bias;  // null with grad_weight_ih
};

#define DLKERN_DECLARE_RNN_OPTIONS(T)                                        \
  DLKERN_DECLARE(void, rnn_options_forward, const RnnOptionsForwardArgs<T>&) \
  DLKERN_DECLARE(void, rnn_options_backward, const RnnOptionsBackwardArgs<T>&)
DLKERN_DECLARE_RNN_OPTIONS(float)
DLKERN_DECLARE_RNN_OPTIONS(double)
DLKERN_DECLARE_RNN_OPTIONS(bfloat16)
DLKERN_DECLARE_RNN_OPTIONS(float16)
#undef DLKERN_DECLARE_RNN_OPTIONS

}  // namespace dlkern::cpu
