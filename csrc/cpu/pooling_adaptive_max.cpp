// Adaptive max pooling over [n, c, h, w], forward and backward, with torch's int64 indices.
// Forward: the rows of a window are reduced first, whole rows at a time in vectors (of neighbouring pixels, or of
// pixels and channels in channels_last), each element with the row it came from; then the columns, where that row and
// the column decide between equals as a plain scan would: the first of equal elements, the last NaN.
// Backward: indices name one element each, so gradients are added where they point, a plane (or 16 channels of an
// image) at a time, in a fixed order. Floor: one read, one write.
#include "pooling_window.h"

namespace dlkern::cpu::DLKERN_ISA {
namespace {

// (best, place) of a scan that also met `value` at `value_place`, whichever came first.
template <class T>
inline void join(Vec<T> value, Tag<T> value_place, Vec<T>& best, Tag<T>& place) {
  const auto nan = value != value, best_nan = best != best;
  const auto later = value_place > place, earlier = value_place < place;
  const auto won = (nan & (~best_nan | later)) | (~best_nan & ((value > best) | ((value == best) & earlier)));
  best = won ? value : best;
  place = won ? value_place : place;
}
template <class A> inline void join(A value, int64_t value_place, A& best, int64_t& place) {
  const bool nan = value != value, best_nan = best != best;
  const bool won =
      nan ? !best_nan || value_place > place : !best_nan && (value > best || (value == best && value_place < place));
  if (won) best = value, place = value_place;
}

template <class T> void forward(const AdaptiveMaxPoolArgs<T>& args) {
  using A = acc_t<T>;
  const PoolShape& s = args.shape;
  const int64_t inner = s.channels_last ? s.c : 1, planes = s.channels_last ? s.n : s.n * s.c;
  const int64_t length = s.w * inner, out_length = s.out_w * inner, padded = round_up(length, kLanes<T>) + kLanes<T>;
  const bool in_vectors = inner > 1 && s.h * s.w < (int64_t{1} << 31);
  const T* input_end = args.input + planes * s.h * length;
  parallel_for(planes * s.out_h, grain_of(ceil_div(s.h, s.out_h) * length), [&](int64_t begin, int64_t end) {
    A* values = scratch<A>(Slot::family_0, padded);
    TagElement<T>* rows = scratch<TagElement<T>>(Slot::family_1, padded);
    const int64_t limit = end * out_length;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t p = i % s.out_h, y0 = begin_of(p, s.h, s.out_h), y1 = end_of(p, s.h, s.out_h);
      const T* x = args.input + i / s.out_h * s.h * length;
      for (int64_t k = 0; k < length; k += kLanes<T>) {
        Vec<T> best = load_before(x + y0 * length + k, input_end);
        Tag<T> row = tags<T>(y0);
        for (int64_t y = y0 + 1; y < y1; ++y)
          challenge<T, true>(load_before(x + y * length + k, input_end), tags<T>(y), best, row);
        store(values + k, best);
        store_vector(rows + k, row);
      }
      for (int64_t q = 0; q < s.out_w; ++q) {
        const int64_t x0 = begin_of(q, s.w, s.out_w), x1 = end_of(q, s.w, s.out_w);
        const int64_t to = i * out_length + q * inner;
        if (in_vectors) {
          const TagElement<T> width = static_cast<TagElement<T>>(s.w);
          for (int64_t c = 0; c < inner; c += kLanes<T>) {
            Vec<T> best = load(values + x0 * inner + c);
            Tag<T> place = load_vector<Tag<T>>(rows + x0 * inner + c) * width + tags<T>(x0);
            for (int64_t ix = x0 + 1; ix < x1; ++ix)
              join<T>(load(values + ix * inner + c), load_vector<Tag<T>>(rows + ix * inner + c) * width + tags<T>(ix),
                      best, place);
            store_before(args.output + to + c, best, args.output + limit);
            const Longs<T> places = __builtin_convertvector(place, Longs<T>);
            if (limit - to - c >= kLanes<T>)
              store_vector(args.indices + to + c, places);
            else
              std::memcpy(args.indices + to + c, &places, 8 * static_cast<size_t>(limit - to - c));
          }
        } else {
          for (int64_t c = 0; c < inner; ++c) {
            A best = values[x0 * inner + c];
            int64_t place = rows[x0 * inner + c] * s.w + x0;
            for (int64_t ix = x0 + 1; ix < x1; ++ix)
              join(values[ix * inner + c], rows[ix * inner + c] * s.w + ix, best, place);
            args.output[to + c] = static_cast<T>(best);
            args.indices[to + c] = place;
          }
        }
      }
    }
  });
}

template <class T> void backward(const AdaptiveMaxPoolBackwardArgs<T>& args) {
  using A = acc_t<T>;
  const PoolShape& s = args.shape;
  constexpr int64_t kMost = int64_t{1} << 20;  // elements of scratch memory
  const int64_t inner = s.channels_last ? s.c : 1, planes = s.channels_last ? s.n : s.n * s.c;
  const int64_t pixels = s.h * s.w, windows = s.out_h * s.out_w;
  const int64_t together = larger(1, smaller(smaller(inner, 16), kMost / pixels)), groups = ceil_div(inner, together);
  parallel_for(planes * groups, grain_of((pixels + windows) * together), [&](int64_t begin, int64_t end) {
    A* sums = scratch<A>(Slot::family_0, pixels * together);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t c0 = task % groups * together, channels = smaller(together, inner - c0), plane = task / groups;
      std::memset(sums, 0, sizeof(A) * static_cast<size_t>(pixels * together));
      for (int64_t o = 0; o < windows; ++o) {
        const int64_t at = (plane * windows + o) * inner + c0;
        for (int64_t c = 0; c < channels; ++c) {
          const int64_t place = args.indices[at + c];
          if (place >= 0 && place < pixels) sums[place * together + c] += static_cast<A>(args.grad_output[at + c]);
        }
      }
      T* dx = args.grad_input + plane * pixels * inner + c0;
      for (int64_t i = 0; i < pixels; ++i)
        for (int64_t c = 0; c < channels; ++c) dx[i * inner + c] = static_cast<T>(sums[i * together + c]);
    }
  });
}

}  // namespace

void adaptive_max_pool2d_forward(const AdaptiveMaxPoolArgs<float>& args) { forward(args); }
void adaptive_max_pool2d_forward(const AdaptiveMaxPoolArgs<double>& args) { forward(args); }
void adaptive_max_pool2d_forward(const AdaptiveMaxPoolArgs<bfloat16>& args) { forward(args); }
void adaptive_max_pool2d_forward(const AdaptiveMaxPoolArgs<float16>& args) { forward(args); }
void adaptive_max_pool2d_backward(const AdaptiveMaxPoolBackwardArgs<float>& args) { backward(args); }
void adaptive_max_pool2d_backward(const AdaptiveMaxPoolBackwardArgs<double>& args) { backward(args); }
void adaptive_max_pool2d_backward(const AdaptiveMaxPoolBackwardArgs<bfloat16>& args) { backward(args); }
void adaptive_max_pool2d_backward(const AdaptiveMaxPoolBackwardArgs<float16>& args) { backward(args); }

}  // namespace dlkern::cpu::DLKERN_ISA
