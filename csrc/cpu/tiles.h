// Matrix products on AMX's tiles: eight registers of 16 rows x 64 bytes, and an instruction that adds to 16 x 16 sums
// the products of 16 x 32 and 32 x 16 values of bfloat16, 16 times the multiply-adds a cycle that AVX-512 has for float.
//
// Wider types are sums of bfloat16: a float's 24 bits of fraction are three values of 8 bits, x = x0 + x1 + x2, exactly,
// and a product a b is a0 b0 + a0 b1 + a1 b0 + a1 b1 + a0 b2 + a2 b0 but for terms below 2^-24 of it (below a half of
// the last place), summed in float as any other product: six instructions, which leaves 16 / 6 of AVX-512's rate. float16
// takes two values and three products, bfloat16 one.
//
// A strip is what a tile's rows (the left side) or columns (the right side) are made of: 32 rows, or columns, of an
// operand, cut along k into steps of 32. A step of a strip is, for each of its parts, two tiles of 1 KiB. Words of a tile
// hold two values each, k and k + 16 of a step, on both sides alike.
//
// The tiles flush what is below 2^-126 to zero, parts of values included, and turn infinity times anything into NaN:
// is_exact() says whether finished sums can be trusted, and who multiplies by tiles multiplies again, by AVX-512, where
// they can't. Numbers above 2^-64 are not touched by the first.
#pragma once
#include "isa.h"
#include "simd.h"

namespace dlkern::cpu::DLKERN_ISA {

#if defined(__AVX512F__) || defined(DLKERN_VECTOR_BYTES)
#define DLKERN_TILE_CODE 1
#else
#define DLKERN_TILE_CODE 0
#endif

constexpr int64_t kTile = 16, kTileStep = 32, kStrip = 2 * kTile;
constexpr int64_t kTileBytes = 1024;

// Values of bfloat16 that one of T becomes; 0 where tiles don't serve.
template <class T> constexpr int kParts = 0;
template <> inline constexpr int kParts<float> = 3;
template <> inline constexpr int kParts<float16> = 2;
template <> inline constexpr int kParts<bfloat16> = 1;

// Whether there is code that multiplies Ts by tiles, and whether this process does.
template <class T> constexpr bool kHasTileCode = DLKERN_TILE_CODE && kParts<T> > 0;
template <class T> inline bool uses_tiles() {
  return kHasTileCode<T> && (kParts<T> == 3 ? has_float_tiles() : has_tiles());
}

// Bytes of a step, and of `k` values of a whole strip.
template <class T> constexpr int64_t kStepBytes = kParts<T> * 2 * kTileBytes;
template <class T> inline int64_t strip_bytes(int64_t k) { return ceil_div(k, kTileStep) * kStepBytes<T>; }

// How an operand's values lie: value (line, k) at lines[line * line_stride + k * k_stride], where a line is a row of the
// left side or a column of the right side. One of the strides is 1.
template <class T> struct Lines {
  const T* at;
  int64_t line, k;
};

#if DLKERN_TILE_CODE

#if defined(__AVX512F__) && !defined(DLKERN_VECTOR_BYTES)
struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
// The calling thread's tiles, in use while this lives (if at all).
struct Tiles {
  const bool used;
  explicit Tiles(bool use = true) : used(use) {
    static constexpr TileShapes shapes{};
    if (used) asm volatile("ldtilecfg %0" : : "m"(shapes));
  }
  ~Tiles() {
    if (used) asm volatile("tilerelease");
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};
template <int N> [[gnu::always_inline]] inline void tile_zero() { asm volatile("tilezero %%tmm%c0" : : "i"(N)); }
template <int N> [[gnu::always_inline]] inline void tile_load(const void* from, int64_t pitch) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(pitch), "i"(N) : "memory");
}
template <int N> [[gnu::always_inline]] inline void tile_store(void* to, int64_t pitch) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(pitch), "i"(N) : "memory");
}
// sums N += left L x right R.
template <int N, int L, int R> [[gnu::always_inline]] inline void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(N), "i"(L), "i"(R));
}
#else
// The test build for CPUs without AVX-512 has the tiles in memory.
struct TileRegisters {
  alignas(64) char bytes[8][kTileBytes];
};
inline thread_local TileRegisters tile_registers;
struct Tiles {
  explicit Tiles(bool = true) {}
};
template <int N> inline void tile_zero() { std::memset(tile_registers.bytes[N], 0, kTileBytes); }
template <int N> inline void tile_load(const void* from, int64_t pitch) {
  for (int64_t i = 0; i < kTile; ++i)
    std::memcpy(tile_registers.bytes[N] + 64 * i, static_cast<const char*>(from) + pitch * i, 64);
}
template <int N> inline void tile_store(void* to, int64_t pitch) {
  for (int64_t i = 0; i < kTile; ++i)
    std::memcpy(static_cast<char*>(to) + pitch * i, tile_registers.bytes[N] + 64 * i, 64);
}
// Words hold two values, whose products are summed apart. Optimised though the build's kernels are not: it is their time.
[[gnu::noinline, gnu::optimize("O2")]] inline void multiply_in_memory(char* result, const char* left,
                                                                      const char* right) {
  float sums[kTile][kTile];
  uint32_t a[kTile][kTile], b[kTile][kTile];
  std::memcpy(sums, result, kTileBytes);
  std::memcpy(a, left, kTileBytes);
  std::memcpy(b, right, kTileBytes);
  for (int64_t i = 0; i < kTile; ++i) {
    float first[kTile] = {}, second[kTile] = {};
    for (int64_t p = 0; p < kTile; ++p)
      for (int64_t j = 0; j < kTile; ++j) {
        first[j] += __builtin_bit_cast(float, a[i][p] << 16) * __builtin_bit_cast(float, b[p][j] << 16);
        second[j] +=
            __builtin_bit_cast(float, a[i][p] & 0xffff0000u) * __builtin_bit_cast(float, b[p][j] & 0xffff0000u);
      }
    for (int64_t j = 0; j < kTile; ++j) sums[i][j] += first[j] + second[j];
  }
  std::memcpy(result, sums, kTileBytes);
}
template <int N, int L, int R> inline void tile_multiply() {
  auto& tiles = tile_registers.bytes;
  multiply_in_memory(tiles[N], tiles[L], tiles[R]);
}
#endif

