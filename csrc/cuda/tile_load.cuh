// Tiles of a row-major matrix of 16-bit elements, from global to shared memory, zero outside the matrix.
// Rows in shared memory are 16 bytes longer than the tile's, so that the eight rows ldmatrix reads at once lie in
// different banks (row lengths of 32, 64 and 128 elements, of 16 floats).
#pragma once
#include "ptx.cuh"

namespace dlkern::cuda {

template <int ROWS, int COLUMNS, int PAD = 8>
struct Tile {
  static constexpr int kRows = ROWS, kColumns = COLUMNS;
  static constexpr int kStride = COLUMNS + PAD;
  static constexpr int kElements = ROWS * kStride;
};

// Starts loading rows [row, row + kRows), columns [column, column + kColumns) of a [rows, columns] matrix by all
// `THREADS` threads. ALIGNED: by cp.async, 8 elements at a time; columns must be a multiple of 8 and the matrix 16-byte
// aligned. Otherwise element by element, which is done on return but, like a copy, visible to others after a barrier.
template <class TILE, int THREADS, bool ALIGNED, class T>
DLKERN_DEVICE void load_tile(T* tile, const T* matrix, int64_t rows, int64_t columns, int64_t row, int64_t column) {
  static_assert(sizeof(T) == 2);
  constexpr int kWidth = ALIGNED ? 8 : 1;
  constexpr int kPerRow = TILE::kColumns / kWidth;
  constexpr int kPieces = TILE::kRows * kPerRow;
  static_assert(kPieces % THREADS == 0);
#pragma unroll(ALIGNED ? kPieces / THREADS : 4)
  for (int i = 0; i < kPieces / THREADS; i++) {
    const int piece = static_cast<int>(threadIdx.x) + i * THREADS;
    const int r = piece / kPerRow, c = piece % kPerRow * kWidth;
    const bool inside = row + r < rows && column + c < columns;
    const T* source = inside ? matrix + (row + r) * columns + column + c : matrix;
    T* destination = tile + r * TILE::kStride + c;
    if (ALIGNED)
      cp_async16(destination, source, inside ? 16 : 0);
    else
      *destination = inside ? *source : from_float<T>(0.0f);
  }
}

}  // namespace dlkern::cuda
