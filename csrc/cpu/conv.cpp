// conv2d forward and the gradient of its input: both are correlations of a source with a filter.
//
// Implicit matrix product: output pixels x output channels, summed over taps and input channels. A block of output
// pixels, and the window of the source that they see, stays in the second-level cache; the window is copied once
// (transposing and widening together), or read in place where it lies as [row][column][channel] already. For each panel
// of output channels the micro-kernel then runs over the pixels, grouped by the taps they see (conv_borders.h), with the
// panel's weights in the first-level cache. The input gradient is, for each residue of the input position modulo the
// stride, a dense correlation of grad_output with the taps of that residue: no multiplications by inserted zeros.
// Floor: 2 N P Q K C R S / groups over the FMA peak.
//
// Where the CPU has AMX, blocks go by tiles (conv_tiles.h) and come back here only where these are not exact.
#include "conv.h"

#include "conv_borders.h"
#include "conv_depthwise.h"
#include "conv_finish.h"
#include "conv_grouped.h"
#include "conv_pack.h"
#include "conv_planar.h"
#include "conv_tiles.h"
#include "conv_winograd.h"
#include "parallel.h"
#include "scratch.h"

namespace dlkern::cpu::DLKERN_ISA {
namespace {

constexpr int64_t kMostPixels = 384;  // output pixels of a block
constexpr int64_t kWindowBytes = 192 * 1024;  // of the second-level cache, for the window

// Hands out pieces of one scratch buffer.
struct Arena {
  char* next;
  template <class E> E* take(int64_t count) {
    E* result = reinterpret_cast<E*>(next);
    next += (static_cast<size_t>(count) * sizeof(E) + 63) / 64 * 64;
    return result;
  }
};

// One call's plan: how the source is read, how the work is cut.
template <class T> struct Plan {
  using A = acc_t<T>;
  int64_t channels, outputs;  // of a group
  bool in_place;
  int64_t min_h, min_w, span_h, span_w;  // first tap, last tap - first tap
  int64_t copy_h, copy_w;  // step of the copy: where there is one tap, only what it sees
  int64_t local_h, local_w;  // stride within the copy
  int64_t pixel, row;  // elements from one source pixel (row) of the copy to the next
  int64_t block_columns, column_blocks, block_rows, row_blocks, all_rows;
  int64_t splits;  // of the panels among tasks
  int64_t panels, depth;  // depth: steps of a whole sum
  int64_t panel_width;  // of all panels but the last
  int64_t block_depth, block_count;  // steps between two additions to memory
  Borders rows, columns;
  const PieceTable* classes;  // [rows.count][columns.count]
  const A *weights, *bias;  // packed, for all groups

  int64_t width_of(int64_t panel) const {
    const int64_t count = smaller(panel_width, outputs - panel * panel_width);
    return ceil_div(count, kLanes<A>) * kLanes<A>;
  }
  int64_t outputs_padded() const { return (panels - 1) * panel_width + width_of(panels - 1); }
};

template <class T> void plan_panels(const Correlation<T>& z, Plan<T>& plan) {
  plan.channels = z.source.channels / z.groups;
  plan.outputs = z.out_channels / z.groups;
  plan.panel_width = kTileVectors * kLanes<acc_t<T>>;
  plan.panels = ceil_div(plan.outputs, plan.panel_width);
  plan.depth = z.taps_h * z.taps_w * plan.channels;
}

template <class T> void plan_source(const Correlation<T>& z, Plan<T>& plan) {
  plan.min_h = z.tap_h[0];
  plan.min_w = z.tap_w[0];
  plan.span_h = z.tap_h[z.taps_h - 1] - plan.min_h;
  plan.span_w = z.tap_w[z.taps_w - 1] - plan.min_w;
  plan.in_place = sizeof(T) == sizeof(acc_t<T>) && z.source.channels_last && plan.rows.cut && plan.columns.cut;
  const bool one_h = z.taps_h == 1 && !plan.in_place, one_w = z.taps_w == 1 && !plan.in_place;
  plan.copy_h = one_h ? z.stride_h : 1;
  plan.local_h = one_h ? 1 : z.stride_h;
  plan.copy_w = one_w ? z.stride_w : 1;
  plan.local_w = one_w ? 1 : z.stride_w;
}

template <class T> void plan_blocks(const Correlation<T>& z, Plan<T>& plan) {
  const int64_t threads = num_threads();
  plan.column_blocks = ceil_div(z.columns, kMostPixels);
  plan.block_columns = ceil_div(z.columns, plan.column_blocks);
  plan.column_blocks = ceil_div(z.columns, plan.block_columns);
  plan.pixel = plan.in_place ? z.source.channels : plan.channels;
  plan.row = plan.pixel * (plan.in_place ? z.source.w : (plan.block_columns - 1) * plan.local_w + plan.span_w + 1);
  plan.all_rows = z.source.n * z.rows;
  const int64_t most = larger(1, kMostPixels / plan.block_columns);
  const int64_t row_bytes =
      (plan.in_place ? plan.block_columns * plan.pixel : plan.row) * static_cast<int64_t>(sizeof(acc_t<T>));
  int64_t rows = smaller(most, larger(1, (kWindowBytes / row_bytes - plan.span_h) / plan.local_h));
  rows = larger(rows, smaller(most, ceil_div(12 * kTilePixels, plan.block_columns)));
  plan.splits = 1;
  int64_t blocks = ceil_div(plan.all_rows, rows) * plan.column_blocks * z.groups;
  if (blocks % threads != 0) {
    const int64_t pixels = plan.all_rows * plan.block_columns;
    if (blocks < threads && pixels < 8 * kTilePixels * threads && plan.panels >= threads) {
      plan.splits = threads;
    } else if (blocks < 8 * threads) {
      const int64_t target = ceil_div(ceil_div(blocks, threads) * threads, plan.column_blocks * z.groups);
      rows = ceil_div(plan.all_rows, smaller(target, plan.all_rows));
    }
  }
  plan.block_rows = rows;
  plan.row_blocks = ceil_div(plan.all_rows, rows);
}

template <class T>
void pack_weights(const Correlation<T>& z, const Plan<T>& plan, const Filter<T>& filter, acc_t<T>* weights) {
  const int64_t padded = plan.outputs_padded();
  const int64_t grain = larger(1, 8192 / (plan.panel_width * plan.depth));
  parallel_for(z.groups * plan.panels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t g = i / plan.panels, panel = i % plan.panels, first = panel * plan.panel_width;
      const int64_t width = plan.width_of(panel), count = smaller(width, plan.outputs - first);
      Filter<T> f = filter;
      f.data = z.weight + g * z.weight_group;
      pack_filter(f, first, count, width, weights + (g * padded + first) * plan.depth);
    }
  });
}