namespace tiles_detail {

// Row `r` of a step's tiles: words of `low` and `high`, one tile a part, parts `apart` bytes from each other.
template <int PARTS, bool WHOLE = true>
[[gnu::always_inline]] inline void store_words(vfloat low, vfloat high, char* to, int64_t apart = 2 * kTileBytes) {
  // Nearest, halves away from zero; what is left is exact, and the last part keeps all of it where parts are the WHOLE.
  constexpr uint32_t half = 0x8000u, top = 0xffff0000u;
#pragma GCC unroll 3
  for (int part = 0; part < PARTS; ++part, to += apart) {
    vuint32 l = (vuint32)low, h = (vuint32)high;
    if (part + 1 < PARTS || !WHOLE) {
      l = (l + half) & top;
      h = (h + half) & top;
      low -= (vfloat)l;
      high -= (vfloat)h;
    }
    const vuint32 words = (l >> 16) | (h & top);
    std::memcpy(to, &words, sizeof words);
  }
}

// Element (r, c) of a step's half is from[r * row + c]; rows and columns beyond the counts are zero.
template <class T>
[[gnu::always_inline]] inline vfloat load_row(const T* from, int64_t row, int64_t r, int64_t rows, int64_t columns) {
  if (r >= rows || columns <= 0) return vfloat{};
  return load_some(from + r * row, columns);
}

}  // namespace tiles_detail

