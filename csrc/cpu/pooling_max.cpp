// Max pooling over [n, c, h, w], forward: the largest element of each window and, where asked for, which one it is.
// Contiguous planes: the maximum is separable. Each input row is reduced along its windows once, neighbouring windows
// in a vector, and output rows combine the rows they cover. Taps are met in the order a plain scan meets them, so that
// the first of equal elements and the last NaN win there too.
// channels_last: a vector holds the channels of a pixel, and every tap is a load.
// Floor: one read of the input, one write of the output and of a byte a window.
#include "pooling_window.h"

namespace dlkern::cpu::DLKERN_ISA {
namespace {

template <class T, IndexKind kind> inline void store_indices(void* indices, int64_t at, Tag<T> tag, int64_t limit) {
  if constexpr (kind == IndexKind::offset8) {
    const Bytes<T> bytes = to_bytes<T>(tag);
    uint8_t* to = static_cast<uint8_t*>(indices) + at;
    if (limit - at >= kLanes<T>)
      store_vector(to, bytes);
    else if (limit > at)
      std::memcpy(to, &bytes, static_cast<size_t>(limit - at));
  }
  if constexpr (kind == IndexKind::flat64) {
    const Longs<T> longs = __builtin_convertvector(tag, Longs<T>);
    int64_t* to = static_cast<int64_t*>(indices) + at;
    if (limit - at >= kLanes<T>)
      store_vector(to, longs);
    else if (limit > at)
      std::memcpy(to, &longs, 8 * static_cast<size_t>(limit - at));
  }
}

// A tag is the window's offset r * kernel_w + t, or the element's place y * w + x: a part of the row's and one of the
// column's.
template <IndexKind kind> inline int64_t row_tag(const PoolShape& s, int64_t y0, int64_t r) {
  return kind == IndexKind::flat64 ? (y0 + r * s.dilation_h) * s.w : r * s.kernel_w;
}
template <IndexKind kind> inline int64_t column_tag(const PoolShape& s, int64_t x0, int64_t t) {
  return kind == IndexKind::flat64 ? x0 + t * s.dilation_w : t;
}

template <class T, IndexKind kind> void forward_planes(const MaxPoolArgs<T>& args) {
  using A = acc_t<T>;
  constexpr bool tagged = kind != IndexKind::none;
  constexpr A kLowest = -static_cast<A>(__builtin_inf());
  const PoolShape& s = args.shape;
  const int64_t width = round_up(s.out_w, kLanes<T>), slots = RowRing::size_for(reach_of_input(s)),
                size = PhasedRows<T>::size(s);
  const T* input_end = args.input + s.n * s.c * s.h * s.w;
  parallel_for(s.n * s.c * s.out_h, grain_of(s.out_w * (s.kernel_h + s.kernel_w)), [&](int64_t begin, int64_t end) {
    PhasedRows<T> lines(s, slots, scratch<A>(Slot::family_0, slots * size), kLowest);
    A* values = scratch<A>(Slot::family_1, slots * width);
    TagElement<T>* tag_rows = scratch<TagElement<T>>(Slot::family_2, (slots + 1) * width);
    TagElement<T>* first = tag_rows + slots * width;  // the tag of each window's first tap inside the row
    int64_t* taps = scratch<int64_t>(Slot::family_3, 2 * slots + s.kernel_w + 2 * s.kernel_h);
    int64_t *row_at = taps + s.kernel_w, *tag_at = row_at + s.kernel_h;
    RowRing laid(slots, tag_at + s.kernel_h), ring(slots, tag_at + s.kernel_h + slots);
    for (int64_t t = 0; t < s.kernel_w; ++t) taps[t] = lines.tap(t, s.dilation_w);
    for (int64_t q = 0; q < width; ++q) {
      const int64_t x0 = q * s.stride_w - s.pad_w;
      first[q] = static_cast<TagElement<T>>(column_tag<kind>(s, x0, Taps(x0, s.w, s.kernel_w, s.dilation_w).begin));
    }
    // The padding holds minus infinity, which never beats the first tap inside the row: it starts with that one's tag.
    auto lay = [&](int64_t row) {
      return laid.slot(row, [&](int64_t slot) { lines.put(slot, args.input + row * s.w, input_end); });
    };
    auto reduce_row = [&](int64_t row, int64_t slot) {
      const A* line = lines.data + size * lay(row);
      for (int64_t q = 0; q < width; q += kLanes<T>) {
        Vec<T> best = load(line + taps[0] + q);
        Tag<T> tag = load_vector<Tag<T>>(first + q);
        for (int64_t t = 1; t < s.kernel_w; ++t) {
          Tag<T> value_tag = tags<T>(column_tag<kind>(s, q * s.stride_w - s.pad_w, t));
          if constexpr (kind == IndexKind::flat64) value_tag += iota<T>() * static_cast<TagElement<T>>(s.stride_w);
          challenge<T, tagged>(load(line + taps[t] + q), value_tag, best, tag);
        }
        store(values + slot * width + q, best);
        if constexpr (tagged) store_vector(tag_rows + slot * width + q, tag);
      }
    };
    for (int64_t i = begin, plane = begin / s.out_h, p = begin % s.out_h; i < end; ++i) {
      const int64_t y0 = p * s.stride_h - s.pad_h;
      const Taps rows(y0, s.h, s.kernel_h, s.dilation_h);
      int64_t count = 0;
      for (int64_t r = rows.begin; r < rows.end; ++r) {
        const int64_t row = plane * s.h + y0 + r * s.dilation_h;
        row_at[count] = width * ring.slot(row, [&](int64_t slot) { reduce_row(row, slot); });
        tag_at[count++] = row_tag<kind>(s, y0, r);
      }
      if (s.stride_h <= kStepAhead)
        for (int64_t r = rows.begin; r < rows.end; ++r) {
          const int64_t y = y0 + s.stride_h + r * s.dilation_h;
          if (y < s.h) lay(plane * s.h + y);
        }
      for (int64_t q = 0; q < s.out_w; q += kLanes<T>) {
        Vec<T> best = broadcast<T>(kLowest);
        Tag<T> tag = tagged ? load_vector<Tag<T>>(first + q) + tags<T>(row_tag<kind>(s, y0, rows.begin)) : Tag<T>{};
        if (count > 0) {
          best = load(values + row_at[0] + q);
          if constexpr (tagged) tag = load_vector<Tag<T>>(tag_rows + row_at[0] + q) + tags<T>(tag_at[0]);
        }
        for (int64_t k = 1; k < count; ++k) {
          Tag<T> value_tag{};
          if constexpr (tagged) value_tag = load_vector<Tag<T>>(tag_rows + row_at[k] + q) + tags<T>(tag_at[k]);
          challenge<T, tagged>(load(values + row_at[k] + q), value_tag, best, tag);
        }
        store_before(args.output + i * s.out_w + q, best, args.output + end * s.out_w);
        store_indices<T, kind>(args.indices, i * s.out_w + q, tag, end * s.out_w);
      }
      if (++p == s.out_h) p = 0, ++plane;
    }
  });
}

template <class T, IndexKind kind> void forward_pairs(const MaxPoolArgs<T>& args) {
  constexpr bool tagged = kind != IndexKind::none;
  const PoolShape& s = args.shape;
  const T* input_end = args.input + s.n * s.c * s.h * s.w;
  parallel_for(s.n * s.c * s.out_h, grain_of(s.out_w * s.kernel_h), [&](int64_t begin, int64_t end) {
    const int64_t limit = end * s.out_w;
    for (int64_t i = begin, plane = begin / s.out_h, p = begin % s.out_h; i < end; ++i) {
      const int64_t y0 = p * s.stride_h - s.pad_h;
      const Taps rows(y0, s.h, s.kernel_h, s.dilation_h);
      for (int64_t q = 0; q < s.out_w; q += kLanes<T>) {
        Vec<T> best = broadcast<T>(-static_cast<acc_t<T>>(__builtin_inf()));
        const Tag<T> column = kind == IndexKind::flat64 ? (iota<T>() + static_cast<TagElement<T>>(q)) * 2 : Tag<T>{};
        Tag<T> tag = column + tags<T>(row_tag<kind>(s, y0, rows.begin));
        for (int64_t r = rows.begin; r < rows.end; ++r) {
          Vec<T> first, second;
          load_pairs(args.input + (plane * s.h + y0 + r * s.dilation_h) * s.w + 2 * q, input_end, first, second);
          const Tag<T> first_tag = column + tags<T>(row_tag<kind>(s, y0, r));
          challenge<T, tagged>(first, first_tag, best, tag);
          challenge<T, tagged>(second, first_tag + 1, best, tag);
        }
        store_before(args.output + i * s.out_w + q, best, args.output + limit);
        store_indices<T, kind>(args.indices, i * s.out_w + q, tag, limit);
      }
      if (++p == s.out_h) p = 0, ++plane;
    }
  });
}

// `vectors` of channels of one window, from channel pointer x on.
template <class T, IndexKind kind, int vectors>
inline void pixel(const MaxPoolArgs<T>& args, const Steps& in, const T* x, const T* input_end, const Taps& rows,
                  const Taps& columns, int64_t y0, int64_t x0, int64_t at, int64_t limit) {
  constexpr bool tagged = kind != IndexKind::none;
  const PoolShape& s = args.shape;
  Vec<T> best[vectors];
  Tag<T> tag[vectors];
  const Tag<T> first = tags<T>(row_tag<kind>(s, y0, rows.begin) + column_tag<kind>(s, x0, columns.begin));
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    best[v] = broadcast<T>(-static_cast<acc_t<T>>(__builtin_inf()));
    tag[v] = first;
  }
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const T* p = x + (y0 + r * s.dilation_h) * in.y + (x0 + columns.begin * s.dilation_w) * in.x;
    for (int64_t t = columns.begin; t < columns.end; ++t, p += s.dilation_w * in.x) {
      const Tag<T> value_tag = tags<T>(row_tag<kind>(s, y0, r) + column_tag<kind>(s, x0, t));
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        const Vec<T> value = vectors > 1 ? load(p + v * kLanes<T>) : load_before(p, input_end);
        challenge<T, tagged>(value, value_tag, best[v], tag[v]);
      }
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    const int64_t to = at + v * kLanes<T>;
    vectors > 1 ? store(args.output + to, best[v]) : store_before(args.output + to, best[v], args.output + limit);
    store_indices<T, kind>(args.indices, to, tag[v], limit);
  }
}