// The bias, each group's zero-padded to whole vectors.
template <class T> void pack_bias(const Correlation<T>& z, const Plan<T>& plan, acc_t<T>* bias) {
  for (int64_t g = 0, padded = plan.outputs_padded(); g < z.groups; ++g)
    for (int64_t j = 0; j < padded; ++j)
      bias[g * padded + j] = j < plan.outputs ? static_cast<acc_t<T>>(z.bias[g * plan.outputs + j]) : acc_t<T>(0);
}

// Where pixels of a block go, so that those of a class follow each other: order[pixel], first[class] .. first[class + 1).
template <class T>
void group_pixels(const Correlation<T>& z, const Plan<T>& plan, int64_t row_begin, int64_t row_end,
                  int64_t column_begin, int64_t column_end, int32_t* order, int32_t* first) {
  const int64_t across = plan.columns.count, classes = plan.rows.count * across;
  for (int64_t c = 0; c <= classes; ++c) first[c] = 0;
  for (int64_t row = row_begin; row < row_end; ++row)
    for (int64_t q = column_begin; q < column_end; ++q)
      ++first[plan.rows.of[row % z.rows] * across + plan.columns.of[q] + 1];
  for (int64_t c = 0; c < classes; ++c) first[c + 1] += first[c];
  int32_t next[kMostRanges * kMostRanges];
  for (int64_t c = 0; c < classes; ++c) next[c] = first[c];
  for (int64_t row = row_begin; row < row_end; ++row)
    for (int64_t q = column_begin; q < column_end; ++q)
      *order++ = next[plan.rows.of[row % z.rows] * across + plan.columns.of[q]]++;
}

