// Launchers of rnn_options.cu and rnn_options_backward.cu: recurrent layers with options, or with an LSTM's projection.
// As rnn.h.
#pragma once
#include "rnn.h"

namespace dlkern::cuda {

// What the options add to a layer; null and 0 where they are off (cpu/rnn_options.h).
struct RnnOptions {
  int64_t state;  // hidden, or the size that a projection has
  const void *peephole, *norm_ih, *norm_hh, *norm_c, *norm_c_bias;
  const float *mask, *fresh_h, *fresh_c;
  float zoneout_h, zoneout_c;

  // A row of what the normalisations leave: input part, hidden part, LSTM's cell, and three reciprocal deviations.
  DLKERN_RNN_BOTH int64_t norm_size(const RnnShape& s) const {
    return 2 * s.gates() * s.hidden + (s.mode == kRnnLstm ? s.hidden : 0) + 3;
  }
  // Columns of the terms that gradients of weights are sums of: with normalisation of both biases and both norms,
  // and of LSTM's cell and its bias; of peepholes.
  DLKERN_RNN_BOTH int64_t terms(const RnnShape& s) const {
    const int64_t of_norms = 4 * s.gates() * s.hidden + (s.mode == kRnnLstm ? 2 * s.hidden : 0);
    return (norm_ih ? of_norms : 0) + (peephole ? 3 * s.hidden : 0);
  }
};

// given = input weight_ih^T [rows, gates * hidden]; where there is a norm, normed is room for it normalised. gates, cells, norms: for
// the backward, or null. Working memory: floats state [batch, state], cell [batch, hidden], sums [batch, gates * hidden],
// units [batch, 2, hidden]; of the tensors' type operand [batch, state], and of projections made [batch, hidden].
struct RnnOptionsForward {
  const float* given;
  float* normed;
  const void *weight_hh, *weight_hr, *bias_ih, *bias_hh, *h0, *c0;
  void *output, *h_n, *c_n;
  float *gates, *cells, *norms;
  float *state, *cell, *sums, *units;
  void *operand, *made;
};
void rnn_options_forward(const RnnShape& shape, const RnnOptions& options, const RnnOptionsForward& tensors,
                         void* stream);

// grad_given and grad_product [rows, gates * hidden]: the gradients of both products' results, one tensor but for GRU and
// with normalisation. For the weights' gradients, or null: terms [rows, options.terms()], previous [rows, state] (the
// states that were multiplied), and of projections grad_states [rows, state] (never null) and projected [rows, hidden].
// Working memory, floats: carry [batch, state], and [batch, hidden]: carry_cell, grads, units; sums [batch, gates * hidden].
struct RnnOptionsBackward {
  const void *grad_output, *grad_h_n, *grad_c_n, *weight_hh, *weight_hr, *h0, *c0, *output;
  const float *gates, *cells, *norms;
  void *grad_given, *grad_product, *previous, *grad_states, *projected, *grad_h0, *grad_c0;
  float* terms;
  float *carry, *carry_cell, *grads, *units, *sums;
};
void rnn_options_backward(const RnnShape& shape, const RnnOptions& options, const RnnOptionsBackward& tensors,
                          void* stream);

// to[j] = the sum of column first + j of terms [rows, columns], in the tensors' type.
void rnn_sum_terms(const RnnShape& shape, const float* terms, int64_t columns, int64_t first, int64_t count, void* to,
                   void* stream);

}  // namespace dlkern::cuda
