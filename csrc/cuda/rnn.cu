// RNN, LSTM and GRU, one layer in one direction, forward. The product of all inputs with their weight is made before
// (rnn_input_kernel, or conv.cu for float); the recurrence adds the product of the states, and applies the gates to the
// sums at once: one launch for all steps with the weights kept in shared memory, or where they do not fit one a step
// (rnn_steps.cuh). States go from step to step as the output rounds them; an LSTM's cells are floats.
// Floor: 2 rows gates hidden (inputs + hidden) operations, or a round through the second-level cache a step.
#include "rnn_gates.cuh"
#include "rnn_steps.cuh"

namespace dlkern::cuda {
namespace {

using namespace rnn;

using InputShape = MmaShape<64, 64, 2, 2, 4>;

// given = input weight^T, a block a tile.
template <class T, bool ALIGNED>
__global__ void __launch_bounds__(InputShape::kThreads, InputShape::kBlocks)
    rnn_input_kernel(const T* input, const T* weight, float* given, int64_t rows, int64_t inputs, int64_t outputs) {
  using A = Operand<T, InputShape::kBlockM, Stored::k_last, ALIGNED, InputShape::kThreads>;
  using B = Operand<T, InputShape::kBlockN, Stored::k_last, ALIGNED, InputShape::kThreads>;
  DLKERN_DYNAMIC_SHARED(shared);
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * InputShape::kBlockM,
                column0 = static_cast<int64_t>(blockIdx.y) * InputShape::kBlockN;
  Accumulator<InputShape> sum;
  mma_tile<InputShape>(sum, A{input, rows, inputs}, B{weight, outputs, inputs}, row0, column0,
                       reinterpret_cast<T*>(shared), [](const T*) {});
  sum.for_each_pair([&](int r, int c, float first, float second) {
    const int64_t row = row0 + r, column = column0 + c;
    if (row >= rows) return;
    if (column < outputs) given[row * outputs + column] = first;
    if (column + 1 < outputs) given[row * outputs + column + 1] = second;
  });
}

template <class T>
struct ForwardArgs {
  RnnShape shape;
  const float* given;
  const T *weight, *bias_ih, *bias_hh, *h0, *c0;
  T *output, *h_n, *c_n;
  float *cell, *gates, *cells;
  unsigned* counters;
  bool aligned, keep;
};

// Steps [n0, n1) of 16 units for the rows of blockIdx.y.
template <class T, int GATES, bool WIDE>
__global__ void __launch_bounds__(kThreads, 2) rnn_forward_kernel(ForwardArgs<T> a, int64_t n0, int64_t n1) {
  using Tile = Product<T, GATES * kUnits, Stored::k_last, WIDE>;
  DLKERN_DYNAMIC_SHARED(shared);
  const RnnShape& s = a.shape;
  const int64_t hidden = s.hidden, b0 = static_cast<int64_t>(blockIdx.y) * Tile::kRows;
  const Tile product(shared, a.weight, hidden, hidden, a.aligned, a.keep);
  const int64_t unit = product.unit + Tile::unit_of();
  const bool mine = unit < hidden;
  Meeting meeting{a.counters ? a.counters + blockIdx.y : nullptr};
  float of_input[GATES] = {}, of_hidden[GATES] = {};
  if (mine) {
#pragma unroll
    for (int g = 0; g < GATES; g++) {
      if (a.bias_ih) of_input[g] = to_float(a.bias_ih[g * hidden + unit]);
      if (a.bias_hh) of_hidden[g] = to_float(a.bias_hh[g * hidden + unit]);
    }
  }
  product.begin();
#pragma unroll 1
  for (int64_t n = n0; n < n1; n++) {
    const Step step = step_at(s, n), before = step_at(s, n - 1), after = step_at(s, n + 1);
    if (b0 >= step.size) continue;  // and so do all blocks of these rows
    const auto state_before = [&](int64_t b) {
      const int64_t at = place(s, b);
      return b < before.size ? a.output + (before.offset + at) * hidden : a.h0 + at * hidden;
    };
    // What the input gives, which needs no waiting for.
    float given[Tile::kElements][GATES];
#pragma unroll
    for (int i = 0; i < Tile::kElements; i++) {
      const int64_t b = b0 + Tile::row_of(i);
      if (!mine || b >= step.size) continue;
      const float* from = a.given + (step.offset + place(s, b)) * GATES * hidden + unit;
#pragma unroll
      for (int g = 0; g < GATES; g++) given[i][g] = from[g * hidden] + of_input[g];
    }
    meeting.wait();
    product.run([&](int r) { return b0 + r < step.size ? state_before(b0 + r) : nullptr; });
#pragma unroll
    for (int i = 0; i < Tile::kElements; i++) {
      const int64_t b = b0 + Tile::row_of(i);
      if (!mine || b >= step.size) continue;
      const int64_t at = place(s, b), row = step.offset + at;
      float recurrent[GATES], h;
#pragma unroll
      for (int g = 0; g < GATES; g++)
        recurrent[g] = product.sum(Tile::row_of(i), g * kUnits + Tile::unit_of()) + of_hidden[g];
      float* gates = a.gates ? a.gates + row * s.slots() * hidden + unit : nullptr;
      if constexpr (GATES == 4) {
        float* cell = a.cell + b * hidden + unit;
        const float c_before = b < before.size ? *cell : to_float(a.c0[at * hidden + unit]);
        const LstmCell x =
            lstm_cell(given[i][0] + recurrent[0], given[i][1] + recurrent[1], given[i][2] + recurrent[2], c_before);
        const float c = x.cell, out = sigmoid(given[i][3] + recurrent[3]);
        h = out * tanhf(c);
        *cell = c;
        if (b >= after.size) a.c_n[at * hidden + unit] = from_float<T>(c);
        if (gates) {
          gates[0] = x.in, gates[hidden] = x.forget, gates[2 * hidden] = x.candidate, gates[3 * hidden] = out;
          a.cells[row * hidden + unit] = c;
        }
      } else if constexpr (GATES == 3) {
        const GruCell x = gru_cell(given[i][0] + recurrent[0], given[i][1] + recurrent[1], given[i][2], recurrent[2],
                                   to_float(state_before(b)[unit]));
        h = x.state;
        if (gates)
          gates[0] = recurrent[2], gates[hidden] = x.r, gates[2 * hidden] = x.z, gates[3 * hidden] = x.candidate;
      } else {
        const PlainCell x = plain_cell(given[i][0] + recurrent[0], s.mode);
        h = x.state;
        if (gates) gates[0] = x.slope;
      }
      const T rounded = from_float<T>(h);
      a.output[row * hidden + unit] = rounded;
      if (b >= after.size) a.h_n[at * hidden + unit] = rounded;
    }
    meeting.arrive();
  }
}

// A block takes a row; the row of padding becomes zero.
template <class T>
__global__ void __launch_bounds__(kThreads) rnn_padding_kernel(RnnShape s, int64_t width, T* rows) {
  const int64_t t = blockIdx.x / s.batch, b = blockIdx.x % s.batch;
  if (t < s.steps && b < s.sizes[t]) return;
  T* const row = rows + (t * s.batch + place(s, b)) * width;
  for (int64_t j = threadIdx.x; j < width; j += kThreads) row[j] = from_float<T>(0.0f);
}

}  // namespace

void rnn_input(Element element, const void* input, const void* weight_ih, float* given, int64_t rows, int64_t inputs,
               int64_t outputs, void* stream) {
  const dim3 blocks = grid_of(ceil_div(rows, InputShape::kBlockM), ceil_div(outputs, InputShape::kBlockN));
  const auto run = [&](auto* type, auto aligned) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Side = Operand<T, InputShape::kBlockM, Stored::k_last, aligned.value, InputShape::kThreads>;
    DLKERN_LAUNCH((rnn_input_kernel<T, aligned.value>), blocks, dim3(InputShape::kThreads),
                  (mma_shared_bytes<InputShape, Side, Side>()), stream, static_cast<const T*>(input),
                  static_cast<const T*>(weight_ih), given, rows, inputs, outputs);
  };
  with_16_bit_type(element, [&](auto* type) {
    if (aligned16(input) && aligned16(weight_ih) && inputs % 8 == 0)
      run(type, std::true_type{});
    else
      run(type, std::false_type{});
  });
}

