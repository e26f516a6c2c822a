// What follows the loop over time in the backward of recurrent layers: one matrix product each for the gradients of the
// input and of the weights.
#pragma once
#include "gemm.h"
#include "rnn_product.h"

namespace dlkern::cpu::DLKERN_ISA {

// Calls use(grads) with `grads` [rows, row_size] as the products that follow read them: where bfloat16 goes by tiles, those
// take gradients as such, and nothing is widened.
template <class T, class Use>
void as_operands(bool tiled, const acc_t<T>* grads, int64_t rows, int64_t row_size, const Use& use) {
  if constexpr (kParts<T> == 1) {
    if (tiled) {
      T* rounded = scratch<T>(Slot::family_4, rows * row_size);
      parallel_for(rows, 1 + 16384 / row_size, [&](int64_t begin, int64_t end) {
        copy(grads + begin * row_size, rounded + begin * row_size, (end - begin) * row_size);
      });
      use(static_cast<const T*>(rounded));
      return;
    }
  }
  use(grads);
}

// The gradients of the input and of weight_ih from `grads`, the input part's, in rows of row_size; the products' operands
// are G: what sums are carried in, or T.
template <class T, class G>
void input_gradients(const RnnBackwardArgs<T>& args, const G* grads, int64_t row_size) {
  constexpr bool same = sizeof(T) == sizeof(G);
  const RnnShape& s = args.shape;
  const int64_t width = s.gates() * s.hidden;
  const auto copied = [](const T* from, int64_t count) {
    G* to = scratch<G>(Slot::family_3, count);
    copy(from, to, count);
    return to;
  };
  if (args.grad_input) {
    const G* weight;
    if constexpr (same)
      weight = args.weight_ih;
    else
      weight = copied(args.weight_ih, width * s.inputs);
    gemm(Gemm<G, T>{s.rows, s.inputs, width, grads, row_size, 1, weight, s.inputs, 1, args.grad_input, s.inputs});
  }
  if (!args.grad_weight_ih) return;
  // A copy of the input where it must be widened, or where its padding, which may be anything, must become zero.
  const G* input = nullptr;
  if constexpr (same) input = args.input;
  if (!same || s.order) {
    G* clean = copied(args.input, s.rows * s.inputs);
    clear_padding(s, clean, s.inputs);
    input = clean;
  }
  gemm(Gemm<G, T>{width, s.inputs, s.rows, grads, 1, row_size, input, s.inputs, 1, args.grad_weight_ih, s.inputs});
}

// to: the state that each row's recurrent product had; mask: its factors [batch, state], or null.
template <class T, class A, class G>
void gather_previous(const RnnBackwardArgs<T>& args, const Layer<A>& layer, const A* h0, const A* mask, G* to) {
  const RnnShape& s = args.shape;
  clear_padding(s, to, s.state);
  for (int64_t t = 0; t < s.steps; ++t)
    for (int64_t b = 0; b < s.batch_sizes[t]; ++b) {
      const int64_t before = layer.before(t, b);
      const auto put = [&](const auto* from) {
        G* row = to + s.row(t, b) * s.state;
        if (!mask) return copy(from, row, s.state);
        for (int64_t j = 0; j < s.state; j += kLanes<A>) {
          const int64_t count = smaller(kLanes<A>, s.state - j);
          store_some(row + j, load_some(from + j, count) * load_some(mask + s.place(b) * s.state + j, count), count);
        }
      };
      before < 0 ? put(h0 + s.place(b) * s.state) : put(args.output + before * s.state);
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
