// The weight's gradient of 3 x 3 convolutions of stride 1 in float by Winograd's transforms (winograd.h): for blocks of
// tiles, the input and the output's gradient are transformed, and each of the 16 places is a product that sums over tiles,
// output channels x input channels. Where the sums are small each thread has its own, of its own tiles; else threads
// share a block's lines first, places and output channels then.
// Floor: 4 N P Q K C multiplications over the FMA peak; sums of 16 / 9 of the weight's size pass the caches once a block.
#pragma once
#include "conv.h"
#include "winograd.h"

namespace dlkern::cpu::DLKERN_ISA::winograd {

using S = Taps3;  // 5 x 5 taps were slower in tiles: sums of 49 places pass the caches

constexpr int64_t kSharedBlockBytes = 3 * 1024 * 1024;  // transformed tiles of a block that threads share
constexpr int64_t kSumsBytes = 1536 * 1024;  // of each thread
constexpr int64_t kTilesAtOnce = 96;  // their inputs of a panel stay in the first-level cache

inline Images<float> input_of(const ConvBackwardWeightArgs<float>& args) {
  const ConvShape& z = args.shape;
  return {args.input, args.input_channels_last, z.n, z.c, z.h, z.w};
}
inline Images<float> gradient_of(const ConvBackwardWeightArgs<float>& args) {
  const ConvShape& z = args.shape;
  return {args.grad_output, args.grad_output_channels_last, z.n, z.k, z.p, z.q};
}

// One call's sizes.
struct GradientCall {
  const ConvBackwardWeightArgs<float>& args;
  const ConvShape& z;
  Lines lines;
  int64_t channels, outputs;  // of a group
  int64_t input_pitch, gradient_pitch, row;  // of transformed tiles; of sums
  int64_t sums_plane;
  bool failed = false;

  explicit GradientCall(const ConvBackwardWeightArgs<float>& args)
      : args(args),
        z(args.shape),
        lines(z.n, z.p, z.q, z.dilation_h, z.dilation_w),
        channels(z.c / z.groups),
        outputs(z.k / z.groups),
        input_pitch(pitch_of(channels)),
        gradient_pitch(pitch_of(outputs)),
        row(ceil_div(channels, kLanes<float>) * kLanes<float>),
        sums_plane(outputs * row + 48) {}

  int64_t sums_size() const { return z.groups * kPlaces<S> * sums_plane; }
  int64_t line_bytes() const { return kPlaces<S> * 4 * lines.tiles() * (input_pitch + gradient_pitch); }

  // Transforms lines [begin, end) of a group.
  void transform_lines(int64_t group, int64_t begin, int64_t end, float* input, int64_t input_plane, float* gradient,
                       int64_t gradient_plane) const {
    const Images<float> x = input_of(args), y = gradient_of(args);
    read_tiles<4>(x, lines, -z.pad_h, -z.pad_w, group * channels, channels, begin, end,
                  [&](int64_t tile, const float* const(&pixels)[4][4]) __attribute__((always_inline)) {
                    transform_input<S>(pixels, channels, input + tile * input_pitch, input_plane);
                  });
    read_tiles<2>(y, lines, 0, 0, group * outputs, outputs, begin, end,
                  [&](int64_t tile, const float* const(&pixels)[2][2]) __attribute__((always_inline)) {
                    transform_gradient<S>(pixels, outputs, gradient + tile * gradient_pitch, gradient_plane);
                  });
  }

  // sums[output channel][row] (+)= products over tiles, at one place, for output channels [begin, end).
  void add_products(int64_t tiles, const float* input, const float* gradient, int64_t begin, int64_t end, float* sums,
                    bool add) const {
    for (int64_t t = 0; t < tiles; t += kTilesAtOnce)
      for (int64_t c = 0; c < row; c += kVectors * kLanes<float>)
        for (int64_t k = begin; k < end; k += kRows)
          multiply_for<true>(smaller(kRows, end - k), smaller(kVectors, (row - c) / kLanes<float>))(
              smaller(kTilesAtOnce, tiles - t), gradient + t * gradient_pitch + k, gradient_pitch,
              input + t * input_pitch + c, input_pitch, sums + k * row + c, row, add || t > 0, nullptr, 0);
  }

  // The finished gradient of output channel k, of `parts` sums.
  void write_gradient(int64_t k, float* sums, int64_t parts, float* taps) {
    float* from = sums + k / outputs * kPlaces<S> * sums_plane + k % outputs * row;
    float* to = args.grad_weight + k * channels * 9;
    Largest largest;
    for (int64_t c = 0; c < channels; c += kLanes<float>) {
      for (int64_t part = 1; part < parts; ++part)
        for (int64_t place = 0; place < kPlaces<S>; ++place) {
          float* at = from + place * sums_plane + c;
          store(at, load(at) + load(at + part * sums_size()));
        }
      vfloat out[3][3];
      transform_filter_gradient<S>(from + c, sums_plane, out);
      for (int tap = 0; tap < 9; ++tap) {
        const vfloat value = out[tap / 3][tap % 3];
        largest.add(value);
        if (args.grad_weight_channels_last)
          store_some(to + tap * channels + c, value, channels - c);
        else
          store(taps + tap * row + c, value);
      }
    }
    if (!args.grad_weight_channels_last) transpose(taps, row, 9, channels, to, 9);
    if (!largest.is_finite()) __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
  }