template <class T, IndexKind kind> void forward_pixels(const MaxPoolArgs<T>& args) {
  const PoolShape& s = args.shape;
  const Steps in(s.c, s.h, s.w, true);
  const T* input_end = args.input + s.n * in.n;
  parallel_for(s.n * s.out_h, grain_of(s.out_w * ceil_div(s.c, kLanes<T>) * s.kernel_h * s.kernel_w),
               [&](int64_t begin, int64_t end) {
                 const int64_t limit = end * s.out_w * s.c;
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t y0 = i % s.out_h * s.stride_h - s.pad_h;
                   const T* x = args.input + i / s.out_h * in.n;
                   const Taps rows(y0, s.h, s.kernel_h, s.dilation_h);
                   for (int64_t q = 0; q < s.out_w; ++q) {
                     const int64_t x0 = q * s.stride_w - s.pad_w, at = (i * s.out_w + q) * s.c;
                     const Taps columns(x0, s.w, s.kernel_w, s.dilation_w);
                     int64_t c = 0;
                     for (; c + 4 * kLanes<T> <= s.c; c += 4 * kLanes<T>)
                       pixel<T, kind, 4>(args, in, x + c, input_end, rows, columns, y0, x0, at + c, limit);
                     for (; c < s.c; c += kLanes<T>)
                       pixel<T, kind, 1>(args, in, x + c, input_end, rows, columns, y0, x0, at + c, limit);
                   }
                 }
               });
}

