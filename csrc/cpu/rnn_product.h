// A recurrent weight and its product with rows of a batch, which each step has: by vectors (the panels of rnn_steps.h), or
// by AMX's tiles (tiles.h).
//
// By tiles, a panel is 32 units: a strip of the weight a gate. The rows, states or gradients of gates, are floats and are
// laid out as strips anew each step, in as many parts as the weight: bfloat16's are rounded, as they are where they are
// stored. Sums that tiles can't be trusted with (is_exact()), of a row and a panel, are computed again by vectors; so what
// decides does not depend on how threads share rows and panels.
#pragma once
#include "rnn_steps.h"
#include "tiles.h"

namespace dlkern::cpu::DLKERN_ISA {

constexpr int64_t kMostRows = 2 * kStrip;  // rows of the batch that are multiplied together, by tiles
static_assert(kMostRows >= kBlockRows);

// Where tiles pay: few rows leave most of them empty, but bfloat16's weights are half as long to read as vectors' floats,
// and float's one and a half times.
template <class T> bool by_tiles(const RnnShape& s) {
  constexpr int64_t least = kParts<T> == 1 ? 1 : kParts<T> == 2 ? kTile : kStrip + 1;
  return s.batch >= least && s.hidden >= 2 * kStrip && uses_tiles<T>();
}

template <class T> struct StepWeight {
  using A = acc_t<T>;
  bool tiled;
  int64_t gates, units, depth;  // a row's results, gates * units sums of `depth` products
  int64_t unit_vectors;  // vectors of units a panel has, each with all gates
  int64_t panels;
  int64_t gate_step, unit_step;  // between the gates and between the vectors of units in a panel's results
  int64_t block_rows;  // rows that are multiplied together
  int64_t block = 0;  // products a sum, by vectors
  Packed<A> packed{};
  // By tiles: value k of unit u of gate g is at[(g * units + u) * line + k * step].
  Lines<T> lines{};
  const char* strips = nullptr;

  StepWeight(bool with_tiles, int64_t gate_count, int64_t unit_count, int64_t products, int64_t vectors)
      : tiled(with_tiles), gates(gate_count), units(unit_count), depth(products) {
    constexpr int64_t lanes = kLanes<A>;
    unit_vectors = tiled ? kStrip / lanes : vectors;
    panels = ceil_div(units, unit_vectors * lanes);
    gate_step = tiled ? kStrip : lanes;
    unit_step = tiled ? lanes : gates * lanes;
    block_rows = tiled ? kMostRows : kBlockRows;
  }
  int64_t width() const { return unit_vectors * gates * kLanes<A>; }  // results of a panel, padding included
  int64_t strip_size() const { return ceil_div(depth, kTileStep) * kParts<T> * 2 * kTileBytes; }
  int64_t turned_size() const { return ceil_div(depth * units * int64_t{sizeof(T)}, int64_t{sizeof(A)}); }
  // Elements that the packed weight takes.
  int64_t size() const {
    return tiled ? panels * gates * strip_size() / int64_t{sizeof(A)} + turned_size() : panels * width() * depth;
  }

  // As pack_rows() and pack_columns(); `batch` rows a step.
  void pack_weight_rows(const T* weight, int64_t batch, A* to) {
    if (tiled)
      pack_strips(Lines<T>{weight, depth, 1}, to);
    else
      packed = pack_rows(weight, gates, units, depth, unit_vectors, to);
    block = sum_depth(depth, static_cast<double>(batch * gates * units) * static_cast<double>(depth));
  }
  void pack_weight_columns(const T* weight, int64_t first, int64_t batch, A* to) {
    if (tiled) {
      if (first > 0) {
        T* turned = reinterpret_cast<T*>(to + size() - turned_size());
        const auto move = [&](int64_t from, int64_t count, T* at) {
          std::memcpy(static_cast<void*>(at), weight + from * units, sizeof(T) * static_cast<size_t>(count * units));
        };
        move(first, depth - first, turned);
        move(0, first, turned + (depth - first) * units);
        weight = turned;
      }
      pack_strips(Lines<T>{weight, 1, units}, to);
    } else {
      packed = pack_columns(weight, depth, units, first, unit_vectors, to);
    }
    block = sum_depth(depth, static_cast<double>(batch * units) * static_cast<double>(depth));
  }

  Lines<T> lines_of(int64_t panel, int64_t gate) const {
    return {lines.at + (gate * units + panel * kStrip) * lines.line, lines.line, lines.k};
  }
  const char* strip(int64_t panel, int64_t gate) const { return strips + (panel * gates + gate) * strip_size(); }

 private:
  void pack_strips(Lines<T> from, A* to) {
    lines = from;
    strips = reinterpret_cast<char*>(to);
    if constexpr (kHasTileCode<T>)
      parallel_for(panels * gates, larger(1, 65536 / (depth * kStrip)), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          pack_strip<false>(lines_of(i / gates, i % gates), smaller(kStrip, units - i / gates * kStrip), depth,
                            const_cast<char*>(strip(i / gates, i % gates)));
      });
  }
};

