// The gradient of conv2d's weight on AMX's tiles: output channels x channels of a tap, summed over positions (conv_tiles.h).
//
// The left side is grad_output's cells turned into strips, zero between the output pixels. On the right a word holds one
// channel of two positions 16 apart; such words are made of the cells once, for every position, so that a tap's right
// side is again where the tap moves it. Sums of a block's positions are added to a gradient in memory.
#pragma once
#include "conv.h"
#include "conv_tiles.h"
#include "parallel.h"

namespace dlkern::cpu::DLKERN_ISA {

template <class T> inline bool weight_is_tiled(const ConvShape& z) {
  const int64_t outputs = z.k / z.groups, channels = z.c / z.groups;
  if (z.r > kMostTaps || z.s > kMostTaps) return false;
  return tiles_pay<T>(z.n * z.p * z.q * outputs * channels * z.r * z.s, outputs,
                      channels < kMergedChannels ? z.s * channels : channels);
}

#if DLKERN_TILE_CODE
namespace tiles_detail {

// The low halves of two vectors of words, and the high ones.
inline void store_halves(vuint32 a, vuint32 b, char* low, char* high) {
  const vuint32 l = (a & 0xffffu) | (b << 16), h = (a >> 16) | (b & 0xffff0000u);
  std::memcpy(low, &l, sizeof l);
  std::memcpy(high, &h, sizeof h);
}
inline vuint32 load_words(const char* from) {
  vuint32 v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// Cells of `positions` (a multiple of 32) as steps of a left strip: lines, whose order is that of channels.
template <class T> inline void turn_cells(const char* cells, int64_t apart, int64_t positions, char* to) {
  for (int64_t p = 0; p < positions; p += kTileStep)
    for (int64_t part = 0; part < kParts<T>; ++part, to += 2 * kTileBytes) {
      const float* from = reinterpret_cast<const float*>(cells + part * apart + p * kCell);
      vfloat a[kTile], b[kTile];
      load_turned(from, kTile, a);
      load_turned(from + kTile * kTile, kTile, b);
      constexpr int64_t every = kHasPairs<T> ? 2 * kCell : kCell, apart_lines = kHasPairs<T> ? kCell : kTileBytes;
#pragma GCC unroll 16
      for (int64_t r = 0; r < kTile; ++r)
        store_halves((vuint32)a[r], (vuint32)b[r], to + r * every, to + r * every + apart_lines);
    }
}

// Words of cell i and cell i + 16: those of channels [0, 16) to `to`, those of [16, 32) `plane` bytes on.
template <class T> inline void pair_cells(const char* cells, int64_t count, int64_t plane, char* to) {
  using halves [[gnu::vector_size(kCell)]] = uint16_t;
  halves low, high;
  for (int l = 0; l < kTileStep; ++l)
    low[l] = static_cast<uint16_t>(l / 2 + l % 2 * kTileStep), high[l] = static_cast<uint16_t>(low[l] + kTile);
  for (int64_t i = 0; i < count; ++i, cells += kCell, to += kCell) {
    const vuint32 a = load_words(cells), b = load_words(cells + kTile * kCell);
    if constexpr (kHasPairs<T>) {
      const halves first = __builtin_shuffle((halves)a, (halves)b, low),
                   second = __builtin_shuffle((halves)a, (halves)b, high);
      std::memcpy(to, &first, sizeof first);
      std::memcpy(to + plane, &second, sizeof second);
    } else {
      store_halves(a, b, to, to + plane);
    }
  }
}

}  // namespace tiles_detail

template <class T> struct WeightTiles {
  Field x, y;
  int64_t panels, blocks;
  int64_t pixel_tasks, channel_tasks;
  static constexpr int64_t area = kStrip * kStrip;
  // A gradient is [group][panel of 32 output channels][step][tap][32][32].
  int64_t panel_size() const { return x.steps * x.taps * area; }
};

template <class T> WeightTiles<T> plan_weight_tiles(const ConvShape& z) {
  WeightTiles<T> plan{};
  int64_t tap_h[kMostTaps], tap_w[kMostTaps];
  for (int64_t r = 0; r < z.r; ++r) tap_h[r] = r * z.dilation_h - z.pad_h;
  for (int64_t s = 0; s < z.s; ++s) tap_w[s] = s * z.dilation_w - z.pad_w;
  const int64_t outputs = z.k / z.groups;
  plan.x = plan_field(z.n, z.p, z.q, z.c / z.groups, z.h, z.w, tap_h, z.r, z.stride_h, tap_w, z.s, z.stride_w,
                      kParts<T>, outputs);
  plan.panels = ceil_div(outputs, kStrip);
  plan.y = plan.x;
  const int64_t zero = 0;
  plan.y.h = plan.y.w = find_axis(&zero, 1, 1);
  plan.y.merged = false, plan.y.only_block = true;
  plan.y.channels = plan.y.depth = outputs;
  plan.y.steps = plan.panels;
  plan.y.taps = 1;
  const Field& f = plan.x;
  plan.y.plane = ceil_div(f.plane / kCell, kStrip) * kStrip * kCell;
  plan.blocks = f.blocks();
  const int64_t threads = num_threads(), bytes = z.groups * plan.panels * plan.panel_size() * 4;
  const bool many_pixels = plan.blocks >= 2 * threads && bytes <= (z.r * z.s == 1 ? 4 : 1) * (1 << 20);
  plan.pixel_tasks = many_pixels || z.groups * plan.panels < threads ? smaller(threads, plan.blocks) : 1;
  plan.channel_tasks = plan.pixel_tasks > 1 ? 1 : smaller(threads, z.groups * plan.panels);
  return plan;
}

// Blocks [block_begin, block_end) for units (group, panel) [unit_begin, unit_end).
template <class T>
void sum_blocks(const ConvBackwardWeightArgs<T>& args, const WeightTiles<T>& plan, int64_t block_begin,
                int64_t block_end, int64_t unit_begin, int64_t unit_end, float* gradient) {
  using namespace tiles_detail;
  constexpr int64_t parts = kParts<T>, area = kStrip * kStrip;
  const ConvShape& z = args.shape;
  const Field &f = plan.x, &y = plan.y;
  const Images<T> input{args.input, args.input_channels_last, z.n, z.c, z.h, z.w};
  const Images<T> output{args.grad_output, args.grad_output_channels_last, z.n, z.k, z.p, z.q};
  const int64_t cells_size = larger(step_cells_bytes<T>(f), step_cells_bytes<T>(y));
  const int64_t most_steps = y.plane / kCell / kTileStep, planes = parts * f.phases();
  const int64_t line = larger(line_bytes(input, f), line_bytes(output, y));
  char* cells =
      scratch<char>(Slot::tiles_b, cells_size + 2 * planes * f.plane + plan.panels * most_steps * kStepBytes<T> + line);
  char* pairs = cells + cells_size;
  char* strips = pairs + 2 * planes * f.plane;
  char* lines = strips + plan.panels * most_steps * kStepBytes<T>;
  alignas(64) float sums[area];
  float* waiting = nullptr;  // where sums have to be added
  const auto add_waiting = [&] {
    if (waiting) add_strip(sums, waiting);
    waiting = nullptr;
  };
  const Tiles tiles;
  for (int64_t group = unit_begin / plan.panels; group * plan.panels < unit_end; ++group) {
    const int64_t panel_begin = larger(unit_begin - group * plan.panels, 0),
                  panel_end = smaller(unit_end - group * plan.panels, plan.panels);
    float* to_group = gradient + group * plan.panels * plan.panel_size();
    std::memset(to_group + panel_begin * plan.panel_size(), 0,
                static_cast<size_t>((panel_end - panel_begin) * plan.panel_size()) * sizeof(float));
    for (int64_t i = block_begin; i < block_end; ++i) {
      const Block block = f.block(i, z.n);
      const int64_t steps = ceil_div(f.positions(block), kTileStep), chains = ceil_div(steps, kConvSteps<T>);
      for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
        copy_cells(output, y, block, group * y.channels, panel, panel + 1, cells, lines);
        turn_cells<T>(cells, y.plane, steps * kTileStep, strips + panel * most_steps * kStepBytes<T>);
      }
      for (int64_t s = 0; s < f.steps; ++s) {
        const int64_t columns = smaller(kStrip, f.depth - s * kStrip);
        copy_cells(input, f, block, group * f.channels, s, s + 1, cells, lines);
        for (int64_t plane = 0; plane < planes; ++plane)
          pair_cells<T>(cells + plane * f.plane, f.plane / kCell - kTile, planes * f.plane, pairs + plane * f.plane);
        for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
          const int64_t rows = smaller(kStrip, y.depth - panel * kStrip);
          const char* left = strips + panel * most_steps * kStepBytes<T>;
          float* to = to_group + panel * plan.panel_size() + s * f.taps * area;
          with_tiles(rows, columns, [&]<int ROWS, int COLUMNS>() {
            for (int64_t t = 0; t < f.taps; ++t, to += area)
              for (int64_t c = 0; c < chains; ++c) {
                const char* right = pairs + f.tap_offset(t);
                zero_sums<ROWS, COLUMNS>();
                for (int64_t p = c * steps / chains; p < (c + 1) * steps / chains; ++p)
                  multiply_step<ROWS, COLUMNS, parts>(left + p * kStepBytes<T>, right + p * kTileStep * kCell, {},
                                                      {planes * f.plane, f.phases() * f.plane});
                add_waiting();  // meanwhile; behind the stores it would wait for them (multiply_cells)
                store_sums<ROWS, COLUMNS>(sums, kStrip);
                waiting = to;
              }
          });
          add_waiting();
        }
      }
    }
  }
}

