// RNN, LSTM and GRU, one layer in one direction, backward: from the gradient of a step's gates to that of the step
// before, step by step, in one launch or in one a step (rnn_steps.cuh). A block owns 16 units: it multiplies the gates'
// gradients of the step after by the units' columns of the recurrent weight, and makes the gradients of their gates. The
// gradients of input and weights are one product each over all steps (the op layer: linear.cu, conv.cu).
#include "rnn_gates.cuh"
#include "rnn_steps.cuh"

namespace dlkern::cuda {
namespace {

using namespace rnn;

template <class T>
struct BackwardArgs {
  RnnShape shape;
  const T *grad_output, *grad_h_n, *grad_c_n, *weight, *h0, *c0, *output;
  const float *gates, *cells;
  T *grad_given, *grad_recurrent, *previous, *grad_h0, *grad_c0;
  float* carry;  // what goes to the step before past the product: of LSTM's cell, of GRU's state
  unsigned* counters;
  bool aligned, keep;
};

// Steps n1 - 1 down to n0; step -1 is the initial state.
template <class T, int GATES, bool WIDE>
__global__ void __launch_bounds__(kThreads, 2) rnn_backward_kernel(BackwardArgs<T> a, int64_t n0, int64_t n1) {
  using Tile = Product<T, kUnits, Stored::k_first, WIDE>;
  DLKERN_DYNAMIC_SHARED(shared);
  const RnnShape& s = a.shape;
  const int64_t hidden = s.hidden, width = GATES * hidden, b0 = static_cast<int64_t>(blockIdx.y) * Tile::kRows;
  const Tile product(shared, a.weight, width, hidden, a.aligned, a.keep);
  const int64_t unit = product.unit + Tile::unit_of();
  Meeting meeting{a.counters ? a.counters + blockIdx.y : nullptr};
  product.begin();
#pragma unroll 1
  for (int64_t n = n1 - 1; n >= n0; n--) {
    const Step step = n < 0 ? Step{0, s.batch} : step_at(s, n), before = step_at(s, n - 1);
    const Step after = n < 0 ? Step{0, s.batch} : step_at(s, n + 1);
    if (b0 >= step.size) continue;  // and so do all blocks of these rows
    meeting.wait();
    product.run([&](int r) -> const T* {
      const int64_t b = b0 + r;
      if (b >= step.size || b >= after.size) return nullptr;
      if (n >= 0) return a.grad_recurrent + (after.offset + place(s, b)) * width;
      const int64_t first = s.first_rows ? s.first_rows[b] : (s.reverse ? s.steps - 1 : 0) * s.batch + b;
      return a.grad_recurrent + first * width;
    });
#pragma unroll
    for (int i = 0; i < Tile::kElements; i++) {
      const int64_t b = b0 + Tile::row_of(i);
      if (unit >= hidden || b >= step.size) continue;
      const int64_t at = place(s, b), row = step.offset + at, of_state = at * hidden + unit;
      float* carry = a.carry + b * hidden + unit;
      float dh = product.sum(Tile::row_of(i), Tile::unit_of());
      const bool goes_on = b < after.size;
      if (GATES == 3 && goes_on) dh += *carry;
      if (n < 0) {
        a.grad_h0[of_state] = from_float<T>(dh);
        if (GATES == 4) a.grad_c0[of_state] = from_float<T>(*carry);
        continue;
      }
      dh += to_float(a.grad_output[row * hidden + unit]);
      if (!goes_on) dh += to_float(a.grad_h_n[of_state]);
      const int64_t row_before = b < before.size ? before.offset + at : -1;
      const T previous = row_before < 0 ? a.h0[of_state] : a.output[row_before * hidden + unit];
      if (a.previous) a.previous[row * hidden + unit] = previous;
      const float* gates = a.gates + row * s.slots() * hidden + unit;
      T* to = a.grad_given + row * width + unit;
      if constexpr (GATES == 4) {
        const float in = gates[0], forget = gates[hidden], candidate = gates[2 * hidden], out = gates[3 * hidden];
        const float c = tanhf(a.cells[row * hidden + unit]),
                    c_before = row_before < 0 ? to_float(a.c0[of_state]) : a.cells[row_before * hidden + unit];
        const float dc = (goes_on ? *carry : to_float(a.grad_c_n[of_state])) + dh * out * (1.0f - c * c);
        const LstmGradients d = lstm_gradients(dc, in, forget, candidate, c_before);
        to[0] = from_float<T>(d.in), to[hidden] = from_float<T>(d.forget), to[2 * hidden] = from_float<T>(d.candidate);
        to[3 * hidden] = from_float<T>(dh * c * out * (1.0f - out));
        *carry = dc * forget;
      } else if constexpr (GATES == 3) {
        const float recurrent = gates[0], r = gates[hidden], z = gates[2 * hidden], candidate = gates[3 * hidden];
        const GruGradients d = gru_gradients(dh, recurrent, r, z, candidate, to_float(previous));
        const T dr = from_float<T>(d.r), dz = from_float<T>(d.z);
        T* back = a.grad_recurrent + row * width + unit;
        to[0] = dr, to[hidden] = dz, to[2 * hidden] = from_float<T>(d.candidate);
        back[0] = dr, back[hidden] = dz, back[2 * hidden] = from_float<T>(d.recurrent);
        *carry = dh * z;
      } else {
        to[0] = from_float<T>(dh * gates[0]);
      }
    }
    meeting.arrive();
  }
}

}  // namespace

RnnRoute rnn_backward_route(const RnnShape& s) {
  RnnRoute route{};
  dispatch(s, [&](auto* type, auto gates, auto wide) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Tile = Product<T, kUnits, Stored::k_first, wide.value>;
    route =
        route_of(s, rnn_backward_kernel<T, gates.value, wide.value>, Tile::shared_bytes(gates.value * s.hidden, true));
  });
  return route;
}

