// Power-average pooling over [n, c, h, w], forward and backward: y = (sum of x^norm over the window)^(1 / norm). A window
// cut off by the end of the input (ceil_mode) counts its mean times the whole window's size, as in torch.
// Sums and powers are in double, so that x^norm overflows only where float64's does. Rows are powered and added in
// vectors (of neighbouring pixels, or of pixels and channels in channels_last), then columns, then roots are taken.
// Backward, with m the mean: dy / (norm m') (m' = size m)^(1 / norm - 1) is made once a window, rows and columns of
// windows are added for each element, and its own norm x^(norm - 1) comes last.
#include "pooling_window.h"

namespace dlkern::cpu::DLKERN_ISA {
namespace {

// v^exponent as pow() has it: small whole exponents and the square root without it.
class Power {
 public:
  explicit Power(double exponent)
      : exponent_(exponent),
        whole_(exponent >= -8 && exponent <= 8 ? static_cast<int>(exponent) : 0),
        kind_(static_cast<double>(whole_) == exponent ? Kind::whole
              : exponent == 0.5                       ? Kind::root
              : exponent == -0.5                      ? Kind::inverse_root
                                                      : Kind::other) {}
  vdouble operator()(vdouble v) const {
    switch (kind_) {
      case Kind::whole: {
        vdouble result = vdouble{} + 1.0;
        for (int i = 0; i < (whole_ < 0 ? -whole_ : whole_); ++i) result *= v;
        return whole_ < 0 ? 1.0 / result : result;
      }
      case Kind::root: return square_root(v);
      case Kind::inverse_root: return 1.0 / square_root(v);
      case Kind::other: break;
    }
    for (int i = 0; i < kWide; ++i) v[i] = __builtin_pow(v[i], exponent_);
    return v;
  }

