// Max pooling, backward: grad_input of grad_output and the winners' indices. Each element sums the windows it won, in
// the windows' order, in float (double for float64); a window that names no tap of its own gives nothing.
// Small windows: a vector of neighbouring elements asks, tap by tap, the windows that tap belongs to whether it won.
// Large windows: a thread zeroes its planes and adds each window's gradient where its winner was.
// Floor: one read of the gradient and of the indices (a byte a window), one write.
#include <type_traits>

#include "pooling_window.h"

namespace dlkern::cpu::DLKERN_ISA {
namespace {

// kLanes<T> indices from p on; of which those before `limit` are read.
template <class T> inline Tag<T> load_tags(const uint8_t* p) { return to_tags<T>(load_vector<Bytes<T>>(p)); }
template <class T> inline Tag<T> load_tags(const int64_t* p) {
  return __builtin_convertvector(load_vector<Longs<T>>(p), Tag<T>);
}
template <class T, class Index> inline Tag<T> load_tags(const Index* p, const Index* limit) {
  if (limit - p >= kLanes<T>) return load_tags<T>(p);
  Index lanes[kLanes<T>] = {};
  if (p < limit) std::memcpy(lanes, p, static_cast<size_t>(limit - p) * sizeof(Index));
  return load_tags<T>(lanes);
}
template <class T> inline Bytes<T> load_bytes(const uint8_t* p, const uint8_t* limit) {
  if (limit - p >= kLanes<T>) return load_vector<Bytes<T>>(p);
  Bytes<T> bytes{};
  if (p < limit) std::memcpy(&bytes, p, static_cast<size_t>(limit - p));
  return bytes;
}
template <class T> inline Tag<T> load_kept(const uint8_t* p) { return load_tags<T>(p); }
template <class T> inline Tag<T> load_kept(const TagElement<T>* p) { return load_vector<Tag<T>>(p); }

// sum + value where tag is target.
template <class T> inline Vec<T> add_where(Vec<T> sum, Tag<T> tag, Tag<T> target, Vec<T> value) {
#if defined(__AVX512F__)
  if constexpr (sizeof(acc_t<T>) == 4) {
    const __mmask16 won = _mm512_cmpeq_epi32_mask((__m512i)tag, (__m512i)target);
    return (Vec<T>)_mm512_mask_add_ps((__m512)sum, won, (__m512)sum, (__m512)value);
  }
#endif
  return sum + (tag == target ? value : Vec<T>{});
}

// A row of output as gathers see it: the gradient and its tags (offsets as the bytes they are), with zeros around.
template <class T, class Index> struct GradientRows {
  using A = acc_t<T>;
  using Kept = std::conditional_t<sizeof(Index) == 1, uint8_t, TagElement<T>>;
  int64_t left, length;
  A* gradient;
  Kept* tag;
  static int64_t length_of(const PoolShape& s) {
    const int64_t columns = larger(s.out_w, ceil_div(s.w, s.stride_w) + ColumnTaps::right(s));
    return round_up(ColumnTaps::left(s) + columns, kLanes<T>) + 2 * kLanes<T>;
  }
  GradientRows(const PoolShape& s, int64_t slots)
      : left(ColumnTaps::left(s)),
        length(length_of(s)),
        gradient(scratch<A>(Slot::family_0, slots * length)),
        tag(scratch<Kept>(Slot::family_1, slots * length)) {
    std::memset(static_cast<void*>(gradient), 0, sizeof(A) * static_cast<size_t>(slots * length));
    std::memset(static_cast<void*>(tag), 0, sizeof(Kept) * static_cast<size_t>(slots * length));
  }
  void put(int64_t slot, const T* g, const T* g_end, const Index* index, const Index* index_end, int64_t count) {
    const int64_t to = slot * length + left;
    for (int64_t q = 0; q < count; q += kLanes<T>) {
      store(gradient + to + q, load_row(g + q, count - q, g_end, Vec<T>{}));
      if constexpr (sizeof(Index) == 1)
        store_vector(tag + to + q, load_bytes<T>(index + q, index_end));
      else
        store_vector(tag + to + q, load_tags<T>(index + q, index_end));
    }
  }
};

template <class T, class Index> void backward_tiles(const MaxPoolBackwardArgs<T>& args) {
  const PoolShape& s = args.shape;
  const Index* indices = static_cast<const Index*>(args.indices);
  const int64_t windows = s.n * s.c * s.out_h * s.out_w;
  parallel_for(s.n * s.c * s.out_h, grain_of(s.out_w * s.kernel_h), [&](int64_t begin, int64_t end) {
    const T* limit = args.grad_input + end * s.kernel_h * s.w;
    for (int64_t i = begin, p = begin % s.out_h; i < end; ++i) {
      for (int64_t r = 0; r < s.kernel_h; ++r)
        for (int64_t q = 0; q < s.out_w; q += kLanes<T>) {
          const int64_t at = i * s.out_w + q;
          const Vec<T> gradient = load_before(args.grad_output + at, args.grad_output + windows);
          const Tag<T> tag = load_tags<T>(indices + at, indices + windows);
          Tag<T> target = tags<T>(r * 2);
          if (sizeof(Index) > 1) target = tags<T>((p * s.kernel_h + r) * s.w + 2 * q) + iota<T>() * 2;
          store_pairs(args.grad_input + (i * s.kernel_h + r) * s.w + 2 * q,
                      add_where<T>(Vec<T>{}, tag, target, gradient), add_where<T>(Vec<T>{}, tag, target + 1, gradient),
                      limit);
        }
      if (++p == s.out_h) p = 0;
    }
  });
}

// stride: stride_w where it is 1 or 2, else 0.
template <class T, class Index, int stride> void gather_planes(const MaxPoolBackwardArgs<T>& args) {
  using A = acc_t<T>;
  constexpr bool offsets = sizeof(Index) == 1;
  const PoolShape& s = args.shape;
  const Index* indices = static_cast<const Index*>(args.indices);
  const int64_t windows = s.n * s.c * s.out_h * s.out_w, slots = RowRing::size_for(reach_of_output(s));
  const int64_t columns = ceil_div(s.w, s.stride_w), phase_length = round_up(columns, kLanes<T>);
  parallel_for(
      s.n * s.c * s.h, grain_of(s.w * larger(1, s.kernel_h * s.kernel_w / 4)), [&](int64_t begin, int64_t end) {
        GradientRows<T, Index> rows(s, slots);
        A* phases = stride == 0 ? scratch<A>(Slot::family_2, s.stride_w * phase_length) : nullptr;
        const int64_t for_columns = ColumnTaps::memory(s), for_rows = RowTaps::memory(s);
        int64_t* memory = scratch<int64_t>(
            Slot::family_3, for_columns + for_rows + 2 * s.kernel_h + 2 * s.kernel_h * s.kernel_w + slots);
        const ColumnTaps taps(s, memory);
        const RowTaps row_taps(s, memory + for_columns);
        int64_t *row_at = memory + for_columns + for_rows, *row_tag = row_at + s.kernel_h;
        int64_t *at = row_tag + s.kernel_h,
                *offset = at + s.kernel_h * s.kernel_w;  // of the windows that hold an element
        RowRing ring(slots, offset + s.kernel_h * s.kernel_w);
        auto lay = [&](int64_t row) {
          return ring.slot(row, [&](int64_t slot) {
            rows.put(slot, args.grad_output + row * s.out_w, args.grad_output + windows, indices + row * s.out_w,
                     indices + windows, s.out_w);
          });
        };
        const T* limit = args.grad_input + end * s.w;
        Walk row(begin % s.h, s.stride_h);
        for (int64_t i = begin, plane = begin / s.h; i < end; ++i) {
          const int64_t y = i - plane * s.h;
          int64_t count = 0;
          row_taps.each(row.m, row.e, s.out_h, [&](int64_t r, int64_t p) {
            row_at[count] = rows.left + rows.length * lay(plane * s.out_h + p);
            row_tag[count++] = r * s.kernel_w;
          });
          if (y + 1 == s.h) {
            row = Walk(0, s.stride_h);
            ++plane;
          } else {
            row.next();
            row_taps.each(row.m, row.e, s.out_h, [&](int64_t, int64_t p) { lay(plane * s.out_h + p); });
          }
          // Those of columns e, stride + e, …, relative to a column's number; column e's are [taps.start[e] * count, …).
          for (int64_t e = 0, j = 0; e < taps.classes; ++e)
            for (int64_t k = 0; k < count; ++k)
              for (int64_t t = taps.start[e]; t < taps.start[e + 1]; ++t, ++j) {
                at[j] = row_at[k] + taps.shift[t];
                offset[j] = row_tag[k] + taps.tap[t];
              }
          // The sums of columns e, stride + e, … from number m on.
          auto gather = [&](int64_t e, int64_t m) {
            const int64_t last = taps.start[e + 1] * count;
            const auto* tag = rows.tag + m;
            const A* gradient = rows.gradient + m;
            Vec<T> sum{};
            Tag<T> target = tags<T>(y * s.w + e + m * s.stride_w) + iota<T>() * static_cast<TagElement<T>>(s.stride_w);
            for (int64_t j = taps.start[e] * count; j < last; ++j) {
              if (offsets) target = tags<T>(offset[j]);
              sum = add_where<T>(sum, load_kept<T>(tag + at[j]), target, load(gradient + at[j]));
            }
            return sum;
          };
          T* dx = args.grad_input + i * s.w;
          if constexpr (stride == 1) {
            for (int64_t m = 0; m < columns; m += kLanes<T>) store_before(dx + m, gather(0, m), limit);
          } else if constexpr (stride == 2) {
            for (int64_t m = 0; m < columns; m += kLanes<T>)
              store_pairs<T>(dx + 2 * m, gather(0, m), gather(1, m), limit);
          } else {
            for (int64_t e = 0; e < taps.classes; ++e)
              for (int64_t m = 0; m < columns; m += kLanes<T>) store(phases + e * phase_length + m, gather(e, m));
            for (int64_t x = 0, m = 0, e = 0; x < s.w; ++x) {
              dx[x] = static_cast<T>(phases[e * phase_length + m]);
              if (++e == s.stride_w) e = 0, ++m;
            }
          }
        }
      });
}

template <class T, class Index> void gather_pixels(const MaxPoolBackwardArgs<T>& args) {
  constexpr bool offsets = sizeof(Index) == 1;
  const PoolShape& s = args.shape;
  const Index* indices = static_cast<const Index*>(args.indices);
  const int64_t windows = s.n * s.out_h * s.out_w * s.c;
  const T* gradient_end = args.grad_output + windows;
  const Index* index_end = indices + windows;
  parallel_for(s.n * s.h, grain_of(s.w * ceil_div(s.c, kLanes<T>) * larger(1, s.kernel_h * s.kernel_w / 2)),
               [&](int64_t begin, int64_t end) {
                 const int64_t for_columns = ColumnTaps::memory(s), for_rows = RowTaps::memory(s);
                 int64_t* memory = scratch<int64_t>(
                     Slot::family_3, for_columns + for_rows + 2 * s.kernel_h + 2 * s.kernel_h * s.kernel_w);
                 const ColumnTaps taps(s, memory);
                 const RowTaps row_taps(s, memory + for_columns);
                 int64_t *row_at = memory + for_columns + for_rows, *row_tag = row_at + s.kernel_h;
                 int64_t *at = row_tag + s.kernel_h,
                         *target = at + s.kernel_h * s.kernel_w;  // of the windows that hold a pixel
                 const T* limit = args.grad_input + end * s.w * s.c;
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t y = i % s.h;
                   int64_t rows = 0;
                   row_taps.each(y / s.stride_h, y % s.stride_h, s.out_h, [&](int64_t r, int64_t p) {
                     row_at[rows] = (i / s.h * s.out_h + p) * s.out_w;
                     row_tag[rows++] = r * s.kernel_w;
                   });
                   Walk column(0, s.stride_w);
                   for (int64_t x = 0; x < s.w; ++x, column.next()) {
                     int64_t count = 0;
                     for (int64_t k = 0; k < rows; ++k)
                       taps.each(column.m, column.e, s.out_w, [&](int64_t t, int64_t q) {
                         at[count] = (row_at[k] + q) * s.c;
                         target[count++] = offsets ? row_tag[k] + t : y * s.w + x;
                       });
                     T* dx = args.grad_input + (i * s.w + x) * s.c;
                     int64_t c = 0;
                     for (; c + 4 * kLanes<T> <= s.c; c += 4 * kLanes<T>) {
                       Vec<T> sum[4] = {};
                       for (int64_t k = 0; k < count; ++k)
#pragma GCC unroll 4
                         for (int v = 0; v < 4; ++v) {
                           const int64_t from = at[k] + c + v * kLanes<T>;
                           sum[v] = add_where<T>(sum[v], load_tags<T>(indices + from), tags<T>(target[k]),
                                                 load(args.grad_output + from));
                         }
#pragma GCC unroll 4
                       for (int v = 0; v < 4; ++v) {
                         prefetch_ahead_to_store(dx + c + v * kLanes<T>);
                         store(dx + c + v * kLanes<T>, sum[v]);
                       }
                     }
                     for (; c < s.c; c += kLanes<T>) {
                       Vec<T> sum{};
                       for (int64_t k = 0; k < count; ++k) {
                         const int64_t from = at[k] + c;
                         sum = add_where<T>(sum, load_tags<T>(indices + from, index_end), tags<T>(target[k]),
                                            load_before(args.grad_output + from, gradient_end));
                       }
                       store_before(dx + c, sum, limit);
                     }
                   }
                 }
               });
}

// A group of channels of an image at a time. Sums are carried in grad_input itself, or, of 16-bit types, in scratch.
template <class T, class Index> void scatter(const MaxPoolBackwardArgs<T>& args) {
  using A = acc_t<T>;
  constexpr bool offsets = sizeof(Index) == 1, in_place = sizeof(T) == sizeof(A);
  const PoolShape& s = args.shape;
  const Index* indices = static_cast<const Index*>(args.indices);
  const Steps in(s.c, s.h, s.w, s.channels_last), out(s.c, s.out_h, s.out_w, s.channels_last);
  const int64_t plane = s.h * s.w;
  const int64_t group = s.channels_last ? smaller(s.c, smaller(32, larger(1, 65536 / plane))) : 1,
                groups = ceil_div(s.c, group);
  const int64_t step = in_place ? in.x : group;  // between the sums of neighbouring pixels
  parallel_for(s.n * groups, grain_of(group * plane), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / groups, c0 = i % groups * group, channels = smaller(group, s.c - c0);
      T* dx = args.grad_input + n * in.n + c0 * in.c;
      A* sums;
      if constexpr (in_place)
        sums = dx;
      else
        sums = scratch<A>(Slot::family_0, group * plane);
      for (int64_t k = 0; k < plane; ++k)
        for (int64_t c = 0; c < channels; ++c) sums[k * step + c] = A(0);
      for (int64_t p = 0; p < s.out_h; ++p)
        for (int64_t q = 0; q < s.out_w; ++q) {
          const int64_t o = n * out.n + c0 * out.c + p * out.y + q * out.x;
          const int64_t y0 = p * s.stride_h - s.pad_h, x0 = q * s.stride_w - s.pad_w;
          for (int64_t c = 0; c < channels; ++c) {
            const int64_t index = static_cast<int64_t>(indices[o + c]);
            if (offsets ? index >= s.kernel_h * s.kernel_w : index < 0 || index >= plane) continue;
            const int64_t y = offsets ? y0 + index / s.kernel_w * s.dilation_h : index / s.w;
            const int64_t x = offsets ? x0 + index % s.kernel_w * s.dilation_w : index % s.w;
            if (y >= 0 && y < s.h && x >= 0 && x < s.w)
              sums[(y * s.w + x) * step + c] += static_cast<A>(args.grad_output[o + c]);
          }
        }
      if constexpr (!in_place)
        for (int64_t k = 0; k < plane; ++k)
          for (int64_t c = 0; c < channels; ++c) dx[k * in.x + c] = static_cast<T>(sums[k * step + c]);
    }
  });
}