// One block of output pixels, for panels [panel_begin, panel_end) of one group.
template <class T>
void run_block(const Correlation<T>& z, const Plan<T>& plan, int64_t row_begin, int64_t row_end, int64_t column_begin,
               int64_t column_end, int64_t group, int64_t panel_begin, int64_t panel_end) {
  using A = acc_t<T>;
  const int64_t columns = column_end - column_begin, classes = plan.rows.count * plan.columns.count;
  int32_t order[kMostPixels], first_pixel[kMostRanges * kMostRanges + 1];
  group_pixels(z, plan, row_begin, row_end, column_begin, column_end, order, first_pixel);
  const A* windows[kMostPixels];
  A* outs[kMostPixels];

  // Source windows: in place, or copied image by image.
  if (plan.in_place) {
    if constexpr (sizeof(T) == sizeof(A)) {
      for (int64_t row = row_begin, p = 0; row < row_end; ++row) {
        const int64_t h = row % z.rows * z.stride_h + plan.min_h;
        const A* start = z.source.data + ((row / z.rows * z.source.h + h) * z.source.w + plan.min_w) * plan.pixel +
                         group * plan.channels;
        for (int64_t q = column_begin; q < column_end; ++q) windows[order[p++]] = start + q * z.stride_w * plan.pixel;
      }
    }
  } else {
    const int64_t images = (row_end - 1) / z.rows - row_begin / z.rows + 1;
    const int64_t most_rows = (row_end - row_begin) * plan.local_h + images * (plan.span_h + 1);
    A* copy = scratch<A>(Slot::family_1, most_rows * plan.row);
    for (int64_t row = row_begin, p = 0; row < row_end;) {
      const int64_t i = row % z.rows, count = smaller(row_end - row, z.rows - i);
      const Window window{row / z.rows,
                          i * z.stride_h + plan.min_h,
                          (count - 1) * plan.local_h + plan.span_h + 1,
                          plan.copy_h,
                          column_begin * z.stride_w + plan.min_w,
                          (columns - 1) * plan.local_w + plan.span_w + 1,
                          plan.copy_w};
      copy_window(z.source, window, group * plan.channels, plan.channels, copy, plan.row, plan.pixel);
      for (int64_t k = 0; k < count; ++k)
        for (int64_t q = 0; q < columns; ++q)
          windows[order[p++]] = copy + k * plan.local_h * plan.row + q * plan.local_w * plan.pixel;
      copy += window.rows * plan.row;
      row += count;
    }
  }

  // Sums go straight to the output where that holds sums, channel after channel, and is written only once (its
  // pixels lie far apart, often a power of two, where a cache keeps few of them).
  const bool direct = sizeof(T) == sizeof(A) && z.output_channels_last && plan.block_count == 1;
  A* sums = nullptr;
  if constexpr (sizeof(T) == sizeof(A)) {
    if (direct)
      for (int64_t row = row_begin, p = 0; row < row_end; ++row) {
        const int64_t h = z.start_h + row % z.rows * z.step_h;
        for (int64_t q = column_begin; q < column_end; ++q)
          outs[order[p++]] = z.output +
                             ((row / z.rows * z.out_h + h) * z.out_w + z.start_w + q * z.step_w) * z.out_channels +
                             group * plan.outputs;
      }
  }
  const int64_t padded = plan.outputs_padded();
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const int64_t first = panel * plan.panel_width, width = plan.width_of(panel),
                  count = smaller(width, plan.outputs - first);
    const A* weights = plan.weights + (group * padded + first) * plan.depth;
    const A* bias = z.bias ? plan.bias + group * padded + first : nullptr;
    const bool here = direct && count == width;
    A* own[kMostPixels];
    if (!here) {
      if (!sums) sums = scratch<A>(Slot::family_2, kMostPixels * kTileVectors * kLanes<A>);
      for (int64_t p = 0, pixels = first_pixel[classes]; p < pixels; ++p) own[order[p]] = sums + p * width;
    }
    for (int64_t block = 0; block < plan.block_count; ++block, weights += plan.block_depth * width) {
      const A* add_bias = block + 1 == plan.block_count ? bias : nullptr;
      for (int64_t c = 0; c < classes; ++c) {
        const PieceTable& table = plan.classes[c];
        const int64_t pieces = table.starts[block + 1] - table.starts[block];
        if (pieces == 0 && block > 0 && !add_bias) continue;
        for (int64_t p = first_pixel[c]; p < first_pixel[c + 1]; p += kTilePixels) {
          const auto tile = correlate_tile_for<A>(smaller(kTilePixels, first_pixel[c + 1] - p), width / kLanes<A>);
          tile(table.list + table.starts[block], pieces, windows + p, weights, (here ? outs : own) + p,
               here ? first : 0, block > 0, add_bias);
        }
      }
    }
    if (!here)
      write_out(z, sums, width, group * plan.outputs + first, count, row_begin, row_end, column_begin, columns);
  }
  if (z.residual || z.activation) {
    const int64_t first = panel_begin * plan.panel_width, end = smaller(panel_end * plan.panel_width, plan.outputs);
    finish_block(z, group * plan.outputs + first, end - first, row_begin, row_end, column_begin, columns);
  }
}

template <class T> bool tiles_over_planar(const Correlation<T>& z) {
  return sizeof(T) == 2 && z.source.channels >= kTile && z.out_channels >= 3 && uses_tiles<T>();
}

template <class T> bool is_tiled(const Correlation<T>& z, const Plan<T>& plan) {
  if (z.taps_h > kMostTaps || z.taps_w > kMostTaps) return false;
  return tiles_pay<T>(plan.all_rows * z.columns * plan.outputs * plan.depth, plan.outputs,
                      plan.channels < kMergedChannels ? z.taps_w * plan.channels : plan.channels);
}

// One call by tiles: its strips of weights, where a step's cells are, and which blocks have to be computed by vectors.
struct TilePlan {
  Field field;
  int64_t panels, strip;  // of 32 output channels in a group; bytes
  const char* strips;
  const float* bias;  // each group's zero-padded to whole panels, or null
  const int64_t* offsets;  // of steps x taps
  char* failed;  // [block][group]
};

