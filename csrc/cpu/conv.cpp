// conv2d, its gradients: the plain loops.
#include "conv.h"

#include "parallel.h"
#include "simd.h"

namespace dlkern::cpu::DLKERN_ISA {
namespace {

// Element strides of a dense 4-D tensor.
struct Strides {
  int64_t a, b, c, d;
};
inline Strides strides_of(bool channels_last, int64_t b, int64_t c, int64_t d) {
  return channels_last ? Strides{b * c * d, 1, d * b, b} : Strides{b * c * d, c * d, d, 1};
}
inline Strides input_strides(const ConvShape& z, bool last) { return strides_of(last, z.c, z.h, z.w); }
inline Strides output_strides(const ConvShape& z, bool last) { return strides_of(last, z.k, z.p, z.q); }
inline Strides weight_strides(const ConvShape& z, bool last) { return strides_of(last, z.c / z.groups, z.r, z.s); }

template <class T> void forward(const ConvForwardArgs<T>& args) {
  using A = double;
  const ConvShape& z = args.shape;
  const Strides x = input_strides(z, args.input_channels_last), y = output_strides(z, args.output_channels_last),
                w = weight_strides(z, args.weight_channels_last);
  const int64_t group_c = z.c / z.groups, group_k = z.k / z.groups;
  parallel_for(z.n * z.k, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / z.k, k = i % z.k, c0 = k / group_k * group_c;
      for (int64_t p = 0; p < z.p; ++p)
        for (int64_t q = 0; q < z.q; ++q) {
          A sum = 0;
          for (int64_t r = 0; r < z.r; ++r) {
            const int64_t h = p * z.stride_h - z.pad_h + r * z.dilation_h;
            if (h < 0 || h >= z.h) continue;
            for (int64_t s = 0; s < z.s; ++s) {
              const int64_t v = q * z.stride_w - z.pad_w + s * z.dilation_w;
              if (v < 0 || v >= z.w) continue;
              const T* px = args.input + n * x.a + c0 * x.b + h * x.c + v * x.d;
              const T* pw = args.weight + k * w.a + r * w.c + s * w.d;
              for (int64_t c = 0; c < group_c; ++c) sum += static_cast<A>(px[c * x.b]) * static_cast<A>(pw[c * w.b]);
            }
          }
          if (args.bias) sum += static_cast<A>(args.bias[k]);
          args.output[n * y.a + k * y.b + p * y.c + q * y.d] = static_cast<T>(sum);
        }
    }
  });
}

template <class T> void backward_input(const ConvBackwardInputArgs<T>& args) {
  using A = double;
  const ConvShape& z = args.shape;
  const Strides x = input_strides(z, args.grad_input_channels_last),
                y = output_strides(z, args.grad_output_channels_last),
                w = weight_strides(z, args.weight_channels_last);
  const int64_t group_c = z.c / z.groups, group_k = z.k / z.groups;
  parallel_for(z.n * z.c, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / z.c, c = i % z.c, k0 = c / group_c * group_k;
      for (int64_t h = 0; h < z.h; ++h)
        for (int64_t v = 0; v < z.w; ++v) {
          A sum = 0;
          for (int64_t r = 0; r < z.r; ++r) {
            const int64_t up = h + z.pad_h - r * z.dilation_h;
            if (up < 0 || up % z.stride_h || up / z.stride_h >= z.p) continue;
            for (int64_t s = 0; s < z.s; ++s) {
              const int64_t left = v + z.pad_w - s * z.dilation_w;
              if (left < 0 || left % z.stride_w || left / z.stride_w >= z.q) continue;
              const T* py = args.grad_output + n * y.a + k0 * y.b + up / z.stride_h * y.c + left / z.stride_w * y.d;
              const T* pw = args.weight + k0 * w.a + c % group_c * w.b + r * w.c + s * w.d;
              for (int64_t k = 0; k < group_k; ++k) sum += static_cast<A>(py[k * y.b]) * static_cast<A>(pw[k * w.a]);
            }
          }
          args.grad_input[n * x.a + c * x.b + h * x.c + v * x.d] = static_cast<T>(sum);
        }
    }
  });
}

template <class T> void backward_weight(const ConvBackwardWeightArgs<T>& args) {
  using A = double;
  const ConvShape& z = args.shape;
  const Strides x = input_strides(z, args.input_channels_last), y = output_strides(z, args.grad_output_channels_last),
                w = weight_strides(z, args.grad_weight_channels_last);
  const int64_t group_c = z.c / z.groups, group_k = z.k / z.groups;
  parallel_for(z.k, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t c0 = k / group_k * group_c;
      for (int64_t c = 0; c < group_c; ++c)
        for (int64_t r = 0; r < z.r; ++r)
          for (int64_t s = 0; s < z.s; ++s) {
            A sum = 0;
            for (int64_t n = 0; n < z.n; ++n) {
              A image = 0;
              for (int64_t p = 0; p < z.p; ++p) {
                const int64_t h = p * z.stride_h - z.pad_h + r * z.dilation_h;
                if (h < 0 || h >= z.h) continue;
                for (int64_t q = 0; q < z.q; ++q) {
                  const int64_t v = q * z.stride_w - z.pad_w + s * z.dilation_w;
                  if (v < 0 || v >= z.w) continue;
                  image += static_cast<A>(args.grad_output[n * y.a + k * y.b + p * y.c + q * y.d]) *
                           static_cast<A>(args.input[n * x.a + (c0 + c) * x.b + h * x.c + v * x.d]);
                }
              }
              sum += image;
            }
            args.grad_weight[k * w.a + c * w.b + r * w.c + s * w.d] = static_cast<T>(sum);
          }
      if (args.grad_bias) {
        A sum = 0;
        for (int64_t n = 0; n < z.n; ++n) {
          A image = 0;
          for (int64_t p = 0; p < z.p; ++p)
            for (int64_t q = 0; q < z.q; ++q)
              image += static_cast<A>(args.grad_output[n * y.a + k * y.b + p * y.c + q * y.d]);
          sum += image;
        }
        args.grad_bias[k] = static_cast<T>(sum);
      }
    }
  });
}

}  // namespace

#define DLKERN_DEFINE_CONV(T)                                                                      \
  void conv2d_forward(const ConvForwardArgs<T>& args) { forward(args); }                           \
  void conv2d_backward_input(const ConvBackwardInputArgs<T>& args) { backward_input(args); }       \
  void conv2d_backward_weight(const ConvBackwardWeightArgs<T>& args) { backward_weight(args); }
DLKERN_DEFINE_CONV(float)
DLKERN_DEFINE_CONV(double)
DLKERN_DEFINE_CONV(bfloat16)
#undef DLKERN_DEFINE_CONV

}  // namespace dlkern::cpu::DLKERN_ISA
