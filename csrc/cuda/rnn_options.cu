// RNN, LSTM and GRU with options (layer normalisation, a mask on the recurrent product, zoneout, peepholes) or an LSTM's
// projection, one layer in one direction, forward. A step is two launches, since normalisation needs all units of a row:
// the recurrent product by tiles, then gates, cell and state by rows; a projection is a third, a product with the state
// behind it. States are floats from step to step; products take them as the output rounds them.
// Floor: 2 rows gates hidden (inputs + state) operations, or the latency of a step's launches.
#include "rnn_options.h"

#include "rnn_rows.cuh"

namespace dlkern::cuda {
namespace {

using namespace rnn;

template <class T>
struct ForwardArgs {
  RnnShape shape;
  RnnOptions options;
  const T *weight_hh, *weight_hr, *bias_ih, *bias_hh, *h0, *c0;
  const float* given;
  T *output, *h_n, *c_n;
  float *gates, *cells, *norms, *state, *cell, *sums, *units;
  T *operand, *made;
  bool aligned;

  // The state of unit j, from the new one.
  DLKERN_DEVICE void finish(int64_t row, int64_t at, int64_t j, float h, bool last) const {
    const int64_t here = at * options.state + j, out = row * options.state + j;
    h = zoned(h, state[here], options.fresh_h ? options.fresh_h + out : nullptr, options.zoneout_h);
    state[here] = h;
    operand[here] = from_float<T>(options.mask ? h * options.mask[here] : h);
    output[out] = from_float<T>(h);
    if (last) h_n[here] = from_float<T>(h);
  }
};

// Initial states and cells.
template <class T>
__global__ void __launch_bounds__(kThreads) rnn_start_kernel(ForwardArgs<T> a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < a.shape.batch * a.options.state) {
    const float h = to_float(a.h0[i]);
    a.state[i] = h;
    a.operand[i] = from_float<T>(a.options.mask ? h * a.options.mask[i] : h);
  }
  if (a.c0 && i < a.shape.batch * a.shape.hidden) a.cell[i] = to_float(a.c0[i]);
}

// A block normalises a row of what the input gives; norms, where not null, gets it too.
__global__ void __launch_bounds__(kThreads)
    rnn_norm_kernel(const float* given, float* normed, float* norms, int64_t count, int64_t norm_size) {
  DLKERN_SHARED(float, partial, [3][kPartials]);
  const float* const x = given + blockIdx.x * count;
  float* const to = normed + blockIdx.x * count;
  float* const norm = norms ? norms + blockIdx.x * norm_size : nullptr;
  const Statistics found = statistics(count, partial, [x](int64_t j) { return x[j]; });
  for (int64_t j = threadIdx.x; j < count; j += kThreads) {
    to[j] = (x[j] - found.mean) * found.scale;
    if (norm) norm[j] = to[j];
  }
  if (norm && threadIdx.x == 0) norm[norm_size - 3] = found.scale;
}

// sums = operand weight_hh^T, a block a tile.
template <class T, bool WIDE>
__global__ void __launch_bounds__(kThreads, 2) rnn_product_kernel(ForwardArgs<T> a) {
  using Tile = Product<T, kUnits, Stored::k_last, WIDE>;
  DLKERN_DYNAMIC_SHARED(shared);
  const int64_t batch = a.shape.batch, state = a.options.state, width = a.shape.gates() * a.shape.hidden,
                b0 = static_cast<int64_t>(blockIdx.y) * Tile::kRows;
  const Tile product(shared, a.weight_hh, state, width, a.aligned, false);
  product.run([&](int r) { return b0 + r < batch ? a.operand + (b0 + r) * state : nullptr; });
  const int64_t column = product.unit + Tile::unit_of();
#pragma unroll
  for (int i = 0; i < Tile::kElements; i++) {
    const int64_t b = b0 + Tile::row_of(i);
    if (b < batch && column < width) a.sums[b * width + column] = product.sum(Tile::row_of(i), Tile::unit_of());
  }
}

// A block takes the n-th step of a sequence, all of its units where they are normalised.
template <class T, int GATES>
__global__ void __launch_bounds__(kThreads) rnn_options_forward_kernel(ForwardArgs<T> a, int64_t n) {
  DLKERN_SHARED(float, partial, [2][3][kPartials]);
  const RnnShape& s = a.shape;
  const RnnOptions& o = a.options;
  const Step step = step_at(s, n);
  const int64_t b = blockIdx.x, hidden = s.hidden, width = GATES * hidden;
  if (b >= step.size) return;
  const bool last = b >= step_at(s, n + 1).size;
  const int64_t at = place(s, b), row = step.offset + at;
  const float *given = a.given + row * width, *sums = a.sums + at * width;
  const T *norm_ih = static_cast<const T*>(o.norm_ih), *norm_hh = static_cast<const T*>(o.norm_hh),
          *norm_c = static_cast<const T*>(o.norm_c), *norm_c_bias = static_cast<const T*>(o.norm_c_bias),
          *peephole = static_cast<const T*>(o.peephole);
  float* const norm = a.norms ? a.norms + row * o.norm_size(s) : nullptr;
  float* const scales = norm ? norm + o.norm_size(s) - 3 : nullptr;
  Statistics of_sums;
  if (norm_hh) of_sums = statistics(width, partial[0], [sums](int64_t j) { return sums[j]; });
  if (scales && threadIdx.x == 0) scales[1] = of_sums.scale;
  // What the products give to gate g of unit j.
  const auto of_input = [&](int g, int64_t j) {
    const int64_t column = g * hidden + j;
    const float x = norm_ih ? given[column] * to_float(norm_ih[column]) : given[column];
    return a.bias_ih ? x + to_float(a.bias_ih[column]) : x;
  };
  const auto of_state = [&](int g, int64_t j) {
    const int64_t column = g * hidden + j;
    float x = sums[column];
    if (norm_hh) {
      x = (x - of_sums.mean) * of_sums.scale;
      if (norm) norm[width + column] = x;
      x *= to_float(norm_hh[column]);
    }
    return a.bias_hh ? x + to_float(a.bias_hh[column]) : x;
  };
  const auto keep = [&](int slot, int64_t j, float value) {
    if (a.gates) a.gates[(row * s.slots() + slot) * hidden + j] = value;
  };
  if constexpr (GATES == 4) {
    float *made = a.units + at * 2 * hidden, *out = made + hidden, *cell = a.cell + at * hidden;
    each_unit(hidden, [&](int64_t j) {
      const float before = cell[j];
      float in = of_input(0, j) + of_state(0, j), forget = of_input(1, j) + of_state(1, j),
            last_sum = of_input(3, j) + of_state(3, j);
      if (peephole) in += to_float(peephole[j]) * before, forget += to_float(peephole[hidden + j]) * before;
      const LstmCell x = lstm_cell(in, forget, of_input(2, j) + of_state(2, j), before);
      if (peephole) last_sum += to_float(peephole[2 * hidden + j]) * x.cell;
      made[j] = x.cell;
      out[j] = sigmoid(last_sum);
      keep(0, j, x.in), keep(1, j, x.forget), keep(2, j, x.candidate), keep(3, j, out[j]);
      const float kept = zoned(x.cell, before, o.fresh_c ? o.fresh_c + row * hidden + j : nullptr, o.zoneout_c);
      cell[j] = kept;
      if (a.cells) a.cells[row * hidden + j] = kept;
      if (last) a.c_n[at * hidden + j] = from_float<T>(kept);
    });
    Statistics of_cell;
    if (norm_c) of_cell = statistics(hidden, partial[1], [made](int64_t j) { return made[j]; });
    if (scales && threadIdx.x == 0) scales[2] = of_cell.scale;
    each_unit(hidden, [&](int64_t j) {
      float c = made[j];
      if (norm_c) {
        c = (c - of_cell.mean) * of_cell.scale;
        if (norm) norm[2 * width + j] = c;
        c *= to_float(norm_c[j]);
        if (norm_c_bias) c += to_float(norm_c_bias[j]);
      }
      const float h = out[j] * tanhf(c);
      if (a.weight_hr)
        a.made[at * hidden + j] = from_float<T>(h);
      else
        a.finish(row, at, j, h, last);
    });
  } else {
    each_unit(hidden, [&](int64_t j) {
      if constexpr (GATES == 3) {
        const float recurrent = of_state(2, j);
        const GruCell x = gru_cell(of_input(0, j) + of_state(0, j), of_input(1, j) + of_state(1, j), of_input(2, j),
                                   recurrent, a.state[at * hidden + j]);
        keep(0, j, recurrent), keep(1, j, x.r), keep(2, j, x.z), keep(3, j, x.candidate);
        a.finish(row, at, j, x.state, last);
      } else {
        const PlainCell x = plain_cell(of_input(0, j) + of_state(0, j), s.mode);
        keep(0, j, x.slope);
        a.finish(row, at, j, x.state, last);
      }
    });
  }
}

// The n-th step's states from what is projected, a block a tile.
template <class T, bool WIDE>
__global__ void __launch_bounds__(kThreads, 2) rnn_project_kernel(ForwardArgs<T> a, int64_t n) {
  using Tile = Product<T, kUnits, Stored::k_last, WIDE>;
  DLKERN_DYNAMIC_SHARED(shared);
  const RnnShape& s = a.shape;
  const Step step = step_at(s, n), after = step_at(s, n + 1);
  const int64_t b0 = static_cast<int64_t>(blockIdx.y) * Tile::kRows;
  if (b0 >= step.size) return;
  const Tile product(shared, a.weight_hr, s.hidden, a.options.state, a.aligned, false);
  product.run([&](int r) { return b0 + r < step.size ? a.made + place(s, b0 + r) * s.hidden : nullptr; });
  const int64_t j = product.unit + Tile::unit_of();
#pragma unroll
  for (int i = 0; i < Tile::kElements; i++) {
    const int64_t b = b0 + Tile::row_of(i);
    if (b >= step.size || j >= a.options.state) continue;
    const int64_t at = place(s, b);
    a.finish(step.offset + at, at, j, product.sum(Tile::row_of(i), Tile::unit_of()), b >= after.size);
  }
}

}  // namespace