// `count` lines (32 at most), values [0, k), into a strip of a T's parts; what is beyond either is zero. As the parts of a
// narrower type U, values are rounded.
template <bool LEFT, class T, class U = T> void pack_strip(Lines<T> from, int64_t count, int64_t k, char* to) {
  using namespace tiles_detail;
  constexpr int parts = kParts<U>;
  constexpr bool whole = parts >= kParts<T>;
  // A tile's rows are lines on the left, values of k on the right: where they are what lies apart, they are loaded as they
  // are, and otherwise as columns of squares.
  const bool straight = LEFT ? from.k == 1 : from.line == 1;
  for (int64_t p = 0; p < k; p += kTileStep, to += kStepBytes<U>) {
    const int64_t left = k - p;
    for (int64_t t = 0; t < 2; ++t) {
      char* tile = to + t * kTileBytes;
      const int64_t lines = count - t * kTile;
      const T* low = from.at + p * from.k + t * kTile * from.line;
      if (lines <= 0) {
        for (int part = 0; part < parts; ++part) std::memset(tile + part * 2 * kTileBytes, 0, kTileBytes);
        continue;
      }
      const T* high = low + kTile * from.k;
      if (straight && left >= kTileStep && lines >= kTile) {
        const int64_t row = LEFT ? from.line : from.k;
#pragma GCC unroll 4
        for (int64_t r = 0; r < kTile; ++r, tile += 64)
          store_words<parts, whole>(load(low + r * row), load(high + r * row), tile);
      } else if (straight) {
        for (int64_t r = 0; r < kTile; ++r, tile += 64) {
          if constexpr (LEFT)
            store_words<parts, whole>(load_row(low, from.line, r, lines, left),
                                      load_row(high, from.line, r, lines, left - kTile), tile);
          else
            store_words<parts, whole>(load_row(low, from.k, r, left, lines),
                                      load_row(high, from.k, r, left - kTile, lines), tile);
        }
      } else {
        // Squares: their rows as they lie are lines on the right, values of k on the left.
        const int64_t row = LEFT ? from.k : from.line;
        vfloat squares[2][kTile];
#pragma GCC unroll 2
        for (int64_t half = 0; half < 2; ++half) {
          const T* square = half ? high : low;
          const int64_t rest = left - half * kTile, rows = LEFT ? rest : lines, columns = LEFT ? lines : rest;
          vfloat v[kTile];
          if (rows >= kTile && columns >= kTile) {
#pragma GCC unroll 16
            for (int64_t r = 0; r < kTile; ++r) v[r] = load(square + r * row);
          } else {
            for (int64_t r = 0; r < kTile; ++r) v[r] = load_row(square, row, r, rows, columns);
          }
          transpose(v);
#pragma GCC unroll 16
          for (int64_t r = 0; r < kTile; ++r) squares[half][r] = v[r];
        }
        for (int64_t r = 0; r < kTile; ++r, tile += 64) store_words<parts, whole>(squares[0][r], squares[1][r], tile);
      }
    }
  }
}

// A row of a tile: `count` 16-bit values (no more than it holds), the rest zero, as they lie.
[[gnu::always_inline]] inline vuint32 load_pairs(const void* from, int64_t count) {
#if defined(__AVX512F__) && !defined(DLKERN_VECTOR_BYTES)
  return (vuint32)_mm512_maskz_loadu_epi16(count >= kTileStep ? ~0u : (1u << count) - 1, from);
#else
  vuint32 v{};
  std::memcpy(&v, from, static_cast<size_t>(2 * smaller(count, kTileStep)));
  return v;
#endif
}

// The same as pack_strip of bfloat16 alone, with words that hold k and k + 1: rows that lie along k are copied as they are.
template <bool LEFT> void pack_pairs(Lines<bfloat16> from, int64_t count, int64_t k, char* to) {
  using words = vuint32;
  const bool along = from.k == 1;  // else across: neighbours are lines
  for (int64_t p = 0; p < k; p += kTileStep, to += kStepBytes<bfloat16>)
    for (int64_t t = 0; t < 2; ++t) {
      char* tile = to + t * kTileBytes;
      const int64_t lines = count - t * kTile, left = k - p;
      if (lines <= 0) {
        std::memset(tile, 0, kTileBytes);
        continue;
      }
      const bfloat16* at = from.at + p * from.k + t * kTile * from.line;
      words row[kTile];
      const bool whole = lines >= kTile && left >= kTileStep;
      if (along && whole) {
#pragma GCC unroll 16
        for (int64_t r = 0; r < kTile; ++r) std::memcpy(&row[r], at + r * from.line, sizeof row[r]);
      } else if (along) {
        for (int64_t r = 0; r < kTile; ++r) row[r] = r < lines ? load_pairs(at + r * from.line, left) : words{};
      } else if (whole) {
#pragma GCC unroll 16
        for (int64_t r = 0; r < kTile; ++r)
          row[r] = (vuint32)load(at + 2 * r * from.k) >> 16 | (vuint32)load(at + (2 * r + 1) * from.k);
      } else {
        for (int64_t r = 0; r < kTile; ++r)
          row[r] = (vuint32)tiles_detail::load_row(at, from.k, 2 * r, left, lines) >> 16 |
                   (vuint32)tiles_detail::load_row(at, from.k, 2 * r + 1, left, lines);
      }
      if (along != LEFT) transpose(row);
#pragma GCC unroll 16
      for (int64_t r = 0; r < kTile; ++r) std::memcpy(tile + 64 * r, &row[r], sizeof row[r]);
    }
}

