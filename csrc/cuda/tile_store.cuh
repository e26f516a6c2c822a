// Storing a tile's results.
#pragma once
#include "pack.cuh"

namespace dlkern::cuda {

// Stores two neighbouring elements of a [rows, columns] matrix, together where columns is even.
template <class T>
DLKERN_DEVICE void store_pair(T* matrix, int64_t rows, int64_t columns, int64_t row, int64_t column, float first,
                              float second) {
  if (row >= rows || column >= columns) return;
  T* at = matrix + row * columns + column;
  const Pack<T, 2> pair{{from_float<T>(first), from_float<T>(second)}};
  if (columns % 2 == 0) {
    store_pack(at, pair);
  } else {
    at[0] = pair.at[0];
    if (column + 1 < columns) at[1] = pair.at[1];
  }
}

// Stores two neighbouring columns, together where they are neighbours in memory.
template <class T>
DLKERN_DEVICE void store_columns(T* result, int64_t first_at, int64_t second_at, bool has_second, float first,
                                 float second) {
  const Pack<T, 2> pair{{from_float<T>(first), from_float<T>(second)}};
  if (has_second && second_at == first_at + 1 && reinterpret_cast<uintptr_t>(result + first_at) % sizeof(pair) == 0) {
    store_pack(result + first_at, pair);
  } else {
    result[first_at] = pair.at[0];
    if (has_second) result[second_at] = pair.at[1];
  }
}

}  // namespace dlkern::cuda