#if DLKERN_TILE_CODE
// A panel's sums at positions [p, p + count), to the output or, where that is planar, to pixels[..][32] of the block.
// Whether they are exact.
template <class T>
bool finish_positions(const Correlation<T>& z, const TilePlan& plan, const Block& block, int64_t p, int64_t count,
                      const float* sums, const float* bias, int64_t first, int64_t channels, float* pixels) {
  const Field& f = plan.field;
  const vfloat bias0 = bias ? load(bias) : vfloat{}, bias1 = bias ? load(bias + kTile) : vfloat{};
  vint32 most{};
  bool any = false;
  for (int64_t end = p + count; p < end;) {
    const int64_t row = p / f.pitch, column = p % f.pitch, image = row / f.image_pitch, i = row % f.image_pitch;
    const int64_t run = smaller(end - p, f.pitch - column),
                  some = i < block.rows ? smaller(run, block.columns - column) : 0;
    const auto each = [&](auto&& put) __attribute__((always_inline)) {
      vint32 top = most;  // a register, whatever the stores may alias
      for (int64_t j = 0; j < some; ++j) {
        const vfloat low = load(sums + j * kStrip), high = load(sums + j * kStrip + kTile);
        const vint32 a = (vint32)low & 0x7fffffff, b = (vint32)high & 0x7fffffff;
        top = a > top ? a : top;
        top = b > top ? b : top;
        put(j, low + bias0, high + bias1);
      }
      most = top;
    };
    if (some > 0 && z.output_channels_last) {
      const int64_t h = z.start_h + (block.row + i) * z.step_h, w = z.start_w + (block.column + column) * z.step_w;
      const int64_t step = z.step_w * z.out_channels;
      T* out = z.output + (((block.image + image) * z.out_h + h) * z.out_w + w) * z.out_channels + first;
      each([&](int64_t j, vfloat low, vfloat high) { store_pair(out + j * step, low, high, channels); });
    } else if (some > 0) {
      float* to = pixels + ((image * block.rows + i) * block.columns + column) * kStrip;
      each([&](int64_t j, vfloat low, vfloat high) {
        store(to + j * kStrip, low);
        store(to + j * kStrip + kTile, high);
      });
    }
    any = any || some > 0;
    sums += run * kStrip;
    p += run;
  }
  return !any || is_exact(most);
}

// One block, panels [panel_begin, panel_end) of a group.
template <class T>
void run_tile_block(const Correlation<T>& z, const TilePlan& plan, int64_t index, int64_t group, int64_t panel_begin,
                    int64_t panel_end) {
  const Field& f = plan.field;
  const Block block = f.block(index, z.source.n);
  const int64_t outputs = z.out_channels / z.groups, steps = f.steps * f.taps, positions = f.positions(block);
  const int64_t cells = f.steps * step_cells_bytes<T>(f), apart = f.phases() * f.plane;
  char* memory = scratch<char>(Slot::tiles_b, cells + line_bytes(z.source, f));
  float* pixels = z.output_channels_last
                      ? nullptr
                      : scratch<float>(Slot::tiles_c, block.images * block.rows * block.columns * kStrip);
  alignas(64) float sums[kStrip * kStrip] = {}, spare[kStrip * kStrip] = {};
  copy_cells(z.source, f, block, group * f.channels, 0, f.steps, memory, memory + cells);
  // Sums are finished while the tiles make the next ones.
  int64_t waiting = -1, waiting_panel = 0;
  const auto finish_waiting = [&] {
    if (waiting < 0) return true;
    const int64_t first = waiting_panel * kStrip;
    const float* bias = plan.bias ? plan.bias + (group * plan.panels + waiting_panel) * kStrip : nullptr;
    const bool exact = finish_positions(z, plan, block, waiting, smaller(kStrip, positions - waiting), sums, bias,
                                        group * outputs + first, smaller(kStrip, outputs - first), pixels);
    waiting = -1;
    return exact;
  };
  const auto multiply = [&](int64_t panel, int64_t p) {
    const char* strip = plan.strips + (group * plan.panels + panel) * plan.strip;
    bool exact = true;
    with_tiles(positions - p, outputs - panel * kStrip, [&]<int ROWS, int COLUMNS>() {
      multiply_cells<ROWS, COLUMNS, T>(memory + p * kCell, apart, plan.offsets, steps, strip, sums, spare,
                                       [&] { exact = finish_waiting(); });
    });
    waiting = p, waiting_panel = panel;
    return exact;
  };
  bool exact = true;
  const Tiles tiles;
  if (z.output_channels_last && plan.panels * plan.strip <= kStripBytes) {  // pixels are written whole
    for (int64_t p = 0; p < positions && exact; p += kStrip)
      for (int64_t panel = panel_begin; panel < panel_end && exact; ++panel) exact = multiply(panel, p);
    exact = exact && finish_waiting();
  } else {
    for (int64_t panel = panel_begin; panel < panel_end && exact; ++panel) {
      for (int64_t p = 0; p < positions && exact; p += kStrip) exact = multiply(panel, p);
      exact = exact && finish_waiting();
      const int64_t first = panel * kStrip;
      for (int64_t i = 0; exact && !z.output_channels_last && i < block.images; ++i) {
        const int64_t row = (block.image + i) * z.rows + block.row;
        write_out(z, pixels + i * block.rows * block.columns * kStrip, kStrip, group * outputs + first,
                  smaller(kStrip, outputs - first), row, row + block.rows, block.column, block.columns);
      }
    }
  }
  if (!exact) {
    __atomic_store_n(plan.failed + index * z.groups + group, 1, __ATOMIC_RELAXED);
    return;
  }
  if (z.residual || z.activation) {
    const int64_t first = panel_begin * kStrip, end = smaller(panel_end * kStrip, outputs);
    for (int64_t i = 0; i < block.images; ++i) {
      const int64_t row = (block.image + i) * z.rows + block.row;
      finish_block(z, group * outputs + first, end - first, row, row + block.rows, block.column, block.columns);
    }
  }
}

