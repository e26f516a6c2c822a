// What follows the loop over time in the backward of recurrent layers: one matrix product each for the gradients of the
// input and of the weights.
#pragma once
#include "gemm.h"
#include "rnn_product.h"

namespace dlkern::cpu::DLKERN_ISA {

// The gradients of the input and of weight_ih from `grads`, the input part's, in rows of row_size.
template <class T>
void input_gradients(const RnnBackwardArgs<T>& args, const acc_t<T>* grads, int64_t row_size) {
  using A = acc_t<T>;
  const RnnShape& s = args.shape;
  const int64_t width = s.gates() * s.hidden;
  if (args.grad_input) {
    const A* weight = args.weight_ih
                          ? widened(args.weight_ih, width * s.inputs,
                                    sizeof(T) == sizeof(A) ? nullptr : scratch<A>(Slot::family_3, width * s.inputs))
                          : nullptr;
    gemm(Gemm<A, T>{s.rows, s.inputs, width, grads, row_size, 1, weight, s.inputs, 1, args.grad_input, s.inputs});
  }
  if (!args.grad_weight_ih) return;
  // A copy of the input where it must be widened, or where its padding, which may be anything, must become zero.
  const A* input;
  if (sizeof(T) != sizeof(A) || s.order) {
    A* clean = scratch<A>(Slot::family_3, s.rows * s.inputs);
    copy(args.input, clean, s.rows * s.inputs);
    clear_padding(s, clean, s.inputs);
    input = clean;
  } else {
    input = widened(args.input, 0, nullptr);
  }
  gemm(Gemm<A, T>{width, s.inputs, s.rows, grads, 1, row_size, input, s.inputs, 1, args.grad_weight_ih, s.inputs});
}

// previous: the state that each row's recurrent product had.
template <class T, class A> void gather_previous(const RnnBackwardArgs<T>& args, const Layer<A>& layer, const A* h0) {
  const RnnShape& s = args.shape;
  clear_padding(s, args.previous, s.state);
  for (int64_t t = 0; t < s.steps; ++t)
    for (int64_t b = 0; b < s.batch_sizes[t]; ++b) {
      const int64_t before = layer.before(t, b);
      A* to = args.previous + s.row(t, b) * s.state;
      if (before < 0)
        copy(h0 + s.place(b) * s.state, to, s.state);
      else
        copy(args.output + before * s.state, to, s.state);
    }
}

// The gradient of weight_hr from those of the states and what was projected.
template <class T> void projection_gradient(const RnnBackwardArgs<T>& args) {
  using A = acc_t<T>;
  const RnnShape& s = args.shape;
  clear_padding(s, args.grad_states, s.state);
  clear_padding(s, args.unprojected, s.hidden);
  gemm(Gemm<A, T>{s.state, s.hidden, s.rows, args.grad_states, 1, s.state, args.unprojected, s.hidden, 1,
                  args.grad_weight_hr, s.hidden});
}

}  // namespace dlkern::cpu::DLKERN_ISA
