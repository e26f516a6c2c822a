// Launchers of rnn.cu and rnn_backward.cu, in plain C++ for the op layer: one layer in one direction of RNN, LSTM or GRU,
// float32, bfloat16 or float16. Each throws std::runtime_error where its launch fails.
#pragma once
#include <cstdint>

#include "element.h"

#ifdef __CUDACC__
#define DLKERN_RNN_BOTH __host__ __device__
#else
#define DLKERN_RNN_BOTH
#endif

namespace dlkern::cuda {

enum RnnMode { kRnnTanh, kRnnRelu, kRnnLstm, kRnnGru };

// Sequences are numbered from the longest to the shortest; step t has those before sizes[t], and the row of (t, b) is
// offsets[t] + order[b]. The arrays are in the device's memory, or null: every step has `batch` sequences in their order.
struct RnnShape {
  Element element;
  int mode;
  bool reverse;
  int64_t inputs, hidden, batch, steps, rows;
  const int64_t *offsets, *sizes, *order;  // [steps], [steps], [batch]
  const int64_t* first_rows;  // [batch]: of each sequence, the row that the recurrence meets first

  DLKERN_RNN_BOTH int gates() const { return mode == kRnnLstm ? 4 : mode == kRnnGru ? 3 : 1; }
  // Blocks of `hidden` columns that a row of the saved gates has: GRU's also has what the recurrence adds to n.
  DLKERN_RNN_BOTH int slots() const { return mode == kRnnGru ? 4 : gates(); }
};

// How a layer is run: one launch that keeps the weights in shared memory, or one a step.
enum class RnnRoute {
  persistent,
  few_steps,  // a single one: nothing to keep weights for
  too_large,  // the weights of 16 units do not fit a block's shared memory
  not_resident  // the blocks do not all fit the device at once
};
RnnRoute rnn_forward_route(const RnnShape& shape);
RnnRoute rnn_backward_route(const RnnShape& shape);

// Counters that a persistent launch needs, as unsigned numbers.
int64_t rnn_counters(const RnnShape& shape);

// given[rows, gates * hidden] = input weight_ih^T, 16-bit operands, float results.
void rnn_input(Element element, const void* input, const void* weight_ih, float* given, int64_t rows, int64_t inputs,
               int64_t outputs, void* stream);

// All are dense; biases may be null; c0, c_n, cell (working memory, [batch, hidden]) and cells are LSTM's.
// gates [rows, slots * hidden] and cells [rows, hidden] are for the backward, or null: gates after their activations (of
// RNN, the activation's derivative; of GRU: the recurrent part of n, r, z, n).
struct RnnForward {
  const float* given;
  const void *weight_hh, *bias_ih, *bias_hh, *h0, *c0;
  void *output, *h_n, *c_n;
  float *cell, *gates, *cells;
  unsigned* counters;
};
void rnn_forward(const RnnShape& shape, RnnRoute route, const RnnForward& tensors, void* stream);

// grad_given and grad_recurrent [rows, gates * hidden]: the gradients of both products' results; one tensor but for GRU.
// previous [rows, hidden]: the states before each step, or null. carry: working memory, [batch, hidden].
struct RnnBackward {
  const void *grad_output, *grad_h_n, *grad_c_n, *weight_hh, *h0, *c0, *output;
  const float *gates, *cells;
  void *grad_given, *grad_recurrent, *previous, *grad_h0, *grad_c0;
  float* carry;
  unsigned* counters;
};
void rnn_backward(const RnnShape& shape, RnnRoute route, const RnnBackward& tensors, void* stream);

// Sets the rows of padding of [steps_in_all * batch, width] to zero.
void rnn_clear_padding(const RnnShape& shape, int64_t width, void* rows, void* stream);

}  // namespace dlkern::cuda
