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
  for (int i = 0; j < columns; j += lanes, ++i)
    f(j, smaller(lanes, columns - j), [&](int s, Vec<A> v) __attribute__((always_inline)) { sum[s][i] += v; });
  for (int s = 0; s < sums; ++s) total[s] = reduce_add((sum[s][0] + sum[s][1]) + (sum[s][2] + sum[s][3]));
}

template <class T> void forward(const LayerNormArgs<T>& args) {
  using A = acc_t<T>;
  constexpr int64_t lanes = kLanes<T>;
  const int64_t columns = args.columns;
  const A count_of_row = static_cast<A>(columns);  // divided by: a rounded reciprocal would show in rows of few numbers
  parallel_for(args.rows, 1 + 16384 / columns, [&](int64_t begin, int64_t end) {
    A* values = row_memory<T>(1, columns);
    for (int64_t row = begin; row < end; ++row) {
      const A* x = widened(args.input + row * columns, columns, values);
      T* y = args.output + row * columns;
      // About the first number: a row of equal numbers has exactly that mean, and deviations of exactly 0.
      const A first = x[0];
      A sum[1], square[1];
      sum_row(columns, sum, [&](int64_t j, int64_t count, auto&& add) __attribute__((always_inline)) {
        prefetch_ahead(args.input + row * columns + j);
        const Vec<A> d = load_some(x + j, count) - first;
        add(0, count == lanes ? d : first_lanes<A>(d, count));
      });
      const A mean = first + sum[0] / count_of_row;
      sum_row(columns, square, [&](int64_t j, int64_t count, auto&& add) __attribute__((always_inline)) {
        const Vec<A> d = load_some(x + j, count) - mean;
        add(0, count == lanes ? d * d : first_lanes<A>(d * d, count));
      });
      const A rstd = static_cast<A>(1 / std::sqrt(static_cast<double>(square[0] / count_of_row) + args.eps));
      args.mean[row] = mean;
      args.rstd[row] = rstd;
      each_vector<lanes>(columns, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
        Vec<A> value = (load_some(x + j, count) - mean) * rstd;
        if (args.weight) value *= load_some(args.weight + j, count);
        if (args.bias) value += load_some(args.bias + j, count);
        store_some(y + j, value, count);
      });
    }
  });
}

template <class T> void backward(const LayerNormBackwardArgs<T>& args) {
  using A = acc_t<T>;
  constexpr int64_t lanes = kLanes<T>;
  const int64_t columns = args.columns, padded = ceil_div(columns, lanes) * lanes;
  const bool sums = args.grad_weight || args.grad_bias;
  const int64_t chunk = larger(8, ceil_div(args.rows, kMostChunks)), chunks = ceil_div(args.rows, chunk);
  A* partial = sums ? scratch<A>(Slot::family_0, 2 * chunks * padded) : nullptr;
  const A count_of_row = static_cast<A>(columns);
  parallel_for(chunks, 1 + 16384 / (columns * chunk), [&](int64_t begin, int64_t end) {
    A* values = row_memory<T>(2, columns);
    for (int64_t c = begin; c < end; ++c) {
      A *of_weight = partial + 2 * c * padded, *of_bias = of_weight + padded;
      for (int64_t row = c * chunk; row < smaller((c + 1) * chunk, args.rows); ++row) {
        const A* x = widened(args.input + row * columns, columns, values);
        const A* g = widened(args.grad_output + row * columns, columns, values + columns);
        const A mean = args.mean[row], rstd = args.rstd[row];
        const auto xhat = [&](int64_t j, int64_t count) { return (load_some(x + j, count) - mean) * rstd; };
        const auto weighted = [&](int64_t j, Vec<A> gradient, int64_t count) {
          return args.weight ? gradient * load_some(args.weight + j, count) : gradient;
        };
        A mean_of[2];  // of g w, and of g w xhat
        if (args.grad_input) {
          sum_row(columns, mean_of, [&](int64_t j, int64_t count, auto&& add) __attribute__((always_inline)) {
            prefetch_ahead(args.input + row * columns + j);
            prefetch_ahead(args.grad_output + row * columns + j);
            const Vec<A> value = weighted(j, load_some(g + j, count), count);
            add(0, value);
            add(1, value * xhat(j, count));
          });
          for (A& m : mean_of) m /= count_of_row;
        }
        const bool fresh = row == c * chunk;
        each_vector<lanes>(columns, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
          const Vec<A> gradient = load_some(g + j, count), normal = xhat(j, count), with = gradient * normal;
          if (args.grad_input)
            store_some(args.grad_input + row * columns + j,
                       ((weighted(j, gradient, count) - mean_of[0]) - normal * mean_of[1]) * rstd, count);
          if (!sums) return;
          store(of_weight + j, fresh ? with : load(of_weight + j) + with);
          store(of_bias + j, fresh ? gradient : load(of_bias + j) + gradient);
        });
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
