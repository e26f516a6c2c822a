// What forward and backward of recurrent layers with options share: a block's row, its normalisation, zoneout, and tiles
// of a step's products.
//
// Products are tiles of 16 columns and 16 or 64 sequences (rnn_steps.cuh's Product). What needs whole rows is a block a
// sequence, each thread with every 128th unit, or where nothing is normalised several blocks of 128 units.
#pragma once
#include "block_reduce.cuh"
#include "rnn_gates.cuh"
#include "rnn_options.h"
#include "rnn_steps.cuh"

namespace dlkern::cuda {
namespace rnn {

constexpr float kNormEps = 1e-5f;
constexpr int kPartials = 32;  // floats that block_sum wants

// What a unit becomes: the new value, or what it was, or the expectation of the two.
DLKERN_DEVICE float zoned(float fresh, float old, const float* chosen, float share) {
  if (chosen) return *chosen != 0.0f ? fresh : old;
  return share == 0.0f ? fresh : share * old + (1.0f - share) * fresh;
}

// Calls f(j) for this thread's units, in a launch of row_blocks.
template <class F>
DLKERN_DEVICE void each_unit(int64_t hidden, F&& f) {
  for (int64_t j = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x; j < hidden; j += gridDim.y * kThreads)
    f(j);
}

// The sum over a block of f(j), j < count.
template <class F>
DLKERN_DEVICE float row_sum(int64_t count, float (&partial)[kPartials], F&& f) {
  float sum = 0.0f;
  for (int64_t j = threadIdx.x; j < count; j += kThreads) sum += f(j);
  return block_sum<kThreads>(sum, partial);
}

struct Statistics {
  float mean = 0.0f, scale = 1.0f;  // the second: one over the deviation
};
// Of value(j), j < count; the block as a whole. `partial` is free again after the next barrier.
template <class F>
DLKERN_DEVICE Statistics statistics(int64_t count, float (&partial)[3][kPartials], F&& value) {
  const float share = 1.0f / static_cast<float>(count);
  float mean = row_sum(count, partial[0], value) * share;
  mean += row_sum(count, partial[1], [&](int64_t j) { return value(j) - mean; }) * share;  // what rounding left
  const float squares = row_sum(count, partial[2], [&](int64_t j) { return (value(j) - mean) * (value(j) - mean); });
  return {mean, 1.0f / sqrtf(squares * share + kNormEps)};
}

// The gradient before a normalisation: of(j) after it and the sums it wants, of a row.
struct NormGradient {
  float mean, along;
  DLKERN_DEVICE float operator()(float weighted, float normed, float scale) const {
    return scale * (weighted - mean - normed * along);
  }
};
// weighted(j): the gradient times the weight.
template <class F>
DLKERN_DEVICE NormGradient norm_gradient(int64_t count, const float* normed, float (&partial)[2][kPartials],
                                         F&& weighted) {
  const float share = 1.0f / static_cast<float>(count);
  const float mean = row_sum(count, partial[0], weighted) * share;
  return {mean, row_sum(count, partial[1], [&](int64_t j) { return weighted(j) * normed[j]; }) * share};
}

// Blocks of a launch of tiles of `columns` columns, and of one of rows: a sequence is blockIdx.x, as there may be more
// than 65,535.
inline dim3 tiles(const RnnShape& s, int64_t columns) {
  return grid_of(ceil_div(columns, kUnits), ceil_div(s.batch, wide(s) ? 64 : 16));
}
inline dim3 row_blocks(const RnnShape& s, bool whole) {
  return grid_of(s.batch, whole ? 1 : ceil_div(s.hidden, kThreads));
}

// Calls f(type, wide) and f(type, gates).
template <class F>
void with_width(const RnnShape& s, F&& f) {
  with_type(s.element, [&](auto* type) {
    if (wide(s))
      f(type, std::true_type{});
    else
      f(type, std::false_type{});
  });
}
template <class F>
void with_gates(const RnnShape& s, F&& f) {
  with_type(s.element, [&](auto* type) {
    if (s.gates() == 4)
      f(type, std::integral_constant<int, 4>{});
    else if (s.gates() == 3)
      f(type, std::integral_constant<int, 3>{});
    else
      f(type, std::integral_constant<int, 1>{});
  });
}

}  // namespace rnn
}  // namespace dlkern::cuda