#if DLKERN_TILE_CODE
// The rows as strips, one a kStrip rows.
template <class T>
void lay_rows(const StepWeight<T>& w, const float* const* rows, int64_t count, char* to) {
  constexpr int parts = kParts<T>;
  const auto nearest = [](vfloat v) { return parts > 1 ? v : (vfloat)round_to_upper_half(v); };
  for (int64_t first = 0; first < count; first += kStrip)
    for (int64_t p = 0; p < w.depth; p += kTileStep, to += kStepBytes<T>) {
      const int64_t left = w.depth - p, used = ceil_div(smaller(kStrip, count - first), kTile) * kTile;
      for (int64_t r = 0; r < used; ++r) {
        vfloat low{}, high{};
        if (first + r < count) {
          const float* from = rows[first + r] + p;
          low = load_some(from, left);
          if (left > kTile) high = load_some(from + kTile, left - kTile);
        }
        tiles_detail::store_words<parts>(nearest(low), nearest(high), to + r / kTile * kTileBytes + r % kTile * 64);
      }
    }
}

// Whether a row's sums, `width` of them, are what exact parts give. Those of a row of zeros are, if they are finite.
inline bool is_exact_row(const float* sums, int64_t width, const float* row, int64_t depth) {
  if (is_exact(sums, width, 1, width)) return true;
  vint32 bits{}, ends{};
  for (int64_t k = 0; k < depth; k += kTile) bits |= (vint32)load_some(row + k, depth - k) & 0x7fffffff;
  for (int64_t j = 0; j < width; j += kTile) ends |= ((vint32)load(sums + j) & 0x7fffffff) >= 0x7f800000;
  return largest_lane(bits | (ends & 1)) == 0;
}

// sums[count][width] = rows times a panel of the weight.
template <class T>
void multiply_laid(const StepWeight<T>& w, int64_t panel, const float* const* rows, int64_t count, const char* laid,
                   float* sums) {
  // Where results are floats, blocks of k are summed one by one: rounding errors grow with a sum's length.
  constexpr int64_t most = kParts<T> == 3 ? 8 : int64_t{1} << 40;
  const int64_t steps = ceil_div(w.depth, kTileStep), width = w.width(),
                columns = smaller(kStrip, w.units - panel * kStrip);
  alignas(64) float more[kStrip * kStrip];
  for (int64_t gate = 0; gate < w.gates; ++gate)
    for (int64_t i = 0; i < count; i += kStrip) {
      const char *left = laid + i / kStrip * steps * kStepBytes<T>, *right = w.strip(panel, gate);
      const int64_t height = smaller(kStrip, count - i);
      float* to = sums + i * width + gate * kStrip;
      for (int64_t s = 0; s < steps; s += most) {
        multiply_strips<T>(smaller(most, steps - s), left + s * kStepBytes<T>, right + s * kStepBytes<T>,
                           s == 0 ? to : more, s == 0 ? width : kStrip, false, height, columns);
        for (int64_t r = 0; s > 0 && r < height; ++r)
          for (int64_t j = 0; j < columns; j += kTile)
            store(to + r * width + j, load(to + r * width + j) + load(more + r * kStrip + j));
      }
      for (int64_t r = 0; columns <= kTile && r < height; ++r) store(to + r * width + kTile, vfloat{});
    }
  const float* again[kMostRows];
  int64_t where[kMostRows], some = 0;
  for (int64_t i = 0; i < count; ++i)
    if (!is_exact_row(sums + i * width, width, rows[i], w.depth)) {
      again[some] = rows[i];
      where[some++] = i;
    }
  if (some == 0) return;
  const Packed<float> one{kStrip / kLanes<float>, 1, w.depth,
                          scratch<float>(Slot::rnn_again, (w.depth + kMostRows) * kStrip)};
  float *packed = const_cast<float*>(one.data), *found = packed + w.depth * kStrip;
  for (int64_t gate = 0; gate < w.gates; ++gate) {
    const Lines<T> from = w.lines_of(panel, gate);
    std::memset(packed, 0, static_cast<size_t>(w.depth * kStrip) * sizeof(float));
    if (from.k == 1)
      transpose(from.at, w.depth, columns, w.depth, packed, kStrip);
    else
      for (int64_t k = 0; k < w.depth; ++k) copy(from.at + k * from.k, packed + k * kStrip, columns);
    for (int64_t i = 0; i < some; i += kBlockRows) {
      const int64_t these = smaller(kBlockRows, some - i);
      multiply_panel(one, 0, again + i, these, w.block, found);
      for (int64_t r = 0; r < these; ++r)
        std::memcpy(sums + where[i + r] * width + gate * kStrip, found + r * kStrip, kStrip * sizeof(float));
    }
  }
}

