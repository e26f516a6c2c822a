// Rotary positions, op layer of the CUDA column: rotary. float32, bfloat16 and float16; angles are in x's dtype or
// float32.
#include "../cuda/positions.h"

#include "cuda_positions.h"
#include "positions_checks.h"

namespace dlkern::ops {

Tensor turned_cuda(const char* op, const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved,
                   bool inverse) {
  cuda::Rotary args{};
  args.element = element_of(op, x);
  args.wide_angles = cos.scalar_type() == ScalarType::Float;
  const Tensor from = with_dense_rows(x), c = as_contiguous(cos), s = as_contiguous(sin);
  Tensor output = prepare_rotary(x, from, cos, interleaved, inverse, args);
  if (x.numel() == 0) return output;
  Call call(x);
  args.x = call.reads(from);
  args.cos = call.reads(c);
  args.sin = call.reads(s);
  args.output = call.writes(output);
  cuda::rotary(args, call.stream());
  return output;
}

namespace {

Tensor rotary_cuda(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved, bool inverse) {
  const char* op = "rotary";
  element_of(op, x);
  check_rotary(op, x, cos, sin, [&](const char* name, const Tensor& t) { check_device(op, name, t, x); });
  return turned_cuda(op, x, cos, sin, interleaved, inverse);
}

}  // namespace

DLKERN_REGISTER(DLKERN_CUDA_KEY, m) { m.impl("rotary_cuda", TORCH_BOX(&rotary_cuda)); }

}  // namespace dlkern::ops
