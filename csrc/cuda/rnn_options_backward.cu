// RNN, LSTM and GRU with options or a projection, one layer in one direction, backward. A step: the product of the gates'
// gradients of the step after, with the state's gradient behind it; of projections the product by their weight; then the
// gates' gradients by rows. What the gradients of the options' weights are sums of is kept for all rows and added up
// afterwards, in a fixed order; those of the other weights are products over all steps (the op layer).
#include "rnn_options.h"
#include "rnn_rows.cuh"

namespace dlkern::cuda {
namespace {

using namespace rnn;

template <class T>
struct BackwardArgs {
  RnnShape shape;
  RnnOptions options;
  const T *grad_output, *grad_h_n, *grad_c_n, *weight_hh, *weight_hr, *h0, *c0, *output;
  const float *gates, *cells, *norms;
  T *grad_given, *grad_product, *previous, *grad_states, *projected, *grad_h0, *grad_c0;
  float *terms, *carry, *carry_cell, *grads, *units, *sums;
  bool aligned;
};

// The gradients of the n-th step's new states, a block a tile; step -1 is the initial state.
template <class T, bool WIDE>
__global__ void __launch_bounds__(kThreads, 2) rnn_state_backward_kernel(BackwardArgs<T> a, int64_t n) {
  using Tile = Product<T, kUnits, Stored::k_first, WIDE>;
  DLKERN_DYNAMIC_SHARED(shared);
  const RnnShape& s = a.shape;
  const RnnOptions& o = a.options;
  const int64_t state = o.state, width = s.gates() * s.hidden, b0 = static_cast<int64_t>(blockIdx.y) * Tile::kRows;
  const Step step = n < 0 ? Step{0, s.batch} : step_at(s, n), before = step_at(s, n - 1);
  const Step after = n < 0 ? Step{0, s.batch} : step_at(s, n + 1);
  if (b0 >= step.size) return;
  const Tile product(shared, a.weight_hh, width, state, a.aligned, false);
  product.run([&](int r) -> const T* {
    const int64_t b = b0 + r;
    if (b >= step.size || b >= after.size) return nullptr;
    if (n >= 0) return a.grad_product + (after.offset + place(s, b)) * width;
    const int64_t first = s.first_rows ? s.first_rows[b] : (s.reverse ? s.steps - 1 : 0) * s.batch + b;
    return a.grad_product + first * width;
  });
  const int64_t j = product.unit + Tile::unit_of();
#pragma unroll
  for (int i = 0; i < Tile::kElements; i++) {
    const int64_t b = b0 + Tile::row_of(i);
    if (b >= step.size || j >= state) continue;
    const int64_t at = place(s, b), here = at * state + j, out = (step.offset + at) * state + j;
    float dh = product.sum(Tile::row_of(i), Tile::unit_of());
    if (o.mask) dh *= o.mask[here];
    dh += b < after.size ? a.carry[here] : to_float(a.grad_h_n[here]);
    if (n < 0) {
      a.grad_h0[here] = from_float<T>(dh);
      continue;
    }
    dh += to_float(a.grad_output[out]);
    const float* chosen = o.fresh_h ? o.fresh_h + out : nullptr;
    a.carry[here] = zoned(0.0f, dh, chosen, o.zoneout_h);
    const float grad = zoned(dh, 0.0f, chosen, o.zoneout_h);
    if (a.weight_hr)
      a.grad_states[out] = from_float<T>(grad);
    else
      a.grads[here] = grad;
    if (a.previous) {
      const T h = b < before.size ? a.output[(before.offset + at) * state + j] : a.h0[here];
      a.previous[out] = o.mask ? from_float<T>(to_float(h) * o.mask[here]) : h;
    }
  }
}

// grads = grad_states of the n-th step times weight_hr, a block a tile.
template <class T, bool WIDE>
__global__ void __launch_bounds__(kThreads, 2) rnn_project_backward_kernel(BackwardArgs<T> a, int64_t n) {
  using Tile = Product<T, kUnits, Stored::k_first, WIDE>;
  DLKERN_DYNAMIC_SHARED(shared);
  const RnnShape& s = a.shape;
  const Step step = step_at(s, n);
  const int64_t b0 = static_cast<int64_t>(blockIdx.y) * Tile::kRows, state = a.options.state;
  if (b0 >= step.size) return;
  const Tile product(shared, a.weight_hr, state, s.hidden, a.aligned, false);
  product.run(
      [&](int r) { return b0 + r < step.size ? a.grad_states + (step.offset + place(s, b0 + r)) * state : nullptr; });
  const int64_t j = product.unit + Tile::unit_of();
#pragma unroll
  for (int i = 0; i < Tile::kElements; i++) {
    const int64_t b = b0 + Tile::row_of(i);
    if (b < step.size && j < s.hidden)
      a.grads[place(s, b) * s.hidden + j] = product.sum(Tile::row_of(i), Tile::unit_of());
  }
}

// A block takes the n-th step of a sequence: from grads to the gradients of both products' results.
template <class T, int GATES>
__global__ void __launch_bounds__(kThreads) rnn_options_backward_kernel(BackwardArgs<T> a, int64_t n) {
  DLKERN_SHARED(float, partial, [3][2][kPartials]);
  const RnnShape& s = a.shape;
  const RnnOptions& o = a.options;
  const Step step = step_at(s, n), before = step_at(s, n - 1);
  const int64_t b = blockIdx.x, hidden = s.hidden, width = GATES * hidden;
  if (b >= step.size) return;
  const bool goes_on = b < step_at(s, n + 1).size, begins = b >= before.size;
  const int64_t at = place(s, b), row = step.offset + at, row_before = before.offset + at;
  const T *norm_ih = static_cast<const T*>(o.norm_ih), *norm_hh = static_cast<const T*>(o.norm_hh),
          *norm_c = static_cast<const T*>(o.norm_c), *norm_c_bias = static_cast<const T*>(o.norm_c_bias),
          *peephole = static_cast<const T*>(o.peephole);
  const float* const norm = norm_ih ? a.norms + row * o.norm_size(s) : nullptr;
  const float* const scales = norm ? norm + o.norm_size(s) - 3 : nullptr;
  float *terms = a.terms ? a.terms + row * o.terms(s) : nullptr, *units = a.units + at * hidden;
  float* const sums = a.sums + at * width;  // gradients of the recurrent side after its normalisation
  const float* gate = a.gates + row * s.slots() * hidden;
  if constexpr (GATES == 4) {
    const auto cell_before = [&](int64_t j) {
      return begins ? to_float(a.c0[at * hidden + j]) : a.cells[row_before * hidden + j];
    };
    const auto cell_made = [&](int64_t j) {
      return gate[hidden + j] * cell_before(j) + gate[j] * gate[2 * hidden + j];
    };
    const float* const normed = norm ? norm + 2 * width : nullptr;
    each_unit(hidden, [&](int64_t j) {
      const float out = gate[3 * hidden + j], dh = a.grads[at * hidden + j];
      float c = norm ? normed[j] * to_float(norm_c[j]) : cell_made(j);
      if (norm_c_bias) c += to_float(norm_c_bias[j]);
      c = tanhf(c);
      sums[3 * hidden + j] = dh * c * out * (1.0f - out);
      units[j] = dh * out * (1.0f - c * c);
      if (a.projected) a.projected[row * hidden + j] = from_float<T>(out * c);
      if (norm && terms) {
        terms[4 * width + j] = units[j] * normed[j];
        terms[4 * width + hidden + j] = units[j];
      }
    });
    NormGradient of_cell{};
    if (norm)
      of_cell = norm_gradient(hidden, normed, partial[0], [&](int64_t j) { return units[j] * to_float(norm_c[j]); });
    each_unit(hidden, [&](int64_t j) {
      const float c_before = cell_before(j), *chosen = o.fresh_c ? o.fresh_c + row * hidden + j : nullptr;
      const float after = goes_on ? a.carry_cell[at * hidden + j] : to_float(a.grad_c_n[at * hidden + j]);
      float dc = norm ? of_cell(units[j] * to_float(norm_c[j]), normed[j], scales[2]) : units[j];
      dc += zoned(after, 0.0f, chosen, o.zoneout_c);
      float passed = zoned(0.0f, after, chosen, o.zoneout_c);
      if (peephole) dc += to_float(peephole[2 * hidden + j]) * sums[3 * hidden + j];
      const LstmGradients d = lstm_gradients(dc, gate[j], gate[hidden + j], gate[2 * hidden + j], c_before);
      passed += dc * gate[hidden + j];
      if (peephole) {
        passed += to_float(peephole[j]) * d.in + to_float(peephole[hidden + j]) * d.forget;
        if (terms) {
          float* const to = terms + o.terms(s) - 3 * hidden + j;
          to[0] = d.in * c_before, to[hidden] = d.forget * c_before;
          to[2 * hidden] = sums[3 * hidden + j] * cell_made(j);
        }
      }
      sums[j] = d.in, sums[hidden + j] = d.forget, sums[2 * hidden + j] = d.candidate;
      if (begins)
        a.grad_c0[at * hidden + j] = from_float<T>(passed);
      else
        a.carry_cell[at * hidden + j] = passed;
    });
  } else {
    each_unit(hidden, [&](int64_t j) {
      const float dh = a.grads[at * hidden + j];
      if constexpr (GATES == 3) {
        const float h = to_float(begins ? a.h0[at * hidden + j] : a.output[row_before * hidden + j]);
        const GruGradients d =
            gru_gradients(dh, gate[j], gate[hidden + j], gate[2 * hidden + j], gate[3 * hidden + j], h);
        sums[j] = d.r, sums[hidden + j] = d.z, sums[2 * hidden + j] = d.recurrent;
        units[j] = d.candidate;
        a.carry[at * hidden + j] += dh * gate[2 * hidden + j];
      } else {
        sums[j] = dh * gate[j];
      }
    });
  }
  // The input side has the same gradients, but for GRU's candidate.
  const auto of_input = [&](int64_t column) {
    return GATES == 3 && column >= 2 * hidden ? units[column - 2 * hidden] : sums[column];
  };
  T *const to_given = a.grad_given + row * width, *const to_product = a.grad_product + row * width;
  if (!norm) {
    each_unit(hidden, [&](int64_t j) {
#pragma unroll
      for (int g = 0; g < GATES; g++) {
        const int64_t column = g * hidden + j;
        to_product[column] = from_float<T>(sums[column]);
        if (GATES == 3) to_given[column] = from_float<T>(of_input(column));
      }
    });
    return;
  }
  __syncthreads();  // a thread's columns were several threads' units
  const auto weighted_given = [&](int64_t column) { return of_input(column) * to_float(norm_ih[column]); };
  const auto weighted_product = [&](int64_t column) { return sums[column] * to_float(norm_hh[column]); };
  const NormGradient of_given = norm_gradient(width, norm, partial[1], weighted_given);
  const NormGradient of_product = norm_gradient(width, norm + width, partial[2], weighted_product);
  for (int64_t column = threadIdx.x; column < width; column += kThreads) {
    const float normed_given = norm[column], normed_product = norm[width + column];
    to_given[column] = from_float<T>(of_given(weighted_given(column), normed_given, scales[0]));
    to_product[column] = from_float<T>(of_product(weighted_product(column), normed_product, scales[1]));
    if (!terms) continue;
    terms[column] = of_input(column);
    terms[width + column] = sums[column];
    terms[2 * width + column] = of_input(column) * normed_given;
    terms[3 * width + column] = sums[column] * normed_product;
  }
}

constexpr int kSumColumns = 32, kSumRows = kThreads / kSumColumns;

// A block adds up 32 columns, each by four threads, in double.
template <class T>
__global__ void __launch_bounds__(kThreads)
    rnn_terms_kernel(const float* terms, int64_t rows, int64_t columns, int64_t first, int64_t count, T* to) {
  const int lane = static_cast<int>(threadIdx.x) % kSumColumns, part = static_cast<int>(threadIdx.x) / kSumColumns;
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kSumColumns + lane;
  double total = 0.0;
  for (int64_t row = part; j < count && row < rows; row += kSumRows)
    total += static_cast<double>(terms[row * columns + first + j]);
  DLKERN_SHARED(double, totals, [kSumRows][kSumColumns]);
  totals[part][lane] = total;
  __syncthreads();
  if (part > 0 || j >= count) return;
#pragma unroll
  for (int other = 1; other < kSumRows; other++) total += totals[other][lane];
  to[j] = from_float<T>(static_cast<float>(total));
}

}  // namespace

void rnn_options_backward(const RnnShape& s, const RnnOptions& o, const RnnOptionsBackward& x, void* stream) {
  const int64_t width = s.gates() * s.hidden;
  const auto arguments = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int64_t kPiece = 16 / sizeof(T);
    return BackwardArgs<T>{s,
                           o,
                           static_cast<const T*>(x.grad_output),
                           static_cast<const T*>(x.grad_h_n),
                           static_cast<const T*>(x.grad_c_n),
                           static_cast<const T*>(x.weight_hh),
                           static_cast<const T*>(x.weight_hr),
                           static_cast<const T*>(x.h0),
                           static_cast<const T*>(x.c0),
                           static_cast<const T*>(x.output),
                           x.gates,
                           x.cells,
                           x.norms,
                           static_cast<T*>(x.grad_given),
                           static_cast<T*>(x.grad_product),
                           static_cast<T*>(x.previous),
                           static_cast<T*>(x.grad_states),
                           static_cast<T*>(x.projected),
                           static_cast<T*>(x.grad_h0),
                           static_cast<T*>(x.grad_c0),
                           x.terms,
                           x.carry,
                           x.carry_cell,
                           x.grads,
                           x.units,
                           x.sums,
                           o.state % kPiece == 0 && s.hidden % kPiece == 0 && aligned16(x.weight_hh) &&
                               aligned16(x.weight_hr) && aligned16(x.grad_product) && aligned16(x.grad_states)};
  };
  for (int64_t n = s.steps - 1; n >= -1; n--) {
    with_width(s, [&](auto* type, auto wide) {
      using T = std::remove_pointer_t<decltype(type)>;
      using Tile = Product<T, kUnits, Stored::k_first, wide.value>;
      DLKERN_LAUNCH((rnn_state_backward_kernel<T, wide.value>), tiles(s, o.state), dim3(kThreads),
                    static_cast<size_t>(Tile::shared_bytes(width, false)), stream, arguments(type), n);
      if (x.weight_hr && n >= 0)
        DLKERN_LAUNCH((rnn_project_backward_kernel<T, wide.value>), tiles(s, s.hidden), dim3(kThreads),
                      static_cast<size_t>(Tile::shared_bytes(o.state, false)), stream, arguments(type), n);
    });
    if (n < 0) return;
    with_gates(s, [&](auto* type, auto gates) {
      using T = std::remove_pointer_t<decltype(type)>;
      DLKERN_LAUNCH((rnn_options_backward_kernel<T, gates.value>), row_blocks(s, o.norm_hh != nullptr), dim3(kThreads),
                    0, stream, arguments(type), n);
    });
  }
}

void rnn_sum_terms(const RnnShape& s, const float* terms, int64_t columns, int64_t first, int64_t count, void* to,
                   void* stream) {
  with_gates(s, [&](auto* type, auto) {
    using T = std::remove_pointer_t<decltype(type)>;
    DLKERN_LAUNCH(rnn_terms_kernel<T>, grid_of(ceil_div(count, kSumColumns)), dim3(kThreads), 0, stream, terms, s.rows,
                  columns, first, count, static_cast<T*>(to));
  });
}

}  // namespace dlkern::cuda
