// Rotary positions, op layer: rotary, which is its own gradient with `inverse` turned.
#include "../cpu/positions.h"

#include "common.h"

namespace dlkern::ops {
namespace {

Tensor rotary_cpu(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved, bool inverse) {
  const char* op = "rotary";
  check(x.is_cpu() && cos.is_cpu() && sin.is_cpu(), op, ": tensors are not all on the CPU");
  check(x.dim() == 4 && cos.dim() == 4, op, ": x and cos must have 4 dimensions");
  check(same_sizes(cos.sizes(), sin.sizes()), op, ": cos and sin differ in shape");
  for (int64_t d = 0; d < 2; ++d)
    check(cos.size(d) == 1 || cos.size(d) == x.size(d), op, ": cos does not broadcast to x");
  check(cos.size(2) == x.size(2) && 2 * cos.size(3) <= x.size(3), op, ": cos does not fit x");
  check(cos.scalar_type() == sin.scalar_type() &&
            (cos.scalar_type() == x.scalar_type() || cos.scalar_type() == sum_type(x)),
        op, ": cos and sin must be in the dtype of x or of its sums");
  Tensor output;
  dispatch_floating(x.scalar_type(), op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = acc_t<T>;
    const Tensor from = x.stride(3) == 1 || x.size(3) <= 1 ? x : as_contiguous(x);
    const std::optional<Tensor> c = widened(cos, x), s = widened(sin, x);
    cpu::RotaryArgs<T> args{};
    args.a = x.size(0);
    args.b = x.size(1);
    args.length = x.size(2);
    args.depth = x.size(3);
    args.half = cos.size(3);
    // In x's order of the second and third dimension: heads inside positions stay there.
    const bool swapped = x.stride(1) < x.stride(2);
    int64_t* to = args.output_stride;
    const auto some = [](int64_t size) { return size > 1 ? size : 1; };
    to[swapped ? 1 : 2] = some(args.depth);
    to[swapped ? 2 : 1] = some(args.depth) * some(swapped ? args.b : args.length);
    to[0] = some(args.depth) * some(args.b) * some(args.length);
    const int64_t stride[4] = {to[0], to[1], to[2], 1};
    output = allocate_strided(x.sizes(), stride, x.scalar_type(), x);
    if (x.numel() == 0) return;
    args.x = data<T>(from);
    args.cos = data<A>(c);
    args.sin = data<A>(s);
    int64_t running = 1;
    for (int64_t d = 3; d-- > 0;) {
      running *= cos.size(d + 1);
      args.x_stride[d] = from.stride(d);
      args.angle_stride[d] = cos.size(d) == 1 ? 0 : running;
    }
    args.interleaved = interleaved;
    args.inverse = inverse;
    args.output = mutable_data<T>(output);
    DLKERN_CALL(rotary, args);
  });
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkern, CPU, m) { m.impl("rotary_cpu", TORCH_BOX(&rotary_cpu)); }

}  // namespace dlkern::ops