// One window after the other, in plain code: where scratch rows would be too large, or indices too large for a tag.
template <class T> void forward_plain(const MaxPoolArgs<T>& args) {
  using A = acc_t<T>;
  const PoolShape& s = args.shape;
  const Steps in(s.c, s.h, s.w, s.channels_last), out(s.c, s.out_h, s.out_w, s.channels_last);
  parallel_for(
      s.n * s.c * s.out_h, grain_of(s.out_w * smaller(s.kernel_h, s.h) * smaller(s.kernel_w, s.w)),
      [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t n = i / s.out_h / s.c, c = i / s.out_h % s.c, p = i % s.out_h, y0 = p * s.stride_h - s.pad_h;
          const T* x = args.input + n * in.n + c * in.c;
          const Taps rows(y0, s.h, s.kernel_h, s.dilation_h);
          for (int64_t q = 0; q < s.out_w; ++q) {
            const int64_t x0 = q * s.stride_w - s.pad_w, at = n * out.n + c * out.c + p * out.y + q * out.x;
            const Taps columns(x0, s.w, s.kernel_w, s.dilation_w);
            A best = -static_cast<A>(__builtin_inf());
            int64_t winner_r = rows.begin, winner_t = columns.begin;
            for (int64_t r = rows.begin; r < rows.end; ++r)
              for (int64_t t = columns.begin; t < columns.end; ++t) {
                const A value = static_cast<A>(x[(y0 + r * s.dilation_h) * in.y + (x0 + t * s.dilation_w) * in.x]);
                if (value > best || value != value) best = value, winner_r = r, winner_t = t;
              }
            args.output[at] = static_cast<T>(best);
            if (args.kind == IndexKind::offset8)
              static_cast<uint8_t*>(args.indices)[at] = static_cast<uint8_t>(winner_r * s.kernel_w + winner_t);
            if (args.kind == IndexKind::flat64)
              static_cast<int64_t*>(args.indices)[at] =
                  (y0 + winner_r * s.dilation_h) * s.w + x0 + winner_t * s.dilation_w;
          }
        }
      });
}

