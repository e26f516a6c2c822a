// A block's tile of C[m][n] = sum over k of A(m, k) B(n, k), bfloat16 or float16 operands (T), float sums: cp.async fills
// a ring of STAGES tiles ahead of the tensor cores (ldmatrix, mma.sync m16n8k16), one barrier a step of 32.
// Either operand may be stored with k last ([outer, k]) or k first ([k, outer]); ldmatrix transposes the latter. Floats
// are rounded to TF32 on the way from shared memory (mma.sync m16n8k8, steps of 16); k first they are read word by word,
// since ldmatrix would transpose halves of them.
#pragma once
#include "ptx.cuh"
#include "tile_load.cuh"

namespace dlkern::cuda {

template <class T>
constexpr int kBlockK = 64 / sizeof(T);

// BLOCK_M x BLOCK_N of C by WARPS_M x WARPS_N warps.
template <int BLOCK_M, int BLOCK_N, int WARPS_M, int WARPS_N, int STAGES>
struct MmaShape {
  static constexpr int kBlockM = BLOCK_M, kBlockN = BLOCK_N, kStages = STAGES;
  static constexpr int kWarpsM = WARPS_M, kWarpsN = WARPS_N;
  static constexpr int kThreads = 32 * WARPS_M * WARPS_N;
  static constexpr int kBlocks = 512 / kThreads;  // at least so many a multiprocessor: at most 128 registers a thread
  static constexpr int kWarpM = BLOCK_M / WARPS_M, kWarpN = BLOCK_N / WARPS_N;
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0);
};

enum class Stored { k_last, k_first };

// An operand's tile in shared memory, of OUTER rows of C (or columns, for B), and its fragments.
template <class T, int OUTER, Stored STORED>
struct Staged {
  using Element = T;
  static constexpr bool kLast = STORED == Stored::k_last;
  static constexpr int kPiece = 16 / sizeof(T);  // elements in a row of one of ldmatrix's matrices
  static constexpr int kStepK = 2 * kPiece;
  using TileType = Tile<kLast ? OUTER : kBlockK<T>, kLast ? kBlockK<T> : OUTER, kPiece>;

  // Loads the fragment at (outer_start, k_start), 16 x 16 elements or 16 x 8 floats; its matrices 0..3 are ordered by
  // `second`: the second half of "outer" first (A), or that of k first (B).
  enum class Second { outer, k };
  template <Second SECOND>
  static DLKERN_DEVICE void fragment(uint32_t (&out)[4], const T* tile, int outer_start, int k_start) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int low = lane / 8 % 2, high = lane / 16;  // matrices 1 and 3; matrices 2 and 3
    const int o = outer_start + (SECOND == Second::outer ? low : high) * 8;
    const int k_at = k_start + (SECOND == Second::outer ? high : low) * kPiece;
    if (kLast)
      ldmatrix_x4(out, tile + (o + lane % 8) * TileType::kStride + k_at);
    else
      ldmatrix_x4_transposed(out, tile + (k_at + lane % 8) * TileType::kStride + o);
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < 4; i++) out[i] = to_tf32(__uint_as_float(out[i]));
    }
  }
  static DLKERN_DEVICE void a_fragment(uint32_t (&out)[4], const T* tile, int outer_start, int k_start) {
    fragment<Second::outer>(out, tile, outer_start, k_start);
  }
  // Two B fragments: out[0..1] for columns outer_start.., out[2..3] for the next 8.
  static DLKERN_DEVICE void b_fragments(uint32_t (&out)[4], const T* tile, int outer_start, int k_start) {
    fragment<Second::k>(out, tile, outer_start, k_start);
  }
};

template <int OUTER>
struct Staged<float, OUTER, Stored::k_first> {
  using Element = float;
  static constexpr int kStepK = 8;
  using TileType = Tile<kBlockK<float>, OUTER>;

  // The words of a lane: k of lane % 4, then 4 further; of each outer element lane / 4, and 8 further.
  static DLKERN_DEVICE void words(uint32_t (&out)[2][2], const float* tile, int outer_start, int k_start) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const float* at = tile + (k_start + lane % 4) * TileType::kStride + outer_start + lane / 4;
#pragma unroll
    for (int k = 0; k < 2; k++) {
#pragma unroll
      for (int o = 0; o < 2; o++) out[k][o] = to_tf32(at[4 * k * TileType::kStride + 8 * o]);
    }
  }
  static DLKERN_DEVICE void a_fragment(uint32_t (&out)[4], const float* tile, int outer_start, int k_start) {
    uint32_t word[2][2];
    words(word, tile, outer_start, k_start);
    out[0] = word[0][0], out[1] = word[0][1], out[2] = word[1][0], out[3] = word[1][1];
  }
  static DLKERN_DEVICE void b_fragments(uint32_t (&out)[4], const float* tile, int outer_start, int k_start) {
    uint32_t word[2][2];
    words(word, tile, outer_start, k_start);
    out[0] = word[0][0], out[1] = word[1][0], out[2] = word[0][1], out[3] = word[1][1];
  }
};

