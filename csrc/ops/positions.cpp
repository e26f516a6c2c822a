// Rotary positions, op layer: rotary, which is its own gradient with `inverse` turned.
#include "../cpu/positions.h"

#include "positions_checks.h"

namespace dlkern::ops {
namespace {

Tensor rotary_cpu(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved, bool inverse) {
  const char* op = "rotary";
  check_rotary(op, x, cos, sin,
               [&](const char* name, const Tensor& t) { check(t.is_cpu(), op, ": ", name, " is not on the CPU"); });
  Tensor output;
  dispatch_floating(x.scalar_type(), op, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = acc_t<T>;
    const Tensor from = with_dense_rows(x);
    const std::optional<Tensor> c = widened(cos, x), s = widened(sin, x);
    cpu::RotaryArgs<T> args{};
    output = prepare_rotary(x, from, cos, interleaved, inverse, args);
    if (x.numel() == 0) return;
    args.x = data<T>(from);
    args.cos = data<A>(c);
    args.sin = data<A>(s);
    args.output = mutable_data<T>(output);
    DLKERN_CALL(rotary, args);
  });
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dlkern, CPU, m) { m.impl("rotary_cpu", TORCH_BOX(&rotary_cpu)); }

}  // namespace dlkern::ops