template <class T, IndexKind kind> void forward(const MaxPoolArgs<T>& args) {
  const PoolShape& s = args.shape;
  // Empty windows have places beyond the input, too.
  const int64_t rows = s.h + s.kernel_h * s.dilation_h, columns = s.w + s.kernel_w * s.dilation_w;
  const bool tags_fit = kind != IndexKind::flat64 || rows < (int64_t{1} << 31) / columns;
  if (!tags_fit)
    forward_plain(args);
  else if (s.channels_last)
    forward_pixels<T, kind>(args);
  else if (column_pairs(s))
    forward_pairs<T, kind>(args);
  else if (rows_fit<T>(s))
    forward_planes<T, kind>(args);
  else
    forward_plain(args);
}

template <class T> void forward(const MaxPoolArgs<T>& args) {
  switch (args.kind) {
    case IndexKind::none: return forward<T, IndexKind::none>(args);
    case IndexKind::offset8: return forward<T, IndexKind::offset8>(args);
    case IndexKind::flat64: return forward<T, IndexKind::flat64>(args);
  }
}

}  // namespace

void max_pool2d_forward(const MaxPoolArgs<float>& args) { forward(args); }
void max_pool2d_forward(const MaxPoolArgs<double>& args) { forward(args); }
void max_pool2d_forward(const MaxPoolArgs<bfloat16>& args) { forward(args); }
void max_pool2d_forward(const MaxPoolArgs<float16>& args) { forward(args); }

}  // namespace dlkern::cpu::DLKERN_ISA
