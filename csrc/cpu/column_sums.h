// Column sums of a matrix, which are a bias's gradient. In double: a bias sees few enough numbers that this costs nothing.
#pragma once
#include "parallel.h"
#include "wide.h"

namespace dlkern::cpu::DLKERN_ISA {

// to[j] = sum over i < rows of from[i * row + j], for `vectors` vectors of which the last has `some` columns.
template <int vectors, class S, class D>
void sum_columns_of(const S* from, int64_t row, int64_t rows, int64_t some, D* to) {
  constexpr int64_t lanes = kLanes<S>, ahead = 8;
  Wide<S> sum[vectors] = {};
  for (int64_t i = 0; i < rows; ++i, from += row) {
    // Rows lie far apart, where no prefetcher of the machine's follows.
    for (int64_t j = 0; j < vectors * lanes; j += 64 / static_cast<int64_t>(sizeof(S)))
      __builtin_prefetch(from + ahead * row + j);
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) sum[v] += wide(load_some(from + v * lanes, v + 1 < vectors ? lanes : some));
  }
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) store_some<D>(to + v * lanes, narrow(sum[v]), v + 1 < vectors ? lanes : some);
}

// to[j] = sum over i < rows of from[i * row + j * column], j < count.
template <class S, class D>
void sum_columns(const S* from, int64_t row, int64_t column, int64_t rows, int64_t count, D* to) {
  constexpr int64_t lanes = kLanes<S>, vectors = 4;
  if (column == 1) {
    const int64_t wide_block = vectors * lanes, block = count < num_threads() * wide_block ? lanes : wide_block;
    parallel_for(ceil_div(count, block), 1 + 16384 * lanes / (block * (rows + 1)), [&](int64_t begin, int64_t end) {
      const int64_t last = smaller(count, end * block);
      int64_t j = begin * block;
      for (; j + wide_block <= last; j += wide_block) sum_columns_of<vectors>(from + j, row, rows, lanes, to + j);
      for (; j < last; j += lanes) sum_columns_of<1>(from + j, row, rows, smaller(lanes, last - j), to + j);
    });
    return;
  }
  parallel_for(count, 1 + 16384 / (rows + 1), [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      double sum = 0;
      for (int64_t i = 0; i < rows; ++i) sum += static_cast<double>(static_cast<acc_t<S>>(from[i * row + j * column]));
      to[j] = static_cast<D>(static_cast<acc_t<D>>(sum));
    }
  });
}

}  // namespace dlkern::cpu::DLKERN_ISA