// The weights as right strips, [group][panel][step][tap].
template <class T>
void pack_strips(const Correlation<T>& z, const Plan<T>& vectors, const TilePlan& plan, char* strips, int64_t* lists) {
  const Field& f = plan.field;
  const int64_t taps = z.taps_h * z.taps_w;
  const bool straight = !f.merged && (z.weight_in == 1 || z.weight_out == 1);
  // Where neither side of a matrix is consecutive, some channels at a time become a matrix of floats first.
  const int64_t some = f.merged ? vectors.channels : smaller(kTileStep, vectors.channels);
  const Filter<T> all = describe_filter(z, some, lists, lists + taps);
  parallel_for(z.groups * plan.panels, 1 + 65536 / plan.strip, [&](int64_t begin, int64_t end) {
    float* rows = straight ? nullptr : scratch<float>(Slot::tiles_b, taps * some * kStrip);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t g = i / plan.panels, first = i % plan.panels * kStrip,
                    count = smaller(kStrip, vectors.outputs - first);
      const T* weight = z.weight + g * z.weight_group;
      char* to = strips + i * plan.strip;
      for (int64_t s = 0; s < f.steps; ++s) {
        const int64_t c = s * kTileStep, values = smaller(kTileStep, f.depth - c);
        if (rows && (s == 0 || !f.merged)) {
          Filter<T> filter = all;
          if (!f.merged) filter.in_channels = values;
          filter.run = z.kernel_size * (filter.by_channel ? 1 : filter.in_channels);
          filter.data = weight + (f.merged ? 0 : c * z.weight_in);
          pack_filter(filter, first, count, kStrip, rows);
        }
        for (int64_t t = 0; t < f.taps; ++t, to += kStepBytes<T>) {
          const int64_t row = f.merged ? t * f.depth + c : t * some;
          const Lines<T> lines{weight + first * z.weight_out + c * z.weight_in + all.taps[t], z.weight_out,
                               z.weight_in};
          if (rows)
            pack_filter_step<T>(rows + row * kStrip, kStrip, values, count, to);
          else if constexpr (kHasPairs<T>)
            pack_pairs<false>(lines, count, values, to);
          else
            pack_strip<false>(lines, count, values, to);
        }
      }
    }
  });
}

// Strips of weights whose cells are channels of one pixel, which any geometry can use.
template <class T> bool keeps_strips(const Plan<T>& vectors) {
  return vectors.channels >= kMergedChannels && uses_tiles<T>();
}
template <class T> TilePlan plan_kept_strips(const Correlation<T>& z, const Plan<T>& vectors) {
  TilePlan plan{};
  plan.field.depth = vectors.channels;
  plan.field.steps = ceil_div(vectors.channels, kTileStep);
  plan.field.taps = z.taps_h * z.taps_w;
  plan.panels = ceil_div(vectors.outputs, kStrip);
  plan.strip = plan.field.steps * plan.field.taps * kStepBytes<T>;
  return plan;
}

// By tiles. Whether all blocks are done: not where the tiles' sums are not exact.
template <class T> bool correlate_tiles(const Correlation<T>& z, const Plan<T>& vectors, TilePlan& plan) {
  const int64_t threads = num_threads();
  plan.field = plan_field(z.source.n, z.rows, z.columns, vectors.channels, z.source.h, z.source.w, z.tap_h, z.taps_h,
                          z.stride_h, z.tap_w, z.taps_w, z.stride_w, kParts<T>, 0);
  const Field& f = plan.field;
  const int64_t steps = f.steps * f.taps, blocks = f.blocks() * z.groups;
  plan.panels = ceil_div(vectors.outputs, kStrip);
  plan.strip = steps * kStepBytes<T>;
  const int64_t panels = z.groups * plan.panels, lists = z.taps_h * z.taps_w + z.kernel_size * vectors.channels;
  const bool kept = z.packed && keeps_strips(vectors);
  Arena arena{scratch<char>(Slot::tiles_a, panels * (plan.strip + 4 * kStrip) + 8 * (steps + lists) + blocks + 5 * 64)};
  char* strips = arena.take<char>(panels * plan.strip);
  float* bias = arena.take<float>(panels * kStrip);
  int64_t* offsets = arena.take<int64_t>(steps);
  plan.failed = arena.take<char>(blocks);
  plan.strips =
      kept ? reinterpret_cast<const char*>(z.packed + z.groups * vectors.outputs_padded() * vectors.depth) : strips;
  plan.offsets = offsets;
  plan.bias = z.bias ? bias : nullptr;
  for (int64_t s = 0; s < f.steps; ++s)
    for (int64_t t = 0; t < f.taps; ++t) offsets[s * f.taps + t] = s * step_cells_bytes<T>(f) + f.tap_offset(t);
  if (z.bias)
    for (int64_t i = 0; i < panels * kStrip; ++i) {
      const int64_t k = i % (plan.panels * kStrip);
      bias[i] = k < vectors.outputs ? static_cast<float>(z.bias[i / (plan.panels * kStrip) * vectors.outputs + k]) : 0;
    }
  std::memset(plan.failed, 0, static_cast<size_t>(blocks));
  if (!kept) pack_strips(z, vectors, plan, strips, arena.take<int64_t>(lists));
  // Few blocks: their panels are shared out, too.
  const int64_t splits = blocks % threads == 0 || blocks >= 8 * threads ? 1 : smaller(plan.panels, threads);
  parallel_for(blocks * splits, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t split = task % splits, block = task / splits;
      run_tile_block(z, plan, block / z.groups, block % z.groups, split * plan.panels / splits,
                     (split + 1) * plan.panels / splits);
    }
  });
  return std::memchr(plan.failed, 1, static_cast<size_t>(blocks)) == nullptr;
}