namespace tiles_detail {

// Registers: 0 to 3 sums (row of tiles * 2 + column), 4 and 5 left, 6 and 7 right.
template <int ROWS, int COLUMNS> [[gnu::always_inline]] inline void multiply_parts() {
  tile_multiply<0, 4, 6>();
  if constexpr (COLUMNS == 2) tile_multiply<1, 4, 7>();
  if constexpr (ROWS == 2) tile_multiply<2, 5, 6>();
  if constexpr (ROWS == 2 && COLUMNS == 2) tile_multiply<3, 5, 7>();
}

}  // namespace tiles_detail

// How a step's tiles lie: bytes from a side's first tile to its second, and from a part to the next. In strips:
struct StepTiles {
  int64_t tile = kTileBytes, part = 2 * kTileBytes;
};

// The products of one step, added to the sums in registers, in the order that loads the fewest tiles. WHOLE: of two parts
// that of both second ones too, 2^-18 of a product, so that float16's are exact.
template <int ROWS, int COLUMNS, int PARTS, bool WHOLE = false>
[[gnu::always_inline]] inline void multiply_step(const char* left, const char* right, StepTiles of_left = {},
                                                 StepTiles of_right = {}) {
  using tiles_detail::multiply_parts;
  const auto load_left = [&](int part) __attribute__((always_inline)) {
    tile_load<4>(left + part * of_left.part, 64);
    if constexpr (ROWS == 2) tile_load<5>(left + part * of_left.part + of_left.tile, 64);
  };
  const auto load_right = [&](int part) __attribute__((always_inline)) {
    tile_load<6>(right + part * of_right.part, 64);
    if constexpr (COLUMNS == 2) tile_load<7>(right + part * of_right.part + of_right.tile, 64);
  };
  load_left(0);
#pragma GCC unroll 3
  for (int part = PARTS - 1; part >= 0; --part) {
    load_right(part);
    multiply_parts<ROWS, COLUMNS>();
  }
#pragma GCC unroll 2
  for (int part = PARTS - 1; part > 0; --part) {
    load_left(part);
    multiply_parts<ROWS, COLUMNS>();
  }
  if constexpr (PARTS == 3 || (PARTS == 2 && WHOLE)) {
    load_right(1);
    multiply_parts<ROWS, COLUMNS>();
  }
}

// Sums of ROWS x COLUMNS tiles in registers: zeroed, loaded from and stored to float[..][pitch].
template <int ROWS, int COLUMNS> [[gnu::always_inline]] inline void zero_sums() {
  tile_zero<0>();
  if constexpr (COLUMNS == 2) tile_zero<1>();
  if constexpr (ROWS == 2) tile_zero<2>();
  if constexpr (ROWS == 2 && COLUMNS == 2) tile_zero<3>();
}
template <int ROWS, int COLUMNS> [[gnu::always_inline]] inline void load_sums(const float* from, int64_t pitch) {
  const int64_t row = pitch * 4;
  tile_load<0>(from, row);
  if constexpr (COLUMNS == 2) tile_load<1>(from + kTile, row);
  if constexpr (ROWS == 2) tile_load<2>(from + kTile * pitch, row);
  if constexpr (ROWS == 2 && COLUMNS == 2) tile_load<3>(from + kTile * pitch + kTile, row);
}
template <int ROWS, int COLUMNS> [[gnu::always_inline]] inline void store_sums(float* to, int64_t pitch) {
  const int64_t row = pitch * 4;
  tile_store<0>(to, row);
  if constexpr (COLUMNS == 2) tile_store<1>(to + kTile, row);
  if constexpr (ROWS == 2) tile_store<2>(to + kTile * pitch, row);
  if constexpr (ROWS == 2 && COLUMNS == 2) tile_store<3>(to + kTile * pitch + kTile, row);
}

