// Column sums of a matrix, which are a bias's gradient. In double: a bias sees few enough numbers that this costs nothing.
#pragma once
#include "parallel.h"
#include "simd.h"

namespace dlkern::cpu::DLKERN_ISA {

// to[j] = sum over i < rows of from[i * row + j * column], j < count.
template <class S, class D>
void sum_columns(const S* from, int64_t row, int64_t column, int64_t rows, int64_t count, D* to) {
  constexpr int64_t lanes = kLanes<S>;
  parallel_for(ceil_div(count, lanes), 1 + 16384 / (rows + 1), [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v) {
      const int64_t j = v * lanes;
      const int some = static_cast<int>(smaller(lanes, count - j));
      Wide<S> sum{};
      for (int64_t i = 0; i < rows; ++i) {
        const S* p = from + i * row + j * column;
        if (column == 1) {
          sum += __builtin_convertvector(some == lanes ? load(p) : load_partial<S>(p, some), Wide<S>);
        } else {
          for (int l = 0; l < some; ++l) sum[l] += static_cast<double>(static_cast<acc_t<S>>(p[l * column]));
        }
      }
      store_partial<D>(to + j, __builtin_convertvector(sum, Vec<S>), some);
    }
  });
}

}  // namespace dlkern::cpu::DLKERN_ISA
