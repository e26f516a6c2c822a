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

// Sum of f(j, count) over the vectors of a row, in a fixed order; f gives zeros beyond `count`.
template <class A, class F> [[gnu::always_inline]] inline A sum_row(int64_t columns, const F& f) {
  constexpr int64_t lanes = kLanes<A>;
  Vec<A> sum[kSums] = {};
  int64_t j = 0;
  for (; j + kSums * lanes <= columns; j += kSums * lanes)
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i) sum[i] += f(j + i * lanes, lanes);
  for (int i = 0; j < columns; j += lanes, ++i) sum[i] += f(j, smaller(lanes, columns - j));
  return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
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
      const A mean = first + sum_row<A>(columns, [&](int64_t j, int64_t count) {
                               const Vec<A> d = load_some(x + j, count) - first;
                               return count == lanes ? d : first_lanes<A>(d, count);
                             }) / count_of_row;
      const A square = sum_row<A>(columns, [&](int64_t j, int64_t count) {
        const Vec<A> d = load_some(x + j, count) - mean;
        return count == lanes ? d * d : first_lanes<A>(d * d, count);
      });
      const A rstd = static_cast<A>(1 / std::sqrt(static_cast<double>(square / count_of_row) + args.eps));
      args.mean[row] = mean;
      args.rstd[row] = rstd;
      for (int64_t j = 0; j < columns; j += lanes) {
        const int64_t count = smaller(lanes, columns - j);
        Vec<A> value = (load_some(x + j, count) - mean) * rstd;
        if (args.weight) value *= load_some(args.weight + j, count);
        if (args.bias) value += load_some(args.bias + j, count);
        store_some(y + j, value, count);
      }
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
        const auto weighted = [&](int64_t j, int64_t count) {
          const Vec<A> value = load_some(g + j, count);
          return args.weight ? value * load_some(args.weight + j, count) : value;
        };
        if (args.grad_input) {
          const A first = sum_row<A>(columns, weighted) / count_of_row;
          const A second =
              sum_row<A>(columns, [&](int64_t j, int64_t count) { return weighted(j, count) * xhat(j, count); }) /
              count_of_row;
          for (int64_t j = 0; j < columns; j += lanes) {
            const int64_t count = smaller(lanes, columns - j);
            store_some(args.grad_input + row * columns + j,
                       ((weighted(j, count) - first) - xhat(j, count) * second) * rstd, count);
          }
        }
        if (!sums) continue;
        const bool fresh = row == c * chunk;
        for (int64_t j = 0; j < columns; j += lanes) {
          const int64_t count = smaller(lanes, columns - j);
          const Vec<A> gradient = load_some(g + j, count), with = gradient * xhat(j, count);
          store(of_weight + j, fresh ? with : load(of_weight + j) + with);
          store(of_bias + j, fresh ? gradient : load(of_bias + j) + gradient);
        }
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
