// What the forwards of recurrent layers, with options and without, begin with: the product of all inputs with their
// weight, into the gates' memory.
#pragma once
#include "gemm.h"
#include "rnn_steps.h"

namespace dlkern::cpu::DLKERN_ISA {

constexpr int64_t kChunkRows = 576, kChunkValues = 262144;  // of gates that are not kept: rows at least, values about

// Calls visit(n0, n1, first row, rows, gates) for steps [n0, n1) at a time, all of them where gates are kept. `gates` has
// the input's part of those rows, and, where gates are not kept, room for `more` values a row after it.
template <class T, class Visit>
void in_chunks(const RnnForwardArgs<T>& args, const Layer<acc_t<T>>& layer, const acc_t<T>* bias, int64_t more,
               const Visit& visit) {
  using A = acc_t<T>;
  const RnnShape& s = args.shape;
  const int64_t width = s.gates() * s.hidden, row_size = s.slots() * s.hidden;
  const bool keep = args.gates;
  const int64_t most_rows = larger(kChunkRows, kChunkValues / row_size);
  A* gates = keep ? args.gates : scratch<A>(Slot::family_3, smaller(s.rows, most_rows + s.batch) * (row_size + more));
  for (int64_t n0 = 0, n1; n0 < s.steps; n0 = n1) {
    int64_t rows = 0;
    for (n1 = n0; n1 < s.steps && (keep || n1 == n0 || rows < most_rows); ++n1)
      rows += s.order ? s.batch : s.batch_sizes[layer.step(n1)];
    const int64_t first_row = s.offsets[smaller(layer.step(n0), layer.step(n1 - 1))];
    gemm(Gemm<T, A>{rows, width, s.inputs, args.input + first_row * s.inputs, s.inputs, 1, args.weight_ih, 1, s.inputs,
                    gates + row_size - width, row_size, false, bias});
    visit(n0, n1, first_row, rows, gates);
  }
}

}  // namespace dlkern::cpu::DLKERN_ISA