// The tasks' gradients, added in order, to the weight's in its own layout. Whether they are exact; if not, nothing that
// is written counts.
template <class T>
bool write_tiles(const ConvBackwardWeightArgs<T>& args, const WeightTiles<T>& plan, float* gradients) {
  constexpr int64_t area = kStrip * kStrip;
  const ConvShape& z = args.shape;
  const Field& f = plan.x;
  const bool last = args.grad_weight_channels_last;
  const int64_t outputs = z.k / z.groups, channels = z.c / z.groups, kernel = z.r * z.s;
  const int64_t units = z.groups * plan.panels, size = units * plan.panel_size();
  int exact = 1;
  parallel_for(units, 1 + 16384 / plan.panel_size(), [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit % plan.panels * kStrip, rows = smaller(kStrip, outputs - first);
      float* gradient = gradients + unit * plan.panel_size();
      for (int64_t task = 1; task < plan.pixel_tasks; ++task)
        for (int64_t i = 0; i < plan.panel_size(); i += area) add_strip(gradient + task * size + i, gradient + i);
      for (int64_t i = 0; i < f.steps * f.taps; ++i)
        if (!is_exact(gradient + i * area, kStrip, rows, smaller(kStrip, f.depth - i / f.taps * kStrip))) {
          __atomic_store_n(&exact, 0, __ATOMIC_RELAXED);
          return;
        }
      for (int64_t k = 0; k < rows; ++k) {
        T* weight = args.grad_weight + (unit / plan.panels * outputs + first + k) * channels * kernel;
        for (int64_t s = 0; s < f.steps; ++s) {
          const float* from = gradient + s * f.taps * area + k * kStrip;
          const int64_t e0 = s * kStrip, count = smaller(kStrip, f.depth - e0);
          if (f.merged) {
            for (int64_t r = 0; r < z.r; ++r)
              for (int64_t e = e0; e < e0 + count; ++e) {
                const int64_t tap = r * z.s + e / channels, c = e % channels;
                weight[last ? tap * channels + c : c * kernel + tap] = static_cast<T>(from[r * area + e - e0]);
              }
          } else if (last || kernel == 1) {
            for (int64_t t = 0; t < kernel; ++t)
              ::dlkern::cpu::DLKERN_ISA::copy(from + t * area, weight + t * channels + e0, count);
          } else {
            transpose(from, area, kernel, count, weight + e0 * kernel, kernel);
          }
        }
      }
    }
  });
  return exact != 0;
}

// Whether tiles give the gradient; otherwise grad_weight is to be computed again.
template <class T> bool backward_weight_tiles(const ConvBackwardWeightArgs<T>& args) {
  const WeightTiles<T> plan = plan_weight_tiles<T>(args.shape);
  const int64_t units = args.shape.groups * plan.panels, tasks = plan.pixel_tasks * plan.channel_tasks;
  float* gradients = scratch<float>(Slot::tiles_a, plan.pixel_tasks * units * plan.panel_size());
  parallel_for(tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t p = task % plan.pixel_tasks, c = task / plan.pixel_tasks;
      sum_blocks(args, plan, p * plan.blocks / plan.pixel_tasks, (p + 1) * plan.blocks / plan.pixel_tasks,
                 c * units / plan.channel_tasks, (c + 1) * units / plan.channel_tasks,
                 gradients + p * units * plan.panel_size());
    }
  });
  return write_tiles(args, plan, gradients);
}
#endif

}  // namespace dlkern::cpu::DLKERN_ISA
