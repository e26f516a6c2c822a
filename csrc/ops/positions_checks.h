// What rotary's op layers of all columns share.
#pragma once
#include "common.h"

namespace dlkern::ops {

// `place(name, tensor)` throws where a tensor is not where this column works.
template <class Place>
void check_rotary(const char* op, const Tensor& x, const Tensor& cos, const Tensor& sin, Place&& place) {
  place("x", x), place("cos", cos), place("sin", sin);
  check(x.dim() == 4 && cos.dim() == 4, op, ": x and cos must have 4 dimensions");
  check(same_sizes(cos.sizes(), sin.sizes()), op, ": cos and sin differ in shape");
  for (int64_t d = 0; d < 2; ++d)
    check(cos.size(d) == 1 || cos.size(d) == x.size(d), op, ": cos does not broadcast to x");
  check(cos.size(2) == x.size(2) && 2 * cos.size(3) <= x.size(3), op, ": cos does not fit x");
  check(cos.scalar_type() == sin.scalar_type() &&
            (cos.scalar_type() == x.scalar_type() || cos.scalar_type() == sum_type(x)),
        op, ": cos and sin must be in the dtype of x or of its sums");
}

// Fills sizes and strides of a launcher's arguments, of `from`, which is x with dense rows, and dense angles; returns the
// result, which is in x's order of the second and third dimension: heads inside positions stay there.
template <class Args>
Tensor prepare_rotary(const Tensor& x, const Tensor& from, const Tensor& cos, bool interleaved, bool inverse,
                      Args& args) {
  args.a = x.size(0);
  args.b = x.size(1);
  args.length = x.size(2);
  args.depth = x.size(3);
  args.half = cos.size(3);
  args.interleaved = interleaved;
  args.inverse = inverse;
  const bool swapped = x.stride(1) < x.stride(2);
  const auto some = [](int64_t size) { return size > 1 ? size : 1; };
  int64_t* to = args.output_stride;
  to[swapped ? 1 : 2] = some(args.depth);
  to[swapped ? 2 : 1] = some(args.depth) * some(swapped ? args.b : args.length);
  to[0] = some(args.depth) * some(args.b) * some(args.length);
  int64_t running = 1;
  for (int64_t d = 3; d-- > 0;) {
    running *= cos.size(d + 1);
    args.x_stride[d] = from.stride(d);
    args.angle_stride[d] = cos.size(d) == 1 ? 0 : running;
  }
  const int64_t stride[4] = {to[0], to[1], to[2], 1};
  return allocate_strided(x.sizes(), stride, x.scalar_type(), x);
}

inline Tensor with_dense_rows(const Tensor& x) { return x.stride(3) == 1 || x.size(3) <= 1 ? x : as_contiguous(x); }

}  // namespace dlkern::ops
