// What attention_sm90.cu and attention_backward_sm90.cu share: blocks of two warpgroups that multiply, 64 rows each, and
// one thread that copies tiles into a ring of them; which calls they take.
#pragma once
#include <cmath>

#include "attention_tile.cuh"
#include "hopper.cuh"

namespace dlkern::cuda {
namespace attention {
namespace hopper {

constexpr int kGroups = 2, kBlockRows = 64 * kGroups, kBlockThreads = 128 * (1 + kGroups);

// Of a thread that multiplies: its warpgroup, and the first of its warp's 16 rows of the block's.
DLKERN_DEVICE int group() { return warp() / 4 - 1; }
DLKERN_DEVICE int warp_row() { return (warp() - 4) * 16; }

// ROWS rows of one head in shared memory: panels of 64 columns, each rows of 128 bytes.
template <int ROWS, int DEPTH>
struct Rows {
  static constexpr int kPanel = ROWS * 64, kElements = ROWS * DEPTH, kBytes = 2 * kElements;

  // Starts the copy of rows from `row` on. `barrier` must be told of kBytes.
  static DLKERN_DEVICE void copy(bf16* tile, const TensorMap& map, uint64_t* barrier, int row, int h, int b) {
#pragma unroll
    for (int panel = 0; panel < DEPTH / 64; panel++)
      tensor_copy_4d(tile + panel * kPanel, map, barrier, 64 * panel, row, h, b);
  }
  // Of wgmma: 64 rows from `row` on, or all, with k down the columns, from `column` on.
  static DLKERN_DEVICE uint64_t across(const bf16* tile, int row, int column) {
    return matrix_descriptor(tile + column / 64 * kPanel + row * 64 + column % 64, 16);
  }
  // All columns, with k down the rows, from `row` on.
  static DLKERN_DEVICE uint64_t down(const bf16* tile, int row) {
    return matrix_descriptor(tile + row * 64, 2 * kPanel);
  }
};

// s = a b^T: 64 rows of `a` from `row` on, N * 2 rows of `b`.
template <int DEPTH, int A_ROWS, int N>
DLKERN_DEVICE void start_row_products(float (&s)[N], const bf16* a, int row, const bf16* b) {
#pragma unroll
  for (int d = 0; d < DEPTH; d += 16)
    wgmma<bf16, false, false>(s, Rows<A_ROWS, DEPTH>::across(a, row, d), Rows<2 * N, DEPTH>::across(b, 0, d), d > 0);
  wgmma_commit();
}

// sum += p b, p in registers and 16 K columns wide.
template <int DEPTH, int K>
DLKERN_DEVICE void start_product(float (&sum)[DEPTH / 2], const uint32_t (&p)[K][4], const bf16* b) {
#pragma unroll
  for (int k = 0; k < K; k++) wgmma_bf16<true>(sum, p[k], Rows<16 * K, DEPTH>::down(b, 16 * k), true);
  wgmma_commit();
}

// An accumulator, rounded, becomes the next product's A.
template <int K>
DLKERN_DEVICE void to_operand(uint32_t (&p)[K][4], const float (&s)[8 * K]) {
#pragma unroll
  for (int i = 0; i < 4 * K; i++) p[i / 4][i % 4] = pack_bf16(s[2 * i], s[2 * i + 1]);
}

// Calls f(r, c, i): element i of an accumulator is in row lane() / 4 + 8 r of its warp's, and column c.
template <int N, class F>
DLKERN_DEVICE void for_each(F&& f) {
#pragma unroll
  for (int i = 0; i < N; i++) f(i / 2 % 2, i / 4 * 8 + lane() % 4 * 2 + i % 2, i);
}

// What position hides of queries, from `first` on a warp, and keys becomes -infinity.
template <int N>
DLKERN_DEVICE void hide_keys(float (&s)[N], const Args& x, int64_t b, int first, int j0) {
  const Span span[2] = {span_of(x, b, first + lane() / 4), span_of(x, b, first + lane() / 4 + 8)};
  for_each<N>([&](int r, int c, int i) {
    if (j0 + c < span[r].begin || j0 + c >= span[r].end) s[i] = minus_infinity();
  });
}

// Tiles in shared memory, filled and used in the same order: use n is of tile n % STAGES.
template <int STAGES>
struct Ring {
  uint64_t *full, *empty;

  DLKERN_DEVICE void init() const {
    for (int stage = 0; stage < STAGES; stage++) {
      mbarrier_init(full + stage, 1);
      mbarrier_init(empty + stage, 4 * kGroups);  // a warp each
    }
  }
  // By the thread that copies: waits until the tile is free, announces the bytes.
  DLKERN_DEVICE uint64_t* fill(int use, unsigned bytes) const {
    mbarrier_wait(empty + use % STAGES, (use / STAGES + 1) % 2);
    mbarrier_arrive_expect(full + use % STAGES, bytes);
    return full + use % STAGES;
  }
  DLKERN_DEVICE void wait(int use) const { mbarrier_wait(full + use % STAGES, use / STAGES % 2); }
  DLKERN_DEVICE void release(int use) const {
    __syncwarp();
    if (lane() == 0) mbarrier_arrive(empty + use % STAGES);
  }
};

// ---- For launchers ----

// Whether scores are nothing but products with a scale, of a size that has kernels; and masks by position.
inline bool fits(const Attention& a, const Args& x) {
  return a.element == Element::bfloat16 && a.score == kDotScore && x.plain && !x.dropout && a.depth == a.value_depth &&
         (a.depth == 64 || a.depth == 128) && x.scale > 0 && std::isfinite(x.scale * kLog2E) && x.query.aligned &&
         x.key.aligned && x.value.aligned;
}

// The map of an operand, to be copied in `rows` rows of 64 columns; false where it cannot be.
inline bool make_rows_map(TensorMap& map, const Operand& x, int64_t depth, int64_t length, int64_t heads, int64_t batch,
                          int rows) {
  const int64_t size[4] = {depth, length, heads, batch};
  int64_t stride[3] = {x.stride[2], x.stride[1], x.stride[0]};
  for (int d = 0; d < 3; d++) {
    if (size[d + 1] == 1)
      stride[d] = depth;  // any that is right
    else if (stride[d] == 0)
      return false;
  }
  return x.aligned && make_tiled_map(map, x.data, 4, size, stride, rows);
}

}  // namespace hopper
}  // namespace attention
}  // namespace dlkern::cuda