// An operand that lies in memory as a matrix.
template <class T, int OUTER, Stored STORED, bool ALIGNED, int THREADS>
struct Operand : Staged<T, OUTER, STORED> {
  using TileType = typename Staged<T, OUTER, STORED>::TileType;

  const T* matrix;
  int64_t outer, k;  // sizes

  DLKERN_DEVICE Operand(const T* m, int64_t outer_size, int64_t k_size) : matrix(m), outer(outer_size), k(k_size) {}

  DLKERN_DEVICE void load(T* tile, int64_t outer_start, int64_t k_start) const {
    if (STORED == Stored::k_last)
      load_tile<TileType, THREADS, ALIGNED>(tile, matrix, outer, k, outer_start, k_start);
    else
      load_tile<TileType, THREADS, ALIGNED>(tile, matrix, k, outer, k_start, outer_start);
  }
};

template <class SHAPE, class A, class B>
constexpr int mma_shared_bytes() {
  return SHAPE::kStages * (A::TileType::kElements + B::TileType::kElements) *
         static_cast<int>(sizeof(typename A::Element));
}

// A warp's part of C: 16 x 8 pieces, four values a lane in each.
template <class SHAPE>
struct Accumulator {
  static constexpr int kRows = SHAPE::kWarpM / 16, kColumns = SHAPE::kWarpN / 8;
  float value[kRows][kColumns][4] = {};

  // Calls f(row, column, value, next value) for each pair of neighbouring columns; row and column are of the block.
  template <class F>
  DLKERN_DEVICE void for_each_pair(F&& f) const {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int row = warp / SHAPE::kWarpsN * SHAPE::kWarpM + lane / 4;
    const int column = warp % SHAPE::kWarpsN * SHAPE::kWarpN + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kRows; i++) {
#pragma unroll
      for (int j = 0; j < kColumns; j++) {
        f(row + 16 * i, column + 8 * j, value[i][j][0], value[i][j][1]);
        f(row + 16 * i + 8, column + 8 * j, value[i][j][2], value[i][j][3]);
      }
    }
  }
};

// Adds the whole sum over k for the tile at (m_start, n_start) to `sum`. `shared` holds mma_shared_bytes. For each step
// every thread also calls visit(A's tile in shared memory), between the barriers that guard it.
template <class SHAPE, class A, class B, class Visit>
DLKERN_DEVICE void mma_tile(Accumulator<SHAPE>& sum, const A& a, const B& b, int64_t m_start, int64_t n_start,
                            typename A::Element* shared, Visit&& visit) {
  using T = typename A::Element;
  constexpr int kStepK = A::kStepK;
  constexpr int kStageElements = A::TileType::kElements + B::TileType::kElements;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int warp_m = warp / SHAPE::kWarpsN * SHAPE::kWarpM, warp_n = warp % SHAPE::kWarpsN * SHAPE::kWarpN;
  const int steps = static_cast<int>(ceil_div(a.k, kBlockK<T>));
  const auto load = [&](int step) {
    T* tile = shared + step % SHAPE::kStages * kStageElements;
    a.load(tile, m_start, static_cast<int64_t>(step) * kBlockK<T>);
    b.load(tile + A::TileType::kElements, n_start, static_cast<int64_t>(step) * kBlockK<T>);
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
    const T* a_tile = shared + step % SHAPE::kStages * kStageElements;
    const T* b_tile = a_tile + A::TileType::kElements;
    visit(a_tile);
#pragma unroll
    for (int k = 0; k < kBlockK<T>; k += kStepK) {
      uint32_t a_part[Accumulator<SHAPE>::kRows][4], b_part[Accumulator<SHAPE>::kColumns / 2][4];
#pragma unroll
      for (int i = 0; i < Accumulator<SHAPE>::kRows; i++) A::a_fragment(a_part[i], a_tile, warp_m + 16 * i, k);
#pragma unroll
      for (int j = 0; j < Accumulator<SHAPE>::kColumns / 2; j++) B::b_fragments(b_part[j], b_tile, warp_n + 16 * j, k);
#pragma unroll
      for (int i = 0; i < Accumulator<SHAPE>::kRows; i++) {
#pragma unroll
        for (int j = 0; j < Accumulator<SHAPE>::kColumns; j++) {
          const uint32_t b0 = b_part[j / 2][j % 2 * 2], b1 = b_part[j / 2][j % 2 * 2 + 1];
          if constexpr (std::is_same_v<T, float>)
            mma_tf32_16x8x8(sum.value[i][j], a_part[i], b0, b1);
          else
            mma_16x8x16<T>(sum.value[i][j], a_part[i], b0, b1);
        }
      }
    }
  }
}

}  // namespace dlkern::cuda
