// Rotary positions (Su et al. 2021): each pair of a row's elements turned by an angle of its position. A thread turns
// VEC neighbouring pairs, or copies VEC elements behind all pairs; where sizes, strides and addresses allow it, in accesses
// of 16 bytes. Floor: one read and one write of the tensor, and one read of the angles.
#include "positions.h"

#include <type_traits>

#include "fast_divide.cuh"
#include "positions_turn.cuh"

namespace dlkern::cuda {
namespace {

constexpr int kThreads = 256;

struct Places {
  FastDivide chunks, length, heads;  // chunks of VEC pairs or elements a row
  int64_t first;  // of this launch's members of the first dimension
  uint32_t count;  // of chunks of this launch
  bool swapped;  // rows lie as [a, length, b]
};

template <class T, class A, int VEC>
__global__ void __launch_bounds__(kThreads) rotary_kernel(Rotary args, Places places) {
  const uint32_t number = blockIdx.x * kThreads + threadIdx.x;
  if (number >= places.count) return;
  uint32_t chunk, j, l;
  uint32_t row = places.chunks.divide(number, chunk);
  if (places.swapped) {
    row = places.heads.divide(row, j);
    row = places.length.divide(row, l);
  } else {
    row = places.length.divide(row, l);
    row = places.heads.divide(row, j);
  }
  const int64_t i = places.first + row;
  const auto at = [&](const int64_t* stride) { return i * stride[0] + j * stride[1] + l * stride[2]; };
  const T* x = static_cast<const T*>(args.x) + at(args.x_stride);
  T* y = static_cast<T*>(args.output) + at(args.output_stride);
  const int64_t d = static_cast<int64_t>(chunk) * VEC;
  if (d >= args.half) {
    const int64_t behind = args.half + d;
    using All = std::conditional_t<VEC == 1, T, uint4>;  // a pack would be stored element by element
    *reinterpret_cast<All*>(y + behind) = *reinterpret_cast<const All*>(x + behind);
    return;
  }
  const A* cos = static_cast<const A*>(args.cos) + at(args.angle_stride) + d;
  const A* sin = static_cast<const A*>(args.sin) + at(args.angle_stride) + d;
  const int64_t first = args.interleaved ? 2 * d : d, second = args.interleaved ? first + VEC : args.half + d;
  turn_pairs<VEC>(x + first, x + second, cos, sin, args.interleaved, args.inverse, y + first, y + second);
}

template <class T, class A, int VEC>
void launch_rotary(const Rotary& args, void* stream) {
  const int64_t chunks = args.half / VEC + (args.depth - 2 * args.half) / VEC;
  const int64_t each = args.b * args.length * chunks;
  const bool swapped = args.output_stride[1] < args.output_stride[2];
  for_slices("rotary", args.a, each, [&](int64_t first, int64_t count) {
    const Places places{FastDivide(chunks),
                        FastDivide(args.length),
                        FastDivide(args.b),
                        first,
                        static_cast<uint32_t>(count * each),
                        swapped};
    DLKERN_LAUNCH((rotary_kernel<T, A, VEC>), grid_of(ceil_div(places.count, kThreads)), dim3(kThreads), 0, stream,
                  args, places);
  });
}

// Whether all rows, pairs and angles come in whole packs.
template <class T>
bool is_wide(const Rotary& args) {
  constexpr int64_t vec = 16 / sizeof(T);
  bool wide = args.half % vec == 0 && args.depth % vec == 0;
  for (const void* p : {args.x, args.cos, args.sin, static_cast<const void*>(args.output)})
    wide = wide && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  for (int64_t stride : args.x_stride) wide = wide && stride % vec == 0;
  return wide;
}

template <class T, class A>
void any_width(const Rotary& args, void* stream) {
  if (is_wide<T>(args))
    launch_rotary<T, A, 16 / sizeof(T)>(args, stream);
  else
    launch_rotary<T, A, 1>(args, stream);
}

}  // namespace

void rotary(const Rotary& args, void* stream) {
  with_type(args.element, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (args.wide_angles)
      any_width<T, float>(args, stream);
    else
      any_width<T, T>(args, stream);
  });
}

}  // namespace dlkern::cuda
