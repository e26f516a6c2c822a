// Operands of a product that lie in an image rather than in a matrix: element (outer, k) is the image's element at the
// sum of what `outer` and what `k` contribute, an address and a pixel each, and zero where that pixel is outside. For a
// convolution's input `outer` is an output pixel and `k` a filter tap and channel; for its weight gradient the other
// way round; a matrix is an image of one pixel. What outer rows contribute is worked out once and lies in shared memory.
#pragma once
#include "fast_divide.cuh"
#include "mma_tile.cuh"

namespace dlkern::cuda {

// What an index contributes: an offset in elements and a pixel.
struct alignas(16) Spot {
  int64_t offset;
  int h, w;
};
constexpr int kNowhere = -(1 << 30);  // a row outside the image, whatever is added: images have fewer than 2**30 rows

// An index is written as three digits, the last one running fastest (n, p, q or r, s, c), each with its step.
struct Steps {
  int64_t first = 0, middle = 0, last = 0;
  int h_first = 0, h_middle = 0, w_middle = 0, w_last = 0;

  DLKERN_DEVICE Spot at(const Spot& origin, int64_t i, int j, int l) const {
    return {origin.offset + i * first + j * middle + l * last, origin.h + static_cast<int>(i) * h_first + j * h_middle,
            origin.w + j * w_middle + l * w_last};
  }
};

// The contributions of COUNT outer indices from `start`, by all THREADS threads; from `end` on, nowhere.
template <int COUNT, int THREADS>
DLKERN_DEVICE void fill_spots(Spot* spots, const Steps& steps, const Spot& origin, int64_t start, int64_t end,
                              uint32_t middle, uint32_t last) {
  for (int i = static_cast<int>(threadIdx.x); i < COUNT; i += THREADS) {
    const int64_t index = start + i, above = index / last;
    spots[i] = index >= end
                   ? Spot{0, kNowhere, 0}
                   : steps.at(origin, above / middle, static_cast<int>(above % middle), static_cast<int>(index % last));
  }
}

// k's digits: k = (first * middle + middle digit) * last + last digit. Fewer than 2**31 of them.
struct Digits {
  FastDivide middle, last;
};

// An operand of mma_tile or ffma_tile: OUTER rows whose contributions are in `spots`. WIDTH neighbouring elements (of k,
// or of the outer index where that is stored last) are loaded at once; their addresses are multiples of 16 bytes.
template <class STAGED, class T, int OUTER, int BLOCK_K, bool K_LAST, int WIDTH, int THREADS>
struct Gathered : STAGED {
  const T* image;
  const Spot* spots;
  const Steps& steps;  // of k
  Digits digits;
  uint32_t k_start;  // the digits of k = 0 are those of k_start
  uint32_t k;
  uint32_t height, width;
  bool outer_fastest;  // neighbouring threads load neighbouring rows rather than neighbouring k

  DLKERN_DEVICE Gathered(const T* i, const Spot* sp, const Steps& st, const Digits& d, uint32_t start, uint32_t count,
                         int h, int w, bool fastest)
      : image(i),
        spots(sp),
        steps(st),
        digits(d),
        k_start(start),
        k(count),
        height(static_cast<uint32_t>(h)),
        width(static_cast<uint32_t>(w)),
        outer_fastest(fastest) {}

  DLKERN_DEVICE Spot spot_of(uint32_t index) const {
    uint32_t middle, last;
    const uint32_t first = digits.middle.divide(digits.last.divide(k_start + index, last), middle);
    const Spot spot = steps.at({0, 0, 0}, first, static_cast<int>(middle), static_cast<int>(last));
    return {spot.offset, index < k ? spot.h : kNowhere, spot.w};
  }

  DLKERN_DEVICE void load_piece(T* tile, int outer, int k_at, const Spot& of_k) const {
    const Spot of_outer = spots[outer];
    const bool inside =
        static_cast<uint32_t>(of_outer.h + of_k.h) < height && static_cast<uint32_t>(of_outer.w + of_k.w) < width;
    const T* source = inside ? image + (of_outer.offset + of_k.offset) : image;
    T* destination =
        tile + (K_LAST ? outer * STAGED::TileType::kStride + k_at : k_at * STAGED::TileType::kStride + outer);
    if constexpr (WIDTH * sizeof(T) == 16)
      cp_async16(destination, source, inside ? 16 : 0);
    else if constexpr (sizeof(T) == 4)
      cp_async4(destination, source, inside ? 4 : 0);
    else
      *destination = inside ? *source : from_float<T>(0.0f);
  }

  // A tile from `start` of k on. The rows are those of `spots`.
  DLKERN_DEVICE void load(T* tile, int64_t, int64_t start_) const {
    constexpr int kPieces = OUTER * BLOCK_K / WIDTH / THREADS;
    static_assert(OUTER * BLOCK_K % (WIDTH * THREADS) == 0);
    const uint32_t start = static_cast<uint32_t>(start_);
    const int thread = static_cast<int>(threadIdx.x);
    if (WIDTH > 1 && K_LAST) {
      constexpr int kPerRow = BLOCK_K / WIDTH;
      static_assert(THREADS % kPerRow == 0);
      const int k_at = thread % kPerRow * WIDTH;
      const Spot of_k = spot_of(start + k_at);
#pragma unroll
      for (int i = 0; i < kPieces; i++) load_piece(tile, (thread + i * THREADS) / kPerRow, k_at, of_k);
    } else if (WIDTH > 1) {
      constexpr int kPerRow = OUTER / WIDTH;
#pragma unroll(sizeof(T) == 4 ? 1 : kPieces)  // floats' kernels have no registers for several pieces' digits
      for (int i = 0; i < kPieces; i++) {
        const int k_at = (thread + i * THREADS) / kPerRow;
        load_piece(tile, (thread + i * THREADS) % kPerRow * WIDTH, k_at, spot_of(start + k_at));
      }
    } else if (outer_fastest) {
#pragma unroll(kPieces < 4 ? kPieces : 4)
      for (int i = 0; i < kPieces; i++) {
        const int k_at = (thread + i * THREADS) / OUTER;
        load_piece(tile, (thread + i * THREADS) % OUTER, k_at, spot_of(start + k_at));
      }
    } else {
      static_assert(WIDTH > 1 || THREADS % BLOCK_K == 0);
      const int k_at = thread % BLOCK_K;
      const Spot of_k = spot_of(start + k_at);
#pragma unroll(kPieces < 4 ? kPieces : 4)
      for (int i = 0; i < kPieces; i++) load_piece(tile, (thread + i * THREADS) / BLOCK_K, k_at, of_k);
    }
  }
};

}  // namespace dlkern::cuda