// By vectors, the blocks that correlate_tiles did not do.
template <class T> void correlate_failed(const Correlation<T>& z, const Plan<T>& plan, const TilePlan& tiles) {
  const Field& f = tiles.field;
  parallel_for(f.blocks() * z.groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (!tiles.failed[i]) continue;
      const Block b = f.block(i / z.groups, z.source.n);
      const int64_t row_begin = b.image * z.rows + b.row, row_end = row_begin + (b.images - 1) * z.rows + b.rows,
                    column_end = b.column + b.columns;
      for (int64_t row = row_begin; row < row_end; row += plan.block_rows)
        for (int64_t column = b.column; column < column_end; column += plan.block_columns)
          run_block(z, plan, row, smaller(row + plan.block_rows, row_end), column,
                    smaller(column + plan.block_columns, column_end), i % z.groups, 0, plan.panels);
    }
  });
}
#endif

template <class T> void correlate(const Correlation<T>& z) {
  using A = acc_t<T>;
  uint8_t* ranges = reinterpret_cast<uint8_t*>(scratch<char>(Slot::family_4, z.rows + z.columns));
  Plan<T> plan;
  plan.rows = find_borders(z.rows, z.stride_h, z.source.h, z.tap_h, z.taps_h, ranges);
  plan.columns = find_borders(z.columns, z.stride_w, z.source.w, z.tap_w, z.taps_w, ranges + z.rows);
  plan_panels(z, plan);
  plan_source(z, plan);
  plan_blocks(z, plan);
  [[maybe_unused]] TilePlan tiles;
  [[maybe_unused]] const bool tiled = is_tiled(z, plan);
  if constexpr (kHasTileCode<T>) {
    if (tiled && correlate_tiles(z, plan, tiles)) return;
  }
  if constexpr (std::is_same_v<T, float>) {
    if (!tiled && winograd::correlate(z, plan.rows, plan.columns)) return;
  }

  plan.block_depth = sum_depth(
      plan.depth, static_cast<double>(plan.all_rows * z.columns) * static_cast<double>(z.out_channels * plan.depth));
  plan.block_count = ceil_div(plan.depth, plan.block_depth);
  const int64_t taps = z.taps_h * z.taps_w, classes = plan.rows.count * plan.columns.count;
  const int64_t most_pieces = taps + plan.block_count;
  const int64_t table = z.kernel_size * plan.channels, padded = z.groups * plan.outputs_padded();
  const int64_t packing = z.packed ? 0 : 8 * (taps + table) + static_cast<int64_t>(sizeof(A)) * padded * plan.depth;
  Arena arena{scratch<char>(Slot::family_0, 64 * 8 +
                                                classes * (16 + 24 * most_pieces + 4 * (plan.block_count + 1) + 128) +
                                                static_cast<int64_t>(sizeof(A)) * padded + packing)};
  PieceTable* tables = arena.take<PieceTable>(classes);
  WindowShape shape{plan.channels, plan.pixel, plan.row, z.taps_h,
                    z.taps_w,      z.tap_h,    z.tap_w,  plan.pixel == plan.channels};
  for (int64_t s = 1; s < z.taps_w; ++s) shape.merged = shape.merged && z.tap_w[s] == z.tap_w[s - 1] + 1;
  for (int64_t c = 0; c < classes; ++c) {
    tables[c] = {arena.take<Piece>(most_pieces), arena.take<int32_t>(plan.block_count + 1)};
    plan_pieces(shape, plan.rows.ranges[c / plan.columns.count], plan.columns.ranges[c % plan.columns.count],
                plan.block_depth, plan.block_count, tables[c].list, tables[c].starts);
  }
  plan.classes = tables;
  if (z.bias) {
    A* bias = arena.take<A>(padded);
    pack_bias(z, plan, bias);
    plan.bias = bias;
  }
  plan.weights = z.packed;
  if (!z.packed) {
    int64_t* tap_offsets = arena.take<int64_t>(taps);
    const Filter<T> filter = describe_filter(z, plan.channels, tap_offsets, arena.take<int64_t>(table));
    A* weights = arena.take<A>(padded * plan.depth);
    pack_weights(z, plan, filter, weights);
    plan.weights = weights;
  }

  if constexpr (kHasTileCode<T>) {
    if (tiled) return correlate_failed(z, plan, tiles);
  }
  const int64_t tasks = plan.row_blocks * plan.column_blocks * z.groups * plan.splits;
  const double work = static_cast<double>(plan.all_rows * z.columns) * static_cast<double>(z.out_channels * plan.depth);
  parallel_for(tasks, work < kWorthWaking ? tasks : 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t split = task % plan.splits, block = task / plan.splits;
      const int64_t group = block % z.groups, place = block / z.groups;
      const int64_t row = place / plan.column_blocks * plan.block_rows,
                    column = place % plan.column_blocks * plan.block_columns;
      run_block(z, plan, row, smaller(row + plan.block_rows, plan.all_rows), column,
                smaller(column + plan.block_columns, z.columns), group, split * plan.panels / plan.splits,
                (split + 1) * plan.panels / plan.splits);
    }
  });
}