RnnRoute rnn_forward_route(const RnnShape& s) {
  RnnRoute route{};
  dispatch(s, [&](auto* type, auto gates, auto wide) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Tile = Product<T, gates.value * kUnits, Stored::k_last, wide.value>;
    route = route_of(s, rnn_forward_kernel<T, gates.value, wide.value>, Tile::shared_bytes(s.hidden, true));
  });
  return route;
}

int64_t rnn_counters(const RnnShape& s) { return grid(s).y; }

void rnn_forward(const RnnShape& s, RnnRoute route, const RnnForward& x, void* stream) {
  const std::lock_guard<std::mutex> lock(launching());
  dispatch(s, [&](auto* type, auto gates, auto wide) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Tile = Product<T, gates.value * kUnits, Stored::k_last, wide.value>;
    const bool all = route == RnnRoute::persistent;
    const bool aligned =
        s.hidden % Tile::kPiece == 0 && aligned16(x.weight_hh) && aligned16(x.h0) && aligned16(x.output);
    const ForwardArgs<T> args{s,
                              x.given,
                              static_cast<const T*>(x.weight_hh),
                              static_cast<const T*>(x.bias_ih),
                              static_cast<const T*>(x.bias_hh),
                              static_cast<const T*>(x.h0),
                              static_cast<const T*>(x.c0),
                              static_cast<T*>(x.output),
                              static_cast<T*>(x.h_n),
                              static_cast<T*>(x.c_n),
                              x.cell,
                              x.gates,
                              x.cells,
                              all ? x.counters : nullptr,
                              aligned,
                              all};
    const auto shared = static_cast<size_t>(Tile::shared_bytes(s.hidden, all));
    if (all) {
      DLKERN_LAUNCH(rnn_counters_kernel<kThreads>, dim3(1), dim3(kThreads), 0, stream, x.counters, rnn_counters(s));
      DLKERN_LAUNCH_COOPERATIVE((rnn_forward_kernel<T, gates.value, wide.value>), grid(s), dim3(kThreads), shared,
                                stream, args, int64_t{0}, s.steps);
      return;
    }
    for (int64_t n = 0; n < s.steps; n++)
      DLKERN_LAUNCH((rnn_forward_kernel<T, gates.value, wide.value>), grid(s), dim3(kThreads), shared, stream, args, n,
                    n + 1);
  });
}

void rnn_clear_padding(const RnnShape& s, int64_t width, void* rows, void* stream) {
  with_type(s.element, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    DLKERN_LAUNCH(rnn_padding_kernel<T>, grid_of(s.rows), dim3(kThreads), 0, stream, s, width, static_cast<T*>(rows));
  });
}

}  // namespace dlkern::cuda
