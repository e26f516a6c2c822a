// linear: activation(input weight^T + bias) and its gradients, each one matrix product (gemm.h) with bias and
// activation applied to the tile while it is in registers' reach. Floor: 2 M N K flops, or reading the weight once
// where M is small.
#include "linear.h"

#include "activation.h"
#include "column_sums.h"
#include "gemm.h"

namespace dlkern::cpu::DLKERN_ISA {
namespace {

struct Activation {
  int activation;
  template <class V> V operator()(V value, int64_t, int64_t, int) const { return activate(value, activation); }
};

template <class T> void forward(const LinearArgs<T>& x) {
  const Gemm<T> g{x.m,          x.n,      x.k, x.input, x.input_row, x.input_column, x.weight, x.weight_column,
                  x.weight_row, x.output, x.n, false,   x.bias};
  if (x.activation)
    gemm(g, Activation{x.activation});
  else
    gemm(g);
}

template <class T> void backward_input(const LinearBackwardInputArgs<T>& x) {
  gemm(Gemm<T>{x.m, x.k, x.n, x.grad_output, x.grad_output_row, x.grad_output_column, x.weight, x.weight_row,
               x.weight_column, x.grad_input, x.k});
}

template <class T> void backward_weight(const LinearBackwardWeightArgs<T>& x) {
  gemm(Gemm<T>{x.n, x.k, x.m, x.grad_output, x.grad_output_column, x.grad_output_row, x.input, x.input_row,
               x.input_column, x.grad_weight, x.k});
  if (x.grad_bias) sum_columns(x.grad_output, x.grad_output_row, x.grad_output_column, x.m, x.n, x.grad_bias);
}

template <class T> void backward_activation(const ActivationBackwardArgs<T>& x) {
  constexpr int64_t lanes = kLanes<T>;
  parallel_for((x.count + lanes - 1) / lanes, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v) {
      const int64_t i = v * lanes;
      const int count = static_cast<int>(x.count - i < lanes ? x.count - i : lanes);
      if (count == lanes)
        store(x.grad_input + i, activation_backward(load(x.grad_output + i), load(x.output + i), x.activation));
      else
        store_partial<T>(x.grad_input + i,
                         activation_backward(load_partial<T>(x.grad_output + i, count),
                                             load_partial<T>(x.output + i, count), x.activation),
                         count);
    }
  });
}

}  // namespace

#define DLKERN_LINEAR(T)                                                                          \
  void linear_forward(const LinearArgs<T>& args) { forward(args); }                               \
  void linear_backward_input(const LinearBackwardInputArgs<T>& args) { backward_input(args); }    \
  void linear_backward_weight(const LinearBackwardWeightArgs<T>& args) { backward_weight(args); } \
  void activation_backward(const ActivationBackwardArgs<T>& args) { backward_activation(args); }
DLKERN_LINEAR(float)
DLKERN_LINEAR(double)
DLKERN_LINEAR(bfloat16)
DLKERN_LINEAR(float16)

}  // namespace dlkern::cpu::DLKERN_ISA