// What forward's correlation reads of the weight; kernel_h and kernel_w stay to be set.
template <class T> void describe_weight(const ConvShape& z, const T* weight, bool channels_last, Correlation<T>& c) {
  const int64_t channels = z.c / z.groups;
  c.out_channels = z.k;
  c.taps_h = z.r, c.taps_w = z.s;
  c.weight = weight;
  c.weight_out = channels * z.r * z.s;
  c.weight_in = channels_last ? 1 : z.r * z.s;
  c.weight_h = channels_last ? z.s * channels : z.s;
  c.weight_w = channels_last ? channels : 1;
  c.weight_group = z.k / z.groups * c.weight_out;
  c.kernel_size = z.r * z.s;
  c.groups = z.groups;
}

template <class T> int64_t pack(const ConvPackArgs<T>& args) {
  const ConvShape& z = args.shape;
  Correlation<T> c{};
  describe_weight(z, args.weight, args.weight_channels_last, c);
  c.source.channels = z.c;
  Plan<T> plan;
  plan_panels(c, plan);
  const int64_t taps = z.r * z.s, count = z.groups * plan.outputs_padded() * plan.depth;
  int64_t* lists = scratch<int64_t>(Slot::family_3, z.r + z.s + taps + taps * plan.channels);
  int64_t *kernel_h = lists, *kernel_w = kernel_h + z.r, *tap_offsets = kernel_w + z.s;
  for (int64_t r = 0; r < z.r; ++r) kernel_h[r] = r;
  for (int64_t s = 0; s < z.s; ++s) kernel_w[s] = s;
  c.kernel_h = kernel_h, c.kernel_w = kernel_w;
  if (args.packed)
    pack_weights(c, plan, describe_filter(c, plan.channels, tap_offsets, tap_offsets + taps), args.packed);
  if constexpr (kHasTileCode<T>) {
    if (keeps_strips(plan)) {  // behind the vectors' weights
      const TilePlan tiles = plan_kept_strips(c, plan);
      if (args.packed) pack_strips(c, plan, tiles, reinterpret_cast<char*>(args.packed + count), tap_offsets);
      return count + z.groups * tiles.panels * tiles.strip / static_cast<int64_t>(sizeof(float));
    }
  }
  return count;
}

// Residual and activation over the whole output, behind kernels that do not know of them.
template <class T> void finish_all(const ConvForwardArgs<T>& args) {
  if (!args.residual && !args.activation) return;
  const ConvShape& z = args.shape;
  constexpr int64_t kRun = 16384;
  const int64_t total = z.n * z.k * z.p * z.q;
  parallel_for(ceil_div(total, kRun), 1, [&](int64_t begin, int64_t end) {
    const int64_t at = begin * kRun;
    finish_run(args.output + at, args.residual ? args.residual + at : nullptr, smaller(end * kRun, total) - at,
               args.activation);
  });
}

template <class T> void forward(const ConvForwardArgs<T>& args) {
  if (depthwise_forward(args) || (!tiles_over_groups<T>(args.shape) && grouped_forward(args))) return finish_all(args);
  const ConvShape& z = args.shape;
  int64_t* lists = scratch<int64_t>(Slot::family_3, 2 * (z.r + z.s));
  int64_t *tap_h = lists, *kernel_h = tap_h + z.r, *tap_w = kernel_h + z.r, *kernel_w = tap_w + z.s;
  for (int64_t r = 0; r < z.r; ++r) tap_h[r] = r * z.dilation_h - z.pad_h, kernel_h[r] = r;
  for (int64_t s = 0; s < z.s; ++s) tap_w[s] = s * z.dilation_w - z.pad_w, kernel_w[s] = s;
  Correlation<T> c{};
  describe_weight(z, args.weight, args.weight_channels_last, c);
  c.source = {args.input, args.input_channels_last, z.n, z.c, z.h, z.w};
  c.output = args.output;
  c.output_channels_last = args.output_channels_last;
  c.out_h = c.rows = z.p, c.out_w = c.columns = z.q;
  c.step_h = c.step_w = 1;
  c.stride_h = z.stride_h, c.stride_w = z.stride_w;
  c.tap_h = tap_h, c.tap_w = tap_w, c.kernel_h = kernel_h, c.kernel_w = kernel_w;
  c.bias = args.bias;
  c.packed = args.packed;
  if (is_planar(c) && !tiles_over_planar(c)) {
    correlate_planar(c);
    return finish_all(args);
  }
  c.residual = args.residual;
  c.activation = args.activation;
  correlate(c);
}

// The taps that reach input positions of one residue, ascending in the grad_output position they read.
int64_t residue_taps(int64_t residue, int64_t taps, int64_t stride, int64_t padding, int64_t dilation, int64_t* tap,
                     int64_t* kernel) {
  int64_t count = 0;
  for (int64_t r = taps - 1; r >= 0; --r) {
    const int64_t reach = residue + padding - r * dilation;  // stride times the position read
    if (reach % stride == 0) tap[count] = reach / stride, kernel[count++] = r;
  }
  return count;
}

