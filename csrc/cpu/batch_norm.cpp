// Batch norm over the channels of [n, c, inner] or [rows, c], with activation and residual in the same pass.
// Statistics are sums of x - s and (x - s)^2 in double, s the channel's first element: one pass that neither
// cancels nor overflows. Floors (S = bytes of the input): train forward 3 S, 2 S where a channel stays in cache;
// eval 2 S; backward 5 S, 3 S in cache.
#include "batch_norm.h"

#include "parallel.h"
#include "simd.h"

namespace dlkern::cpu::DLKERN_ISA {
namespace {

// A sum that carries its rounding error along (Neumaier).
struct Sum {
  double value = 0, lost = 0;
  void operator+=(double x) {
    const double next = value + x;
    lost += (value < 0 ? -value : value) >= (x < 0 ? -x : x) ? (value - next) + x : (x - next) + value;
    value = next;
  }
  double total() const { return lost - lost == 0.0 ? value + lost : value; }
};

inline double finite_or_zero(double x) { return x - x == 0.0 ? x : 0.0; }

template <NormActivation activation, class A> inline A activate(A y) {
  if constexpr (activation == NormActivation::relu) return y < A(0) ? A(0) : y;  // NaN stays
  if constexpr (activation == NormActivation::tanh) return A(std::tanh(y));
  if constexpr (activation == NormActivation::sigmoid) return A(1) / (A(1) + std::exp(-y));
  return y;
}
template <NormActivation activation, class A> inline A activate_backward(A g, A y) {
  if constexpr (activation == NormActivation::relu) return y <= A(0) ? A(0) : g;
  if constexpr (activation == NormActivation::tanh) return g * (A(1) - y * y);
  if constexpr (activation == NormActivation::sigmoid) return g * y * (A(1) - y);
  return g;
}

template <class F> inline void with_activation(NormActivation activation, F&& f) {
  switch (activation) {
    case NormActivation::none: return f.template operator()<NormActivation::none>();
    case NormActivation::relu: return f.template operator()<NormActivation::relu>();
    case NormActivation::tanh: return f.template operator()<NormActivation::tanh>();
    case NormActivation::sigmoid: return f.template operator()<NormActivation::sigmoid>();
  }
}

// Position of element i of channel c, and how many there are.
struct Channel {
  int64_t begin, n, inner, step_n, step;
  Channel(const NormShape& s, int64_t c)
      : begin(s.channels_last ? c : c * s.inner), n(s.n), inner(s.inner), step_n(s.c * s.inner), step(s.channels_last ? s.c : 1) {}
  int64_t count() const { return n * inner; }
  template <class F> void each(F&& f) const {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < inner; ++j) f(begin + i * step_n + j * step);
  }
};

template <class T, NormActivation activation> void forward(const BatchNormArgs<T>& args) {
  using A = acc_t<T>;
  parallel_for(args.shape.c, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const Channel channel(args.shape, c);
      if (args.train) {
        const double shift = finite_or_zero(static_cast<double>(args.input[channel.begin]));
        Sum sums, all_squares;
        channel.each([&](int64_t i) {
          const double d = static_cast<double>(args.input[i]) - shift;
          sums += d;
          all_squares += d * d;
        });
        const double sum = sums.total(), squares = all_squares.total();
        const double count = static_cast<double>(channel.count());
        double var = (squares - sum * (sum / count)) / count;
        if (var < 0) var = 0;
        args.var[c] = var;
        args.mean[c] = static_cast<A>(shift + sum / count);
        args.invstd[c] = static_cast<A>(1.0 / std::sqrt(var + args.eps));
      }
      const A mean = args.mean[c], scale = args.weight ? args.invstd[c] * args.weight[c] : args.invstd[c];
      const A bias = args.bias ? args.bias[c] : A(0);
      channel.each([&](int64_t i) {
        A y = (static_cast<A>(args.input[i]) - mean) * scale + bias;
        if (args.residual) y += static_cast<A>(args.residual[i]);
        args.output[i] = static_cast<T>(activate<activation>(y));
      });
    }
  });
}

template <class T, NormActivation activation> void backward(const BatchNormBackwardArgs<T>& args) {
  using A = acc_t<T>;
  parallel_for(args.shape.c, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const Channel channel(args.shape, c);
      const A mean = args.mean[c];
      const double invstd = args.invstd[c];
      auto gradient = [&](int64_t i) {
        const A y = activation == NormActivation::none ? A(0) : static_cast<A>(args.output[i]);
        return activate_backward<activation>(static_cast<A>(args.grad_output[i]), y);
      };
      Sum sums, products;
      channel.each([&](int64_t i) {
        const double g = static_cast<double>(gradient(i));
        sums += g;
        products += g * static_cast<double>(static_cast<A>(args.input[i]) - mean);
      });
      const double sum = sums.total(), product = products.total();
      const double count = static_cast<double>(channel.count());
      args.grad_bias[c] = static_cast<A>(sum);
      args.grad_weight[c] = static_cast<A>(product * invstd);
      const A scale = static_cast<A>(args.weight ? invstd * static_cast<double>(args.weight[c]) : invstd);
      const A mean_gradient = args.train ? static_cast<A>(sum / count) : A(0);
      const A slope = args.train ? static_cast<A>(product / count * invstd * invstd) : A(0);
      channel.each([&](int64_t i) {
        const A g = gradient(i);
        if (args.grad_residual) args.grad_residual[i] = static_cast<T>(g);
        const A centred = args.train ? g - mean_gradient - (static_cast<A>(args.input[i]) - mean) * slope : g;
        args.grad_input[i] = static_cast<T>(centred * scale);
      });
    }
  });
}

}  // namespace

#define DLKERN_DEFINE_BATCH_NORM(T)                                                        \
  void batch_norm_forward(const BatchNormArgs<T>& args) {                                  \
    with_activation(args.activation, [&]<NormActivation a>() { forward<T, a>(args); });    \
  }                                                                                        \
  void batch_norm_backward(const BatchNormBackwardArgs<T>& args) {                         \
    with_activation(args.activation, [&]<NormActivation a>() { backward<T, a>(args); });   \
  }
DLKERN_DEFINE_BATCH_NORM(float)
DLKERN_DEFINE_BATCH_NORM(double)
DLKERN_DEFINE_BATCH_NORM(bfloat16)

}  // namespace dlkern::cpu::DLKERN_ISA