// Compiled once, in rnn_product.cpp.
#define DLKERN_LAID_PRODUCT(KIND, T)                                                      \
  KIND template void lay_rows(const StepWeight<T>&, const float* const*, int64_t, char*); \
  KIND template void multiply_laid(const StepWeight<T>&, int64_t, const float* const*, int64_t, const char*, float*);
#define DLKERN_LAID_PRODUCTS(KIND)   \
  DLKERN_LAID_PRODUCT(KIND, float)   \
  DLKERN_LAID_PRODUCT(KIND, float16) \
  DLKERN_LAID_PRODUCT(KIND, bfloat16)
DLKERN_LAID_PRODUCTS(extern)
#endif

// Some rows of the batch, as their products with a weight read them.
template <class T> class StepRows {
  using A = acc_t<T>;
  const StepWeight<T>& w;
  const A* const* rows;
  int64_t count;
  char* laid = nullptr;
  [[maybe_unused]] const Tiles tiles;

 public:
  StepRows(const StepWeight<T>& weight, const A* const* from, int64_t some)
      : w(weight), rows(from), count(some), tiles(weight.tiled) {
    if constexpr (kHasTileCode<T>)
      if (w.tiled) {
        laid = scratch<char>(Slot::rnn_rows, kMostRows / kStrip * ceil_div(w.depth, kTileStep) * kStepBytes<T>);
        lay_rows(w, rows, count, laid);
      }
  }
  // sums[i][w.width()] = rows[i] times a panel; the memory of whole strips of rows is used.
  void multiply(int64_t panel, A* sums) const {
    if constexpr (kHasTileCode<T>)
      if (w.tiled) return multiply_laid(w, panel, rows, count, laid, sums);
    multiply_panel(w.packed, panel, rows, count, w.block, sums);
  }
};

// Calls put(b, panel, sums) for all rows row(b), b in [begin, end), times all panels of [panel0, panel1).
template <class T, class Row, class Put>
void multiply_rows(const StepWeight<T>& w, int64_t begin, int64_t end, int64_t panel0, int64_t panel1, const Row& row,
                   const Put& put) {
  using A = acc_t<T>;
  A* sums = scratch<A>(Slot::family_2, kMostRows * w.width());
  const A* rows[kMostRows];
  for (int64_t b0 = begin; b0 < end; b0 += w.block_rows) {
    const int64_t count = smaller(w.block_rows, end - b0);
    for (int64_t i = 0; i < count; ++i) rows[i] = row(b0 + i);
    const StepRows<T> laid(w, rows, count);
    for (int64_t panel = panel0; panel < panel1; ++panel) {
      laid.multiply(panel, sums);
      for (int64_t i = 0; i < count; ++i) put(b0 + i, panel, sums + i * w.width());
    }
  }
}

// Calls visit(j, sums) for each vector of units of a panel's results, its first unit j.
template <class T, class Visit>
void each_vector(const StepWeight<T>& w, int64_t panel, const acc_t<T>* sums, const Visit& visit) {
  for (int64_t v = 0; v < w.unit_vectors; ++v) {
    const int64_t j = (panel * w.unit_vectors + v) * kLanes<acc_t<T>>;
    if (j < w.units) visit(j, sums + v * w.unit_step);
  }
}

}  // namespace dlkern::cpu::DLKERN_ISA