 private:
  enum class Kind { whole, root, inverse_root, other };
  double exponent_;
  int whole_;
  Kind kind_;
};

// Planes of rows, a row's pixels (and their channels) side by side.
struct Rows {
  int64_t inner, planes, length, out_length;
  explicit Rows(const PoolShape& s)
      : inner(s.channels_last ? s.c : 1),
        planes(s.channels_last ? s.n : s.n * s.c),
        length(s.w * inner),
        out_length(s.out_w * inner) {}
};

// Sums over windows of one output row, times the whole window's size over the sizes there are: those sizes' ratio goes to
// `shares`. `line`, `sums` and `shares` reach kWide elements beyond their rows.
template <class T>
inline void window_sums(const PoolShape& s, const Rows& rows, const T* x, const T* input_end, int64_t p,
                        const Power& power, double* line, double* sums, double* shares) {
  const int64_t y0 = p * s.stride_h, y1 = smaller(y0 + s.kernel_h, s.h);
  for (int64_t k = 0; k < rows.length; k += kWide) {
    vdouble sum = power(load_wide_before(x + y0 * rows.length + k, input_end));
    for (int64_t y = y0 + 1; y < y1; ++y) sum += power(load_wide_before(x + y * rows.length + k, input_end));
    store(line + k, sum);
  }
  const double size = static_cast<double>(s.kernel_h) * static_cast<double>(s.kernel_w);
  for (int64_t q = 0; q < s.out_w; ++q) {
    const int64_t x0 = q * s.stride_w, x1 = smaller(x0 + s.kernel_w, s.w);
    const double share = size / static_cast<double>((y1 - y0) * (x1 - x0));
    if (rows.inner == 1) {
      double sum = 0;
      for (int64_t ix = x0; ix < x1; ++ix) sum += line[ix];
      sums[q] = sum * share;
      shares[q] = share;
      continue;
    }
    for (int64_t c = 0; c < rows.inner; c += kWide) {
      vdouble sum = load(line + x0 * rows.inner + c);
      for (int64_t ix = x0 + 1; ix < x1; ++ix) sum += load(line + ix * rows.inner + c);
      store(sums + q * rows.inner + c, sum * share);
      store(shares + q * rows.inner + c, vdouble{} + share);
    }
  }
}

template <class T> void forward(const LpPoolArgs<T>& args) {
  const PoolShape& s = args.shape;
  const Rows rows(s);
  const T* input_end = args.input + rows.planes * s.h * rows.length;
  const Power power(args.norm), root(1.0 / args.norm);
  parallel_for(rows.planes * s.out_h, grain_of(s.kernel_h * rows.length), [&](int64_t begin, int64_t end) {
    double* line = scratch<double>(Slot::family_0, rows.length + 2 * kWide);
    double* sums = scratch<double>(Slot::family_1, rows.out_length + 2 * kWide);
    double* shares = scratch<double>(Slot::family_2, rows.out_length + 2 * kWide);
    for (int64_t i = begin; i < end; ++i) {
      const T* x = args.input + i / s.out_h * s.h * rows.length;
      window_sums(s, rows, x, input_end, i % s.out_h, power, line, sums, shares);
      T* y = args.output + i * rows.out_length;
      for (int64_t k = 0; k < rows.out_length; k += kWide)
        store_narrow(y + k, root(load(sums + k)), rows.out_length - k);
    }
  });
}

template <class T> void backward(const LpPoolBackwardArgs<T>& args) {
  const PoolShape& s = args.shape;
  const Rows rows(s);
  const T* input_end = args.input + rows.planes * s.h * rows.length;
  const T* gradient_end = args.grad_output + rows.planes * s.out_h * rows.out_length;
  const double inverse = 1.0 / args.norm;
  const Power power(args.norm), root_slope(inverse - 1.0), power_slope(args.norm - 1.0);
  parallel_for(rows.planes * s.out_h, grain_of(s.kernel_h * rows.length), [&](int64_t begin, int64_t end) {
    double* line = scratch<double>(Slot::family_0, rows.length + 2 * kWide);
    double* sums = scratch<double>(Slot::family_1, rows.out_length + 2 * kWide);
    double* shares = scratch<double>(Slot::family_2, rows.out_length + 2 * kWide);
    const double* limit = args.slopes + end * rows.out_length;
    for (int64_t i = begin; i < end; ++i) {
      const T* x = args.input + i / s.out_h * s.h * rows.length;
      window_sums(s, rows, x, input_end, i % s.out_h, power, line, sums, shares);
      double* slopes = args.slopes + i * rows.out_length;
      const T* gradient = args.grad_output + i * rows.out_length;
      for (int64_t k = 0; k < rows.out_length; k += kWide) {
        const vdouble sum = load(sums + k);
        const vdouble slope =
            load_wide_before(gradient + k, gradient_end) * (inverse * root_slope(sum)) * load(shares + k);
        // As in torch: nothing from a sum of zero, and of one that is NaN nothing but a slope's own NaN.
        const vdouble some = sum == 0.0 ? vdouble{} : sum != sum ? slope * 0.0 : slope;
        if (limit - (slopes + k) >= kWide)
          store(slopes + k, some);
        else
          std::memcpy(slopes + k, &some, sizeof(double) * static_cast<size_t>(limit - (slopes + k)));
      }
    }
  });
  parallel_for(rows.planes * s.h, grain_of(2 * rows.length), [&](int64_t begin, int64_t end) {
    double* sums = scratch<double>(Slot::family_1, rows.out_length + 2 * kWide);
    double* line = scratch<double>(Slot::family_0, rows.length + 2 * kWide);
    const double* slopes_end = args.slopes + rows.planes * s.out_h * rows.out_length;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t y = i % s.h;
      const int64_t p0 = larger(0, ceil_div(y - s.kernel_h + 1, s.stride_h)), p1 = smaller(y / s.stride_h, s.out_h - 1);
      const double* slopes = args.slopes + i / s.h * s.out_h * rows.out_length;
      for (int64_t k = 0; k < rows.out_length; k += kWide) {
        vdouble sum{};
        for (int64_t p = p0; p <= p1; ++p) sum += load_wide_before(slopes + p * rows.out_length + k, slopes_end);
        store(sums + k, sum);
      }
      for (int64_t ix = 0; ix < s.w; ++ix) {
        const int64_t q0 = larger(0, ceil_div(ix - s.kernel_w + 1, s.stride_w)),
                      q1 = smaller(ix / s.stride_w, s.out_w - 1);
        if (rows.inner == 1) {
          double sum = 0;
          for (int64_t q = q0; q <= q1; ++q) sum += sums[q];
          line[ix] = sum;
          continue;
        }
        for (int64_t c = 0; c < rows.inner; c += kWide) {
          vdouble sum{};
          for (int64_t q = q0; q <= q1; ++q) sum += load(sums + q * rows.inner + c);
          store(line + ix * rows.inner + c, sum);
        }
      }
      const T* x = args.input + i * rows.length;
      T* dx = args.grad_input + i * rows.length;
      for (int64_t k = 0; k < rows.length; k += kWide)
        store_narrow(dx + k, load(line + k) * (args.norm * power_slope(load_wide_before(x + k, input_end))),
                     rows.length - k);
    }
  });
}

}  // namespace

void lp_pool2d_forward(const LpPoolArgs<float>& args) { forward(args); }
void lp_pool2d_forward(const LpPoolArgs<double>& args) { forward(args); }
void lp_pool2d_forward(const LpPoolArgs<bfloat16>& args) { forward(args); }
void lp_pool2d_forward(const LpPoolArgs<float16>& args) { forward(args); }
void lp_pool2d_backward(const LpPoolBackwardArgs<float>& args) { backward(args); }
void lp_pool2d_backward(const LpPoolBackwardArgs<double>& args) { backward(args); }
void lp_pool2d_backward(const LpPoolBackwardArgs<bfloat16>& args) { backward(args); }
void lp_pool2d_backward(const LpPoolBackwardArgs<float16>& args) { backward(args); }

}  // namespace dlkern::cpu::DLKERN_ISA
