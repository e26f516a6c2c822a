// A block's tile of C[m][n] = sum over k of A(m, k) B(n, k) in float, exact products on the ordinary cores: the twin of
// mma_tile.cuh for float32, which has no tensor-core instruction without rounding its operands. A thread makes 8 x 8 of
// C from registers; cp.async fills a ring of STAGES tiles ahead, one barrier a step of 16. Every 8 products are summed
// for themselves and then added: one chain of additions as long as k would lose several times the digits.
#pragma once
#include "pack.cuh"
#include "ptx.cuh"
#include "tile_load.cuh"

namespace dlkern::cuda {

// BLOCK_M x BLOCK_N of C, 64 of them a thread; at least BLOCKS blocks a multiprocessor, which bounds registers.
template <int BLOCK_M, int BLOCK_N, int STAGES, int BLOCKS>
struct FfmaShape {
  static constexpr int kBlockM = BLOCK_M, kBlockN = BLOCK_N, kBlockK = 16, kStages = STAGES, kBlocks = BLOCKS;
  static constexpr int kChain = 8;  // products summed for themselves
  static constexpr int kThreads = BLOCK_M * BLOCK_N / 64;
  static constexpr int kAcross = BLOCK_N / 8;  // threads in a row of C
};

// An operand's tile in shared memory: a row is one k, four floats longer so that a column's elements spread over banks.
template <int OUTER, int BLOCK_K>
struct FfmaStaged {
  struct TileType {
    static constexpr int kStride = OUTER + 4;
    static constexpr int kElements = BLOCK_K * kStride;
  };
};

// A thread's part of C: two runs of four rows, half a block apart, times two such runs of columns.
template <class SHAPE>
struct FfmaAccumulator {
  float value[8][8] = {};

  static DLKERN_DEVICE int row() { return static_cast<int>(threadIdx.x) / SHAPE::kAcross * 4; }
  static DLKERN_DEVICE int column() { return static_cast<int>(threadIdx.x) % SHAPE::kAcross * 4; }

  // Calls f(row, column, value, next value) for each pair of neighbouring columns; row and column are of the block.
  template <class F>
  DLKERN_DEVICE void for_each_pair(F&& f) const {
#pragma unroll
    for (int i = 0; i < 8; i++) {
#pragma unroll
      for (int j = 0; j < 8; j += 2)
        f(row() + i % 4 + i / 4 * (SHAPE::kBlockM / 2), column() + j % 4 + j / 4 * (SHAPE::kBlockN / 2), value[i][j],
          value[i][j + 1]);
    }
  }
};

template <class SHAPE, class A, class B>
constexpr int ffma_shared_bytes() {
  return SHAPE::kStages * (A::TileType::kElements + B::TileType::kElements) * static_cast<int>(sizeof(float));
}

// Adds the whole sum over k to `sum`. `shared` holds ffma_shared_bytes.
template <class SHAPE, class A, class B>
DLKERN_DEVICE void ffma_tile(FfmaAccumulator<SHAPE>& sum, const A& a, const B& b, float* shared) {
  constexpr int kStageElements = A::TileType::kElements + B::TileType::kElements;
  const int steps = static_cast<int>(ceil_div(a.k, SHAPE::kBlockK));
  const auto load = [&](int step) {
    float* tile = shared + step % SHAPE::kStages * kStageElements;
    a.load(tile, 0, static_cast<int64_t>(step) * SHAPE::kBlockK);
    b.load(tile + A::TileType::kElements, 0, static_cast<int64_t>(step) * SHAPE::kBlockK);
  };
  const auto eight = [](float (&out)[8], const float* row, int start, int half) {
#pragma unroll
    for (int run = 0; run < 2; run++) {
      const auto four = load_pack<float, 4>(row + start + run * half);
#pragma unroll
      for (int v = 0; v < 4; v++) out[4 * run + v] = four.at[v];
    }
  };

#pragma unroll
  for (int step = 0; step < SHAPE::kStages - 1; step++) {
    if (step < steps) load(step);
    cp_async_commit();  // one group a step, empty ones too, so that the count in the wait holds
  }
  for (int step = 0; step < steps; step++) {
    cp_async_wait<SHAPE::kStages - 2>();
    __syncthreads();  // this step's tile is there, and everybody is done with the one that is loaded over next
    if (step + SHAPE::kStages - 1 < steps) load(step + SHAPE::kStages - 1);
    cp_async_commit();
    const float* a_tile = shared + step % SHAPE::kStages * kStageElements;
    const float* b_tile = a_tile + A::TileType::kElements;
#pragma unroll 1
    for (int start = 0; start < SHAPE::kBlockK; start += SHAPE::kChain) {
      float chain[8][8] = {};
#pragma unroll
      for (int k = start; k < start + SHAPE::kChain; k++) {
        float a_part[8], b_part[8];
        eight(a_part, a_tile + k * A::TileType::kStride, FfmaAccumulator<SHAPE>::row(), SHAPE::kBlockM / 2);
        eight(b_part, b_tile + k * B::TileType::kStride, FfmaAccumulator<SHAPE>::column(), SHAPE::kBlockN / 2);
#pragma unroll
        for (int i = 0; i < 8; i++) {
#pragma unroll
          for (int j = 0; j < 8; j++) chain[i][j] = fmaf(a_part[i], b_part[j], chain[i][j]);
        }
      }
#pragma unroll
      for (int i = 0; i < 8; i++) {
#pragma unroll
        for (int j = 0; j < 8; j++) sum.value[i][j] += chain[i][j];
      }
    }
  }
}

}  // namespace dlkern::cuda
