// A block's tile of C[m][n] = sum over k of A(m, k) B(n, k) on Hopper, bfloat16 or float16 operands (T), float sums: one
// thread keeps a ring of STAGES tiles filled by tensor copies, two warpgroups of 64 rows each multiply what has arrived
// (wgmma). Full and empty stages are told by mbarriers; no barrier of the whole block in the loop.
// Either operand may be stored with k last or k first (see hopper.cuh).
#pragma once
#include "hopper.cuh"

namespace dlkern::cuda {

template <int BLOCK_N, int STAGES>
struct WgmmaShape {
  static constexpr int kBlockM = 128, kBlockN = BLOCK_N, kBlockK = 64, kStages = STAGES;
  static constexpr int kConsumers = 2;  // warpgroups, after that of the thread that copies
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kAElements = kBlockM * kBlockK, kBElements = kBlockN * kBlockK;
  static constexpr int kStageElements = kAElements + kBElements;
  static constexpr int kStageBytes = 2 * kStageElements;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static constexpr int kPanel = 64 * kBlockK;  // elements of 64 rows or, k first, of 64 outer elements
};

// A tile in shared memory that tensor copies fill in `panels` of 64 outer elements, k first, or at once, k last.
template <bool FIRST, int OUTER>
struct WgmmaTile {
  static constexpr int kCopies = FIRST ? OUTER / 64 : 1;
  static constexpr int kMapRows = FIRST ? 64 : OUTER;  // box_rows of its map
};

// Blocks go through the tiles of a result in bands of kBand columns, so that those which run together share operands in
// L2.
struct TileGrid {
  static constexpr int kBand = 8;
  int rows, columns;  // tiles

  DLKERN_DEVICE void tile_of(int block, int& row, int& column) const {
    const int band = block / (kBand * rows), first = band * kBand, within = block - first * rows;
    const int width = columns - first < kBand ? columns - first : kBand;
    row = within / width;
    column = first + within % width;
  }
};

// A consumer thread's part of C.
template <class SHAPE>
struct WgmmaSum {
  float value[SHAPE::kBlockN / 2];

  static DLKERN_DEVICE int first_row() {  // the thread's other one is 8 further
    const int thread = static_cast<int>(threadIdx.x) - 128;
    return thread / 32 * 16 + thread % 32 / 4;
  }

  // Calls f(row, column, value, next value) for each pair of neighbouring columns; row and column are of the block.
  template <class F>
  DLKERN_DEVICE void for_each_pair(F&& f) const {
    const int row = first_row(), column = static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
    for (int j = 0; j < SHAPE::kBlockN / 8; j++) {
      f(row, column + 8 * j, value[4 * j], value[4 * j + 1]);
      f(row + 8, column + 8 * j, value[4 * j + 2], value[4 * j + 3]);
    }
  }
};

// The whole sum of `steps` >= 1 tiles. copy(a_tile, b_tile, barrier, step) starts the copies of one step, all
// kStageBytes of it; done(sum) gets the result, each consumer thread its part. For each step every consumer thread also
// calls visit(A's tile in shared memory).
template <class SHAPE, bool A_FIRST, bool B_FIRST, class T, class Copy, class Visit, class Done>
DLKERN_DEVICE void wgmma_tile(T* shared, int steps, Copy&& copy, Visit&& visit, Done&& done) {
  constexpr int kStages = SHAPE::kStages;
  DLKERN_SHARED(uint64_t, full, [SHAPE::kStages]);
  DLKERN_SHARED(uint64_t, empty, [SHAPE::kStages]);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; stage++) {
      mbarrier_init(full + stage, 1);
      mbarrier_init(empty + stage, 4 * SHAPE::kConsumers);  // a warp each
    }
    mbarrier_init_fence();
  }
  __syncthreads();

  // Phase p of a stage is its (p + 1)-th use.
  if (threadIdx.x < 128) {
    give_registers_back<40>();
    if (threadIdx.x != 0) return;
    for (int step = 0; step < steps; step++) {
      const int stage = step % kStages;
      mbarrier_wait(empty + stage, (step / kStages + 1) % 2);
      mbarrier_arrive_expect(full + stage, SHAPE::kStageBytes);
      T* const a_tile = shared + stage * SHAPE::kStageElements;
      copy(a_tile, a_tile + SHAPE::kAElements, full + stage, step);
    }
  } else {
    take_registers<232>();
    constexpr int kAdvanceA = A_FIRST ? 16 * 64 : 16, kAdvanceB = B_FIRST ? 16 * 64 : 16;  // elements, for 16 more k
    constexpr int kPanelBytes = 2 * SHAPE::kPanel;
    constexpr int kNextA = A_FIRST ? kPanelBytes : 16, kNextB = B_FIRST ? kPanelBytes : 16;  // k last does not use it
    const int group = static_cast<int>(threadIdx.x) / 128 - 1;
    WgmmaSum<SHAPE> sum;
    for (int step = 0; step < steps; step++) {
      const int stage = step % kStages;
      const T* const a_tile = shared + stage * SHAPE::kStageElements;
      const T* const b_tile = a_tile + SHAPE::kAElements;
      mbarrier_wait(full + stage, step / kStages % 2);
      wgmma_fence(sum.value);
#pragma unroll
      for (int k = 0; k < SHAPE::kBlockK / 16; k++) {
        wgmma<T, A_FIRST, B_FIRST>(sum.value, matrix_descriptor(a_tile + group * SHAPE::kPanel + k * kAdvanceA, kNextA),
                                   matrix_descriptor(b_tile + k * kAdvanceB, kNextB), step + k > 0);
      }
      wgmma_commit();
      visit(a_tile);
      wgmma_wait<1>();  // the step before is done
      __syncwarp();
      if (step > 0 && threadIdx.x % 32 == 0) mbarrier_arrive(empty + (step - 1) % kStages);
    }
    wgmma_wait_all(sum.value);
    done(sum);
  }
}

}  // namespace dlkern::cuda