void rnn_options_forward(const RnnShape& s, const RnnOptions& o, const RnnOptionsForward& x, void* stream) {
  const int64_t width = s.gates() * s.hidden, units = s.hidden > o.state ? s.hidden : o.state;
  if (o.norm_ih)
    DLKERN_LAUNCH(rnn_norm_kernel, grid_of(s.rows), dim3(kThreads), 0, stream, x.given, x.normed, x.norms, width,
                  o.norm_size(s));
  const auto arguments = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int64_t kPiece = 16 / sizeof(T);
    return ForwardArgs<T>{s,
                          o,
                          static_cast<const T*>(x.weight_hh),
                          static_cast<const T*>(x.weight_hr),
                          static_cast<const T*>(x.bias_ih),
                          static_cast<const T*>(x.bias_hh),
                          static_cast<const T*>(x.h0),
                          static_cast<const T*>(x.c0),
                          o.norm_ih ? x.normed : x.given,
                          static_cast<T*>(x.output),
                          static_cast<T*>(x.h_n),
                          static_cast<T*>(x.c_n),
                          x.gates,
                          x.cells,
                          x.norms,
                          x.state,
                          x.cell,
                          x.sums,
                          x.units,
                          static_cast<T*>(x.operand),
                          static_cast<T*>(x.made),
                          o.state % kPiece == 0 && s.hidden % kPiece == 0 && aligned16(x.weight_hh) &&
                              aligned16(x.weight_hr) && aligned16(x.operand) && aligned16(x.made)};
  };
  with_gates(s, [&](auto* type, auto) {
    using T = std::remove_pointer_t<decltype(type)>;
    DLKERN_LAUNCH(rnn_start_kernel<T>, grid_of(ceil_div(s.batch * units, kThreads)), dim3(kThreads), 0, stream,
                  arguments(type));
  });
  for (int64_t n = 0; n < s.steps; n++) {
    with_width(s, [&](auto* type, auto wide) {
      using T = std::remove_pointer_t<decltype(type)>;
      using Tile = Product<T, kUnits, Stored::k_last, wide.value>;
      DLKERN_LAUNCH((rnn_product_kernel<T, wide.value>), tiles(s, width), dim3(kThreads),
                    static_cast<size_t>(Tile::shared_bytes(o.state, false)), stream, arguments(type));
    });
    with_gates(s, [&](auto* type, auto gates) {
      using T = std::remove_pointer_t<decltype(type)>;
      DLKERN_LAUNCH((rnn_options_forward_kernel<T, gates.value>), row_blocks(s, o.norm_hh != nullptr), dim3(kThreads),
                    0, stream, arguments(type), n);
    });
    if (!x.weight_hr) continue;
    with_width(s, [&](auto* type, auto wide) {
      using T = std::remove_pointer_t<decltype(type)>;
      using Tile = Product<T, kUnits, Stored::k_last, wide.value>;
      DLKERN_LAUNCH((rnn_project_kernel<T, wide.value>), tiles(s, o.state), dim3(kThreads),
                    static_cast<size_t>(Tile::shared_bytes(s.hidden, false)), stream, arguments(type), n);
    });
  }
}

}  // namespace dlkern::cuda