// Whether some residues of the stride are reached by no tap.
bool leaves_gaps(int64_t stride, int64_t dilation, int64_t taps) {
  for (int64_t a = 0; a < stride; ++a) {
    bool reached = false;
    for (int64_t r = 0; r < taps && r < stride; ++r) reached = reached || r * dilation % stride == a;
    if (!reached) return true;
  }
  return false;
}

// Every channel of x filled with, or increased by, its bias (zero where there is none).
template <class T> void apply_bias(const ConvBackwardInputArgs<T>& args, bool fill) {
  const ConvShape& z = args.shape;
  const int64_t inner = args.grad_input_channels_last ? z.c : z.h * z.w, lines = z.n * z.c * z.h * z.w / inner;
  parallel_for(lines, 1 + 16384 / inner, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      T* to = args.grad_input + line * inner;
      for (int64_t i = 0; i < inner; ++i) {
        const int64_t channel = args.grad_input_channels_last ? i : line % z.c;
        const acc_t<T> bias = args.bias ? static_cast<acc_t<T>>(args.bias[channel]) : acc_t<T>(0);
        to[i] = static_cast<T>(fill ? bias : static_cast<acc_t<T>>(to[i]) + bias);
      }
    }
  });
}

template <class T> void backward_input(const ConvBackwardInputArgs<T>& args) {
  if (depthwise_backward_input(args) || (!tiles_over_groups<T>(args.shape) && grouped_backward_input(args))) {
    if (args.bias) apply_bias(args, false);
    return;
  }
  const ConvShape& z = args.shape;
  const int64_t channels = z.c / z.groups;
  const bool last = args.weight_channels_last;
  const bool gaps = leaves_gaps(z.stride_h, z.dilation_h, z.r) || leaves_gaps(z.stride_w, z.dilation_w, z.s);
  if (gaps && args.bias) {
    apply_bias(args, true);
  } else if (gaps) {
    constexpr int64_t kRun = 16384;
    const int64_t total = z.n * z.c * z.h * z.w;
    parallel_for(ceil_div(total, kRun), 4, [&](int64_t begin, int64_t end) {
      std::memset(static_cast<void*>(args.grad_input + begin * kRun), 0,
                  sizeof(T) * static_cast<size_t>(smaller(end * kRun, total) - begin * kRun));
    });
  }
  for (int64_t a = 0; a < smaller(z.stride_h, z.h); ++a)
    for (int64_t b = 0; b < smaller(z.stride_w, z.w); ++b) {
      int64_t* lists = scratch<int64_t>(Slot::family_3, 2 * (z.r + z.s));
      int64_t *tap_h = lists, *kernel_h = tap_h + z.r, *tap_w = kernel_h + z.r, *kernel_w = tap_w + z.s;
      Correlation<T> c{};
      c.taps_h = residue_taps(a, z.r, z.stride_h, z.pad_h, z.dilation_h, tap_h, kernel_h);
      c.taps_w = residue_taps(b, z.s, z.stride_w, z.pad_w, z.dilation_w, tap_w, kernel_w);
      if (c.taps_h == 0 || c.taps_w == 0) continue;
      c.source = {args.grad_output, args.grad_output_channels_last, z.n, z.k, z.p, z.q};
      c.output = args.grad_input;
      c.output_channels_last = args.grad_input_channels_last;
      c.out_channels = z.c, c.out_h = z.h, c.out_w = z.w;
      c.rows = ceil_div(z.h - a, z.stride_h), c.columns = ceil_div(z.w - b, z.stride_w);
      c.start_h = a, c.start_w = b, c.step_h = z.stride_h, c.step_w = z.stride_w;
      c.stride_h = c.stride_w = 1;
      c.tap_h = tap_h, c.tap_w = tap_w, c.kernel_h = kernel_h, c.kernel_w = kernel_w;
      c.weight = args.weight;
      c.weight_in = channels * z.r * z.s;
      c.weight_out = last ? 1 : z.r * z.s;
      c.weight_h = last ? z.s * channels : z.s;
      c.weight_w = last ? channels : 1;
      c.weight_group = z.k / z.groups * c.weight_in;
      c.kernel_size = z.r * z.s;
      c.bias = args.bias;
      c.groups = z.groups;
      is_planar(c) && !tiles_over_planar(c) ? correlate_planar(c) : correlate(c);
    }
}

}  // namespace

#define DLKERN_DEFINE_CONV(T)                                             \
  int64_t conv2d_pack(const ConvPackArgs<T>& args) { return pack(args); } \
  void conv2d_forward(const ConvForwardArgs<T>& args) { forward(args); }  \
  void conv2d_backward_input(const ConvBackwardInputArgs<T>& args) { backward_input(args); }
DLKERN_DEFINE_CONV(float)
DLKERN_DEFINE_CONV(double)
DLKERN_DEFINE_CONV(bfloat16)
DLKERN_DEFINE_CONV(float16)
#undef DLKERN_DEFINE_CONV

template CorrelateTile<float> correlate_tile_for(int64_t, int64_t);
template CorrelateTile<double> correlate_tile_for(int64_t, int64_t);

}  // namespace dlkern::cpu::DLKERN_ISA
