// Rotary positions (Su et al. 2021): each pair of a row's elements turned by an angle of its position. One read and one
// write of memory, which is the floor; sums of two products in the type sums are carried in, rounded once.
#include "positions.h"

#include "parallel.h"
#include "positions_turn.h"

namespace dlkern::cpu::DLKERN_ISA {
namespace {

template <class T> void turn(const RotaryArgs<T>& args) {
  using A = acc_t<T>;
  const int64_t half = args.half;
  const A sign = args.inverse ? A(-1) : A(1);
  parallel_for(args.a * args.b * args.length, 1 + 32768 / (args.depth + 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t l = row % args.length, j = row / args.length % args.b, i = row / args.length / args.b;
      const auto at = [&](const int64_t* stride) { return i * stride[0] + j * stride[1] + l * stride[2]; };
      const T* x = args.x + at(args.x_stride);
      T* y = args.output + at(args.output_stride);
      const A *cos = args.cos + at(args.angle_stride), *sin = args.sin + at(args.angle_stride);
      turn_row(x, cos, sin, half, args.interleaved, sign, y);
      for (int64_t d = 2 * half; d < args.depth; ++d) y[d] = x[d];
    }
  });
}

}  // namespace

void rotary(const RotaryArgs<float>& args) { turn(args); }
void rotary(const RotaryArgs<double>& args) { turn(args); }
void rotary(const RotaryArgs<bfloat16>& args) { turn(args); }
void rotary(const RotaryArgs<float16>& args) { turn(args); }

}  // namespace dlkern::cpu::DLKERN_ISA
