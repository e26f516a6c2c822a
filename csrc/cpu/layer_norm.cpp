// layer_norm: (x - mean) * rstd * weight + bias over the last dimensions (Ba et al. 2016), rows of numbers side by side.
//
// A row stays in the first-level cache while it is summed, its deviations squared and summed, and written: one read and
// one write of memory. Backward reads each row once: g w and g w xhat are summed, the gradient of the input is written,
// and the row is added to the sums of its chunk for weight and bias. Chunks come from the shape alone and are added in
// order: the same bits for any number of threads. 16-bit types become floats once, not in every pass over a row. Floor: one
// read and one write; backward two reads and one write.
#include "layer_norm.h"

#include "parallel.h"
#include "scratch.h"
#include "simd.h"
#include "transpose.h"

namespace dlkern::cpu::DLKERN_ISA {
namespace {

constexpr int64_t kMostChunks = 64;  // of rows, for the sums down columns
constexpr int kSums = 4;  // at a time, because each addition waits for the one before

constexpr int64_t kMostRows = 8;
constexpr int64_t kShortRow = 1024;  // up to which the memory of its results is fetched while a row is summed

// How many rows take each pass together: a row's next pass waits for its sum, other rows' sums don't. They stay in the
// first-level cache; in the backward, where sums down columns are loaded once for all of them, in the second.
constexpr int64_t kForwardBytes = 12288, kBackwardBytes = 98304;
template <class A> int64_t rows_together(int64_t columns, int64_t bytes) {
  return larger(1, smaller(kMostRows, bytes / (columns * static_cast<int64_t>(sizeof(A)))));
}

// Where so many rows are widened.
template <class T> acc_t<T>* row_memory(int64_t rows, int64_t columns) {
  return sizeof(T) == sizeof(acc_t<T>) ? nullptr : scratch<acc_t<T>>(Slot::family_1, rows * columns);
}

// f(j, count) over the vectors of a row; a whole vector's count is known to the compiler.
template <int64_t lanes, class F> [[gnu::always_inline]] inline void each_vector(int64_t columns, const F& f) {
  int64_t j = 0;
  for (; j + lanes <= columns; j += lanes) f(j, lanes);
  if (j < columns) f(j, columns - j);
}

// Sums of f(j, count, add) over the vectors of a row, in a fixed order: f calls add(which, values), and gives zeros beyond
// `count`.
template <int sums, class A, class F>
[[gnu::always_inline]] inline void sum_row(int64_t columns, A (&total)[sums], const F& f) {
  constexpr int64_t lanes = kLanes<A>;
  Vec<A> sum[sums][kSums] = {};
  int64_t j = 0;
  for (; j + kSums * lanes <= columns; j += kSums * lanes)
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i)
      f(j + i * lanes, lanes, [&](int s, Vec<A> v) __attribute__((always_inline)) { sum[s][i] += v; });
#pragma GCC unroll 4
  for (int i = 0; i < kSums; ++i, j += lanes)  // unrolled, or the sums would lie in memory
    if (j < columns)
      f(j, smaller(lanes, columns - j), [&](int s, Vec<A> v) __attribute__((always_inline)) { sum[s][i] += v; });
  for (int s = 0; s < sums; ++s) total[s] = reduce_add((sum[s][0] + sum[s][1]) + (sum[s][2] + sum[s][3]));
}

template <class T> void forward(const LayerNormArgs<T>& args) {
  using A = acc_t<T>;
  constexpr int64_t lanes = kLanes<T>;
  const int64_t columns = args.columns;
  const A count_of_row = static_cast<A>(columns);  // divided by: a rounded reciprocal would show in rows of few numbers
  const A *weight = args.weight, *bias = args.bias;
  const bool short_rows = columns <= kShortRow;
  parallel_for(args.rows, 1 + 16384 / columns, [=, &args](int64_t begin, int64_t end) {
    const int64_t most = rows_together<A>(columns, kForwardBytes);
    A* values = row_memory<T>(most, columns);
    for (int64_t row = begin; row < end; row += most) {
      const int64_t rows = smaller(most, end - row);
      const A* x[kMostRows];
      A *mean = args.mean + row, *rstd = args.rstd + row;
      for (int64_t r = 0; r < rows; ++r) {
        x[r] = widened(args.input + (row + r) * columns, columns, values + r * columns);
        // About the first number: a row of equal numbers has exactly that mean, and deviations of exactly 0.
        const A first = x[r][0];
        A sum[1];
        const T* input = args.input + (row + r) * columns;
        sum_row(columns, sum, [=, x = x[r]](int64_t j, int64_t count, auto&& add) __attribute__((always_inline)) {
          prefetch_ahead(input + j);
          const Vec<A> d = load_some(x + j, count) - first;
          add(0, count == lanes ? d : first_lanes<A>(d, count));
        });
        mean[r] = first + sum[0] / count_of_row;
      }
      for (int64_t r = 0; r < rows; ++r) {
        const A mean_of_row = mean[r];
        const T* y = args.output + (row + r) * columns;
        A square[1];
        sum_row(columns, square, [=, x = x[r]](int64_t j, int64_t count, auto&& add) __attribute__((always_inline)) {
          if (short_rows) __builtin_prefetch(y + j, 1);
          const Vec<A> d = load_some(x + j, count) - mean_of_row;
          add(0, count == lanes ? d * d : first_lanes<A>(d * d, count));
        });
        rstd[r] = static_cast<A>(1 / std::sqrt(static_cast<double>(square[0] / count_of_row) + args.eps));
      }
      for (int64_t r = 0; r < rows; ++r) {
        T* y = args.output + (row + r) * columns;
        const A mean_of_row = mean[r], rstd_of_row = rstd[r];
        each_vector<lanes>(columns, [=, x = x[r]](int64_t j, int64_t count) __attribute__((always_inline)) {
          Vec<A> value = (load_some(x + j, count) - mean_of_row) * rstd_of_row;
          if (weight) value *= load_some(weight + j, count);
          if (bias) value += load_some(bias + j, count);
          store_some(y + j, value, count);
        });
      }
    }
  });
}

// What some rows that take each pass of the backward together are: operands, statistics, means of g w and of g w xhat.
template <class T> struct RowsBackward {
  using A = acc_t<T>;
  int64_t rows, columns;
  const A *weight, *mean, *rstd;
  T* grad_input;  // of the first row, or null
  A *of_weight, *of_bias;  // sums down columns, added to, or null
  const A *x[kMostRows], *g[kMostRows];
  A means[kMostRows][2];

  // The means of row r, whose operands in memory are `input` and `gradient`.
  void sum(int64_t r, const T* input, const T* gradient) {
    sum_row(columns, means[r],
            [=, short_rows = columns <= kShortRow, weight = weight, mean = mean[r], rstd = rstd[r], x = x[r], g = g[r],
             to = grad_input + r * columns](int64_t j, int64_t count, auto&& add) __attribute__((always_inline)) {
              prefetch_ahead(input + j);
              prefetch_ahead(gradient + j);
              if (short_rows) __builtin_prefetch(to + j, 1);
              Vec<A> value = load_some(g + j, count);
              if (weight) value *= load_some(weight + j, count);
              add(0, value);
              add(1, value * ((load_some(x + j, count) - mean) * rstd));
            });
    for (A& m : means[r]) m /= static_cast<A>(columns);
  }
  // Gradient of the input, and sums, of some vectors of all rows: what vectors share is loaded once, and the sums stay in
  // registers.
  template <int vectors, bool input, bool sums> [[gnu::always_inline]] void finish(int64_t j, int64_t count) const {
    constexpr int64_t lanes = kLanes<T>;
    Vec<A> w[vectors], for_weight[vectors], for_bias[vectors];
    for (int v = 0; v < vectors; ++v) {
      w[v] = weight ? load_some(weight + j + v * lanes, count) : broadcast<A>(1);
      if (sums) for_weight[v] = load(of_weight + j + v * lanes), for_bias[v] = load(of_bias + j + v * lanes);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const A mean_of_row = mean[r], rstd_of_row = rstd[r], first = means[r][0], second = means[r][1];
      for (int v = 0; v < vectors; ++v) {
        const int64_t at = j + v * lanes;
        const Vec<A> gradient = load_some(g[r] + at, count),
                     normal = (load_some(x[r] + at, count) - mean_of_row) * rstd_of_row;
        if (input)
          store_some(grad_input + r * columns + at, ((gradient * w[v] - first) - normal * second) * rstd_of_row, count);
        if (sums) for_weight[v] += gradient * normal, for_bias[v] += gradient;
      }
    }
    if (sums)
      for (int v = 0; v < vectors; ++v)
        store(of_weight + j + v * lanes, for_weight[v]), store(of_bias + j + v * lanes, for_bias[v]);
  }
  template <bool input, bool sums> void finish() const {
    constexpr int64_t lanes = kLanes<T>;
    int64_t j = 0;
    for (; j + 2 * lanes <= columns; j += 2 * lanes) finish<2, input, sums>(j, lanes);
    for (; j < columns; j += lanes) finish<1, input, sums>(j, smaller(lanes, columns - j));
  }
};

template <class T> void backward(const LayerNormBackwardArgs<T>& args) {
  using A = acc_t<T>;
  constexpr int64_t lanes = kLanes<T>;
  const int64_t columns = args.columns, padded = ceil_div(columns, lanes) * lanes;
  const bool sums = args.grad_weight || args.grad_bias;
  const int64_t chunk = larger(8, ceil_div(args.rows, kMostChunks)), chunks = ceil_div(args.rows, chunk);
  A* partial = sums ? scratch<A>(Slot::family_0, 2 * chunks * padded) : nullptr;
  parallel_for(chunks, 1 + 16384 / (columns * chunk), [&](int64_t begin, int64_t end) {
    const int64_t most = rows_together<A>(columns, kBackwardBytes / 2);
    A* values = row_memory<T>(2 * most, columns);
    for (int64_t c = begin; c < end; ++c) {
      A* of_weight = sums ? partial + 2 * c * padded : nullptr;
      if (sums) std::memset(of_weight, 0, sizeof(A) * static_cast<size_t>(2 * padded));
      const int64_t last = smaller((c + 1) * chunk, args.rows);
      for (int64_t row = c * chunk; row < last; row += most) {
        RowsBackward<T> some;
        some.rows = smaller(most, last - row);
        some.columns = columns;
        some.weight = args.weight;
        some.mean = args.mean + row;
        some.rstd = args.rstd + row;
        some.grad_input = args.grad_input ? args.grad_input + row * columns : nullptr;
        some.of_weight = of_weight;
        some.of_bias = sums ? of_weight + padded : nullptr;
        for (int64_t r = 0; r < some.rows; ++r) {
          const T *x = args.input + (row + r) * columns, *g = args.grad_output + (row + r) * columns;
          some.x[r] = widened(x, columns, values + 2 * r * columns);
          some.g[r] = widened(g, columns, values + (2 * r + 1) * columns);
          if (args.grad_input) some.sum(r, x, g);
        }
        if (args.grad_input && sums)
          some.template finish<true, true>();
        else if (args.grad_input)
          some.template finish<true, false>();
        else if (sums)
          some.template finish<false, true>();
      }
    }
  });
  if (!sums) return;
  parallel_for(padded / lanes, 1 + 16384 / (chunks * lanes), [&](int64_t begin, int64_t end) {
    for (int64_t j = begin * lanes; j < end * lanes; j += lanes) {
      const int64_t count = smaller(lanes, columns - j);
      Vec<A> of_weight{}, of_bias{};
      for (int64_t c = 0; c < chunks; ++c) {
        of_weight += load(partial + 2 * c * padded + j);
        of_bias += load(partial + (2 * c + 1) * padded + j);
      }
      if (args.grad_weight) store_some(args.grad_weight + j, of_weight, count);
      if (args.grad_bias) store_some(args.grad_bias + j, of_bias, count);
    }
  });
}

}  // namespace

#define DLKERN_DEFINE_LAYER_NORM(T)                                        \
  void layer_norm_forward(const LayerNormArgs<T>& args) { forward(args); } \
  void layer_norm_backward(const LayerNormBackwardArgs<T>& args) { backward(args); }
DLKERN_DEFINE_LAYER_NORM(float)
DLKERN_DEFINE_LAYER_NORM(double)
DLKERN_DEFINE_LAYER_NORM(bfloat16)
DLKERN_DEFINE_LAYER_NORM(float16)

}  // namespace dlkern::cpu::DLKERN_ISA