  // Each thread sums over lines of its own.
  void sum_apart(float* sums, int64_t parts) const {
    parallel_for(parts, 1, [&](int64_t from, int64_t to) {
      for (int64_t part = from; part < to; ++part) {
        const int64_t first = part * lines.count() / parts, last = (part + 1) * lines.count() / parts,
                      most = larger(1, smaller(kBlockBytes / line_bytes(), last - first)),
                      input_plane = plane_of(most * lines.tiles(), input_pitch),
                      gradient_plane = plane_of(most * lines.tiles(), gradient_pitch);
        float* input = scratch<float>(Slot::family_1, kPlaces<S> * input_plane);
        float* gradient = scratch<float>(Slot::family_2, kPlaces<S> * gradient_plane);
        for (int64_t group = 0; group < z.groups; ++group)
          for (int64_t line = first; line < last; line += most) {
            const int64_t end = smaller(line + most, last);
            transform_lines(group, line, end, input, input_plane, gradient, gradient_plane);
            for (int64_t place = 0; place < kPlaces<S>; ++place)
              add_products((end - line) * lines.tiles(), input + place * input_plane, gradient + place * gradient_plane,
                           0, outputs, sums + part * sums_size() + (group * kPlaces<S> + place) * sums_plane,
                           line > first);
          }
      }
    });
  }

  // All threads sum over the same lines, for places and output channels of their own.
  void sum_together(float* sums) const {
    const int64_t most = smaller(lines.count(), larger(1, kSharedBlockBytes / line_bytes())),
                  block = ceil_div(lines.count(), ceil_div(lines.count(), most)), tiles = lines.tiles(),
                  input_plane = plane_of(block * tiles, input_pitch),
                  gradient_plane = plane_of(block * tiles, gradient_pitch), panels = ceil_div(outputs, 8 * kRows);
    float* inputs = scratch<float>(Slot::family_1, z.groups * kPlaces<S> * input_plane);
    float* gradients = scratch<float>(Slot::family_2, z.groups * kPlaces<S> * gradient_plane);
    for (int64_t first = 0; first < lines.count(); first += block) {
      const int64_t end = smaller(first + block, lines.count());
      parallel_for(end - first, 1, [&](int64_t from, int64_t to) {
        for (int64_t group = 0; group < z.groups; ++group)
          transform_lines(group, first + from, first + to,
                          inputs + group * kPlaces<S> * input_plane + from * tiles * input_pitch, input_plane,
                          gradients + group * kPlaces<S> * gradient_plane + from * tiles * gradient_pitch,
                          gradient_plane);
      });
      parallel_for(z.groups * kPlaces<S> * panels, 1, [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) {
          const int64_t plane = i / panels, k = i % panels * 8 * kRows;
          add_products((end - first) * tiles, inputs + plane * input_plane, gradients + plane * gradient_plane, k,
                       smaller(k + 8 * kRows, outputs), sums + plane * sums_plane, first > 0);
        }
      });
    }
  }

  void run() {
    const int64_t threads = num_threads();
    const bool apart = sums_size() * 4 <= kSumsBytes && lines.count() * lines.tiles() >= threads * kTilesAtOnce;
    const int64_t parts = apart ? smaller(threads, lines.count()) : 1;
    float* sums = scratch<float>(Slot::family_0, parts * sums_size());
    if (apart)
      sum_apart(sums, parts);
    else
      sum_together(sums);
    parallel_for(z.k, 1 + 4096 / row, [&](int64_t begin, int64_t end) {
      float* taps = scratch<float>(Slot::tiles_c, 9 * row);
      for (int64_t k = begin; k < end; ++k) write_gradient(k, sums, parts, taps);
    });
  }
};

inline bool pays(const ConvBackwardWeightArgs<float>& args) {
  const ConvShape& z = args.shape;
  if (!has_winograd() || z.r != 3 || z.s != 3 || z.stride_h != 1 || z.stride_w != 1) return false;
  const GradientCall call(args);
  if (call.channels < 16 || call.outputs < 16 || call.line_bytes() * z.groups > 4 * kSharedBlockBytes) return false;
  const double tiles = static_cast<double>(call.lines.count() * call.lines.tiles()),
               channels = static_cast<double>(call.channels), outputs = static_cast<double>(call.outputs),
               seen_h = static_cast<double>(count_seen(3, -z.pad_h, z.dilation_h, z.p, 1, z.h)),
               seen_w = static_cast<double>(count_seen(3, -z.pad_w, z.dilation_w, z.q, 1, z.w)),
               direct = static_cast<double>(z.n) * seen_h * seen_w * channels * outputs;
  // Few channels fill no panel.
  if (tiles < 32 || call.channels < (kVectors - 1) * kLanes<float>) return false;
  if (direct < 1.1 * products_of<S>(tiles, channels, outputs)) return false;
  // Of few tiles, or numbers, the transforms' roundings outweigh the sums'; oneDNN's over channels_last pixels are short
  // (with AVX-512).
  const bool short_sums = args.input_channels_last || args.grad_output_channels_last;
  const double density = density_of(input_of(args)) * density_of(gradient_of(args));
  return density >= 1.0 / 32 && (tiles >= 128 || (!short_sums && density >= 1.0 / 8));
}

// Whether the gradient is written, and finite.
inline bool backward_weight(const ConvBackwardWeightArgs<float>& args) {
  GradientCall call(args);
  call.run();
  return !call.failed;
}

}  // namespace dlkern::cpu::DLKERN_ISA::winograd
