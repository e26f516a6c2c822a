// What the pooling kernels share: the pixel and the channels that are a thread's, the windows along an axis, and the
// choice of a kernel's types.
#pragma once
#include "fast_divide.cuh"
#include "pack.cuh"
#include "pooling.h"

namespace dlkern::cuda {

constexpr int kThreads = 256;

// ---- Where a thread works ----

// Splits a thread's number into (outer, y, x, channel) over [outer, height, width, inner / VEC].
struct Pixels {
  uint32_t count;
  FastDivide packs, width, height;

  struct At {
    uint32_t outer, y, x, pack;
  };
  DLKERN_DEVICE At at(uint32_t item) const {
    At at;
    item = packs.divide(item, at.pack);
    item = width.divide(item, at.x);
    at.outer = height.divide(item, at.y);
    return at;
  }
};

// Element offset of channel 0 of a pixel of a [outer, height, width, inner] tensor.
DLKERN_DEVICE int64_t pixel_offset(uint32_t outer, int y, int x, int height, int width, int64_t inner) {
  return ((static_cast<int64_t>(outer) * height + y) * width + x) * inner;
}

// ---- Windows along one axis ----

// Positions [begin, end) of a window that lie inside the input, and how many with padding.
struct Window {
  int begin, end, padded;
};
// Windows [first, last] that may cover a position.
struct Covering {
  int first, last;
};

DLKERN_DEVICE Covering covering_windows(const PoolAxis& axis, int position) {
  const int reach = (axis.kernel - 1) * axis.dilation;
  const int padded = position + axis.padding;
  return {padded > reach ? (padded - reach + axis.stride - 1) / axis.stride : 0,
          min(padded / axis.stride, axis.out_size - 1)};
}

template <bool ADAPTIVE>
DLKERN_DEVICE Window window(const PoolAxis& axis, int index) {
  if (ADAPTIVE) {
    const int begin = static_cast<int>(static_cast<int64_t>(index) * axis.size / axis.out_size);
    const int end = static_cast<int>((static_cast<int64_t>(index + 1) * axis.size + axis.out_size - 1) / axis.out_size);
    return {begin, end, end - begin};
  }
  const int begin = index * axis.stride - axis.padding;
  const int padded_end = min(begin + axis.kernel, axis.size + axis.padding);
  return {max(begin, 0), min(padded_end, axis.size), padded_end - begin};
}

template <bool ADAPTIVE>
DLKERN_DEVICE Covering covering(const PoolAxis& axis, int position) {
  if (ADAPTIVE) {
    return {static_cast<int>(static_cast<int64_t>(position) * axis.out_size / axis.size),
            static_cast<int>((static_cast<int64_t>(position + 1) * axis.out_size + axis.size - 1) / axis.size) - 1};
  }
  return covering_windows(axis, position);
}

// ---- For launchers ----

// Calls f(T*, constant VEC): 16 bytes of channels a thread where every pixel's channels are a multiple of that.
template <class F>
void with_pack(Element element, int64_t inner, F&& f) {
  with_type(element, [&](auto* type) {
    constexpr int kVec = 16 / sizeof(*type);
    if (inner % kVec == 0)
      f(type, std::integral_constant<int, kVec>{});
    else
      f(type, std::integral_constant<int, 1>{});
  });
}

inline dim3 blocks_for(const Pixels& pixels) { return grid_of(ceil_div(pixels.count, kThreads)); }

// A tensor of the input's or the output's sizes from its image (or plane) `first` on.
template <class T>
T* from_input(T* data, const PoolGeometry& g, int64_t first) {
  return data + first * g.height.size * g.width.size * g.inner;
}
template <class T>
T* from_output(T* data, const PoolGeometry& g, int64_t first) {
  return data + first * g.height.out_size * g.width.out_size * g.inner;
}

// Calls f(pixels, first) for slices of [outer, h, w, packs], which begin at `first` of outer.
template <class F>
void for_pixels(int64_t outer, int64_t h, int64_t w, int64_t packs, F&& f) {
  for_slices("pooling", outer, h * w * packs, [&](int64_t first, int64_t count) {
    f(Pixels{static_cast<uint32_t>(count * h * w * packs), FastDivide(packs), FastDivide(w), FastDivide(h)}, first);
  });
}
template <class F>
void for_output_pixels(const PoolGeometry& g, int vec, F&& f) {
  for_pixels(g.outer, g.height.out_size, g.width.out_size, g.inner / vec, f);
}
template <class F>
void for_input_pixels(const PoolGeometry& g, int vec, F&& f) {
  for_pixels(g.outer, g.height.size, g.width.size, g.inner / vec, f);
}

}  // namespace dlkern::cuda