void rnn_backward(const RnnShape& s, RnnRoute route, const RnnBackward& x, void* stream) {
  const std::lock_guard<std::mutex> lock(launching());
  dispatch(s, [&](auto* type, auto gates, auto wide) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Tile = Product<T, kUnits, Stored::k_first, wide.value>;
    const bool all = route == RnnRoute::persistent;
    const bool aligned = s.hidden % Tile::kPiece == 0 && aligned16(x.weight_hh) && aligned16(x.grad_recurrent);
    const BackwardArgs<T> args{s,
                               static_cast<const T*>(x.grad_output),
                               static_cast<const T*>(x.grad_h_n),
                               static_cast<const T*>(x.grad_c_n),
                               static_cast<const T*>(x.weight_hh),
                               static_cast<const T*>(x.h0),
                               static_cast<const T*>(x.c0),
                               static_cast<const T*>(x.output),
                               x.gates,
                               x.cells,
                               static_cast<T*>(x.grad_given),
                               static_cast<T*>(x.grad_recurrent),
                               static_cast<T*>(x.previous),
                               static_cast<T*>(x.grad_h0),
                               static_cast<T*>(x.grad_c0),
                               x.carry,
                               all ? x.counters : nullptr,
                               aligned,
                               all};
    const auto shared = static_cast<size_t>(Tile::shared_bytes(gates.value * s.hidden, all));
    if (all) {
      DLKERN_LAUNCH(rnn_counters_kernel<kThreads>, dim3(1), dim3(kThreads), 0, stream, x.counters, rnn_counters(s));
      DLKERN_LAUNCH_COOPERATIVE((rnn_backward_kernel<T, gates.value, wide.value>), grid(s), dim3(kThreads), shared,
                                stream, args, int64_t{-1}, s.steps);
      return;
    }
    for (int64_t n = s.steps - 1; n >= -1; n--)
      DLKERN_LAUNCH((rnn_backward_kernel<T, gates.value, wide.value>), grid(s), dim3(kThreads), shared, stream, args, n,
                    n + 1);
  });
}

}  // namespace dlkern::cuda