template <class T, class Index> void backward(const MaxPoolBackwardArgs<T>& args) {
  const PoolShape& s = args.shape;
  // A gather asks kernel_h * kernel_w questions a vector, a scatter does a few steps a window.
  constexpr int64_t kMost = 4 * kLanes<T>;
  if (s.kernel_h > kMost || s.kernel_w > kMost || s.kernel_h * s.kernel_w > kMost || s.stride_w > 4096)
    scatter<T, Index>(args);
  else if (s.channels_last)
    gather_pixels<T, Index>(args);
  else if (tiles(s))
    backward_tiles<T, Index>(args);
  else if (!rows_fit<T>(s))
    scatter<T, Index>(args);
  else if (s.stride_w == 1)
    gather_planes<T, Index, 1>(args);
  else if (s.stride_w == 2)
    gather_planes<T, Index, 2>(args);
  else
    gather_planes<T, Index, 0>(args);
}

template <class T> void backward(const MaxPoolBackwardArgs<T>& args) {
  args.kind == IndexKind::flat64 ? backward<T, int64_t>(args) : backward<T, uint8_t>(args);
}

}  // namespace

void max_pool2d_backward(const MaxPoolBackwardArgs<float>& args) { backward(args); }
void max_pool2d_backward(const MaxPoolBackwardArgs<double>& args) { backward(args); }
void max_pool2d_backward(const MaxPoolBackwardArgs<bfloat16>& args) { backward(args); }
void max_pool2d_backward(const MaxPoolBackwardArgs<float16>& args) { backward(args); }

}  // namespace dlkern::cpu::DLKERN_ISA
