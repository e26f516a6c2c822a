// Rotary positions of neighbouring pairs: what positions.cu does to tensors, and attention to the operands that it loads
// and to their gradients.
#pragma once
#include "pack.cuh"

namespace dlkern::cuda {

// Turns VEC pairs by their angles, the other way where `inverse` says so: element v of those at `first` with element v of
// those at `second`, or, where pairs are neighbours, elements 2v and 2v + 1 of both in a row. In float32, rounded once, by
// the same instructions everywhere: scores that are made again must be those of the first time.
template <int VEC, class T, class A>
DLKERN_DEVICE void turn_pairs(const T* first, const T* second, const A* cos_at, const A* sin_at, bool neighbours,
                              bool inverse, T* to_first, T* to_second) {
  float cos[VEC], sin[VEC], in[2][VEC], out[2][VEC];
  load_floats<VEC>(cos, cos_at);
  load_floats<VEC>(sin, sin_at);
  load_floats<VEC>(in[0], first);
  load_floats<VEC>(in[1], second);
#pragma unroll
  for (int v = 0; v < VEC; v++) {
    const float p = neighbours ? in[2 * v / VEC][2 * v % VEC] : in[0][v];
    const float q = neighbours ? in[(2 * v + 1) / VEC][(2 * v + 1) % VEC] : in[1][v];
    const float s = inverse ? -sin[v] : sin[v];
    const float turned_p = fmaf(p, cos[v], -(q * s)), turned_q = fmaf(q, cos[v], p * s);
    if (neighbours) {
      out[2 * v / VEC][2 * v % VEC] = turned_p;
      out[(2 * v + 1) / VEC][(2 * v + 1) % VEC] = turned_q;
    } else {
      out[0][v] = turned_p;
      out[1][v] = turned_q;
    }
  }
  store_floats<VEC>(to_first, out[0]);
  store_floats<VEC>(to_second, out[1]);
}

}  // namespace dlkern::cuda
