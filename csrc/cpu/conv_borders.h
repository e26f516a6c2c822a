// Which taps of a filter lie inside the image, for each output position. Positions that see the same taps make a class;
// a tile of the micro-kernel takes pixels of one class and runs over the taps they see: nothing is multiplied by
// padding, and nothing has to be padded. With 3 x 3 taps and padding 1 there are nine classes.
#pragma once
#include <cstdint>

#include "conv_kernel.h"

namespace dlkern::cpu::DLKERN_ISA {

constexpr int64_t kMostRanges = 8;  // along one dimension; beyond, all positions see all taps, of a padded copy

// Taps [begin, end) of one dimension.
struct TapRange {
  int64_t begin, end;
};

// One dimension: the distinct ranges, and which of them each output position has.
struct Borders {
  TapRange ranges[kMostRanges];
  int64_t count;
  bool cut;  // ranges leave out the taps outside the image
  // Positions in order have ranges in order, but for the middle one, which positions may come back to.
  const uint8_t* of;
};

// `of` has room for `positions` entries; position i sees source i * stride + tap[t], of `size`.
inline Borders find_borders(int64_t positions, int64_t stride, int64_t size, const int64_t* tap, int64_t taps,
                            uint8_t* of) {
  Borders b{};
  b.of = of;
  b.cut = true;
  for (int64_t i = 0; i < positions; ++i) {
    TapRange range{0, taps};
    while (range.begin < taps && i * stride + tap[range.begin] < 0) ++range.begin;
    while (range.end > range.begin && i * stride + tap[range.end - 1] >= size) --range.end;
    int64_t found = b.count - 1;
    while (found >= 0 && (b.ranges[found].begin != range.begin || b.ranges[found].end != range.end)) --found;
    if (found < 0) {
      if (b.count == kMostRanges) {
        b.ranges[0] = TapRange{0, taps};
        b.count = 1;
        b.cut = false;
        for (int64_t j = 0; j < positions; ++j) of[j] = 0;
        return b;
      }
      found = b.count++;
      b.ranges[found] = range;
    }
    of[i] = static_cast<uint8_t>(found);
  }
  return b;
}

// The pieces of one class's windows in each block of steps: list[starts[block] .. starts[block + 1]).
struct PieceTable {
  Piece* list;
  int32_t* starts;
};

// How windows lie in memory: a run is the taps of a row where these are neighbours and whole pixels are read, otherwise
// one tap.
struct WindowShape {
  int64_t channels, pixel, row;  // of a group; elements from one source pixel (row) to the next
  int64_t taps_h, taps_w;
  const int64_t *tap_h, *tap_w;
  bool merged;
};

// Pieces of the windows that see taps rows x columns, cut into blocks of `depth` steps of all taps x channels.
// Returns how many there are.
inline int64_t plan_pieces(const WindowShape& w, const TapRange& rows, const TapRange& columns, int64_t depth,
                           int64_t blocks, Piece* list, int32_t* starts) {
  int64_t count = 0, block = 0;
  starts[0] = 0;
  for (int64_t r = rows.begin; r < rows.end; ++r)
    for (int64_t s = columns.begin; s < columns.end; s += w.merged ? columns.end - columns.begin : 1) {
      int64_t step = (r * w.taps_w + s) * w.channels;
      int64_t left = (w.merged ? columns.end - columns.begin : 1) * w.channels;
      int64_t offset = (w.tap_h[r] - w.tap_h[0]) * w.row + (w.tap_w[s] - w.tap_w[0]) * w.pixel;
      while (left > 0) {
        for (; block < step / depth; ++block) starts[block + 1] = static_cast<int32_t>(count);
        const int64_t room = (block + 1) * depth - step, part = left < room ? left : room;
        list[count++] = Piece{offset, part, step - block * depth};
        offset += part;
        step += part;
        left -= part;
      }
    }
  for (; block < blocks; ++block) starts[block + 1] = static_cast<int32_t>(count);
  return count;
}

}  // namespace dlkern::cpu::DLKERN_ISA