// run.operator()<ROWS, COLUMNS>() with the tiles that `rows` and `columns` (32 at most) fill.
template <class F> [[gnu::always_inline]] inline void with_tiles(int64_t rows, int64_t columns, F&& run) {
  if (rows > kTile)
    columns > kTile ? run.template operator()<2, 2>() : run.template operator()<2, 1>();
  else
    columns > kTile ? run.template operator()<1, 2>() : run.template operator()<1, 1>();
}

// sums[32][pitch] (+)= left strip x right strip over `steps` steps; `rows` and `columns` (32 at most) say which tiles are
// of use. Within a Tiles' life.
template <class T, bool WHOLE = false>
inline void multiply_strips(int64_t steps, const char* left, const char* right, float* sums, int64_t pitch, bool add,
                            int64_t rows, int64_t columns) {
  with_tiles(rows, columns, [&]<int ROWS, int COLUMNS>() __attribute__((always_inline)) {
    if (add)
      load_sums<ROWS, COLUMNS>(sums, pitch);
    else
      zero_sums<ROWS, COLUMNS>();
    for (int64_t s = 0; s < steps; ++s)
      multiply_step<ROWS, COLUMNS, kParts<T>, WHOLE>(left + s * kStepBytes<T>, right + s * kStepBytes<T>);
    store_sums<ROWS, COLUMNS>(sums, pitch);
  });
}

// to += from, both float[32][32].
inline void add_strip(const float* from, float* to) {
  for (int64_t i = 0; i < kStrip * kStrip; i += kTile) store(to + i, load(to + i) + load(from + i));
}

// square = from[16][row]^T.
[[gnu::always_inline]] inline void load_turned(const float* from, int64_t row, vfloat (&square)[kTile]) {
#pragma GCC unroll 16
  for (int64_t r = 0; r < kTile; ++r) square[r] = load(from + r * row);
  transpose(square);
}

// to = from^T, both float[32][32].
inline void turn_strip(const float* from, float* to) {
  for (int64_t i = 0; i < kStrip; i += kTile)
    for (int64_t j = 0; j < kStrip; j += kTile) {
      vfloat square[kTile];
      load_turned(from + i * kStrip + j, kStrip, square);
#pragma GCC unroll 16
      for (int64_t r = 0; r < kTile; ++r) store(to + (j + r) * kStrip + i, square[r]);
    }
}

// Whether the tiles' sums, the largest of whose absolute values' bits are `most`, are what exact parts give: they are finite,
// and their largest is so far above the smallest number that what was flushed to zero does not show.
inline bool is_exact(vint32 most) {
  const int32_t largest = largest_lane(most);
  return largest >= 0x1f800000 && largest < 0x7f800000;  // 2^-64, infinity
}
// The same of rows x columns at sums[..][pitch].
inline bool is_exact(const float* sums, int64_t pitch, int64_t rows, int64_t columns) {
  vint32 most{};
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; j += kLanes<float>) {
      const vint32 bits = (vint32)load_some(sums + i * pitch + j, columns - j) & 0x7fffffff;
      most = bits > most ? bits : most;
    }
  return is_exact(most);
}

// Packing is compiled once, in tiles.cpp.
#define DLKERN_PACK_STRIP(KIND, T, U)                                           \
  KIND template void pack_strip<true, T, U>(Lines<T>, int64_t, int64_t, char*); \
  KIND template void pack_strip<false, T, U>(Lines<T>, int64_t, int64_t, char*);
#define DLKERN_PACKING(KIND)                                                     \
  DLKERN_PACK_STRIP(KIND, float, float)                                          \
  DLKERN_PACK_STRIP(KIND, float16, float16)                                      \
  DLKERN_PACK_STRIP(KIND, bfloat16, bfloat16)                                    \
  DLKERN_PACK_STRIP(KIND, float, float16)                                        \
  DLKERN_PACK_STRIP(KIND, float, bfloat16)                                       \
  KIND template void pack_pairs<true>(Lines<bfloat16>, int64_t, int64_t, char*); \
  KIND template void pack_pairs<false>(Lines<bfloat16>, int64_t, int64_t, char*);
DLKERN_PACKING(extern)

#else
struct Tiles {
  explicit Tiles(bool = true) {}
};
#endif

}  // namespace dlkern::cpu::DLKERN_ISA
