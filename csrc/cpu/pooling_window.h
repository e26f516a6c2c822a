// What the pooling kernels share: which elements a window covers, rows of planes laid out for vectors, and vectors at
// the ends of memory.
// A contiguous plane is read a row at a time into PhasedRows: padded, and parted by stride, so that every window is an
// interior one and one tap of neighbouring windows is one vector, whatever stride, dilation and width are. What is
// found for a row is kept in a RowRing for the windows of the rows below.
// Results are stored as whole vectors that may reach past the end of a row or a pixel: what lies there is written
// later by the same thread, and `limit` is where its part ends.
#pragma once
#include "parallel.h"
#include "pooling.h"
#include "scratch.h"
#include "simd.h"

namespace dlkern::cpu::DLKERN_ISA {

inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -ceil_div(-a, b); }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Steps between neighbours along each dimension.
struct Steps {
  int64_t n, c, y, x;
  Steps(int64_t channels, int64_t h, int64_t w, bool channels_last)
      : n(channels * h * w),
        c(channels_last ? 1 : h * w),
        y(channels_last ? w * channels : w),
        x(channels_last ? channels : 1) {}
};

// First and last + 1 of the kernel's taps that fall inside [0, size) for a window that starts at `start`.
struct Taps {
  int64_t begin, end;
  Taps(int64_t start, int64_t size, int64_t kernel, int64_t dilation)
      : begin(start >= 0 ? 0 : ceil_div(-start, dilation)),
        end(start >= size ? 0 : smaller(kernel, ceil_div(size - start, dilation))) {}
  bool empty() const { return begin >= end; }  // a dilated window in ceil_mode can miss a small input
};

// 64 bits a lane.
template <class T> struct longs_of {
  using type [[gnu::vector_size(8 * kLanes<T>)]] = int64_t;
};
template <class T> using Longs = typename longs_of<T>::type;
template <class T> inline Tag<T> to_tags(Bytes<T> bytes) {
#if defined(__AVX512F__)
  if constexpr (sizeof(acc_t<T>) == 4) return (Tag<T>)_mm512_cvtepu8_epi32((__m128i)bytes);
#elif defined(__AVX2__) && !defined(DLKERN_VECTOR_BYTES)
  if constexpr (sizeof(acc_t<T>) == 4) {
    int64_t low;
    std::memcpy(&low, &bytes, sizeof low);
    return (Tag<T>)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(low));
  }
#endif
  return __builtin_convertvector(bytes, Tag<T>);
}
template <class T> inline Bytes<T> to_bytes(Tag<T> tag) {
#if defined(__AVX512F__)
  if constexpr (sizeof(acc_t<T>) == 4) return (Bytes<T>)_mm512_cvtepi32_epi8((__m512i)tag);
#elif defined(__AVX2__) && !defined(DLKERN_VECTOR_BYTES)
  if constexpr (sizeof(acc_t<T>) == 4) {
    const __m128i words =
        _mm_packus_epi32(_mm256_castsi256_si128((__m256i)tag), _mm256_extracti128_si256((__m256i)tag, 1));
    const int64_t low = _mm_cvtsi128_si64(_mm_packus_epi16(words, words));
    Bytes<T> bytes;
    std::memcpy(&bytes, &low, sizeof bytes);
    return bytes;
  }
#endif
  return __builtin_convertvector(tag, Bytes<T>);
}

template <class V> inline V load_vector(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V> inline void store_vector(void* p, V v) { std::memcpy(p, &v, sizeof v); }

// A vector at p, of which the lanes before `limit` are read or written; the others read as zero.
template <class T> inline Vec<T> load_before(const T* p, const T* limit) {
  if (limit - p >= kLanes<T>) return load(p);
  return p < limit ? load_partial<T>(p, static_cast<int>(limit - p)) : Vec<T>{};
}
template <class T> inline void store_before(T* p, Vec<T> v, const T* limit) {
  prefetch_ahead_to_store(p);
  if (limit - p >= kLanes<T>)
    store(p, v);
  else if (p < limit)
    store_partial<T>(p, v, static_cast<int>(limit - p));
}
// (best, tag) becomes (value, value_tag) in the lanes where value is larger, or NaN (the last NaN of a window is kept).
template <class T, bool tagged>
inline void challenge(Vec<T> value, Tag<T> value_tag, Vec<T>& best, Tag<T>& tag) {
#if defined(__AVX512F__)
  if constexpr (sizeof(acc_t<T>) == 4) {
    const __mmask16 ordered = _mm512_cmp_ps_mask((__m512)value, (__m512)value, _CMP_ORD_Q);
    const __mmask16 kept = _mm512_mask_cmp_ps_mask(ordered, (__m512)value, (__m512)best, _CMP_NGT_UQ);
    best = (Vec<T>)_mm512_mask_mov_ps((__m512)value, kept, (__m512)best);
    if constexpr (tagged) tag = (Tag<T>)_mm512_mask_mov_epi32((__m512i)value_tag, kept, (__m512i)tag);
    return;
  }
#endif
  const auto won = (value > best) | (value != value);
  best = won ? value : best;
  if constexpr (tagged) tag = won ? value_tag : tag;
}
// The next kLanes<T> elements of a row that has `count` left, `fill` beyond its end.
template <class T> inline Vec<T> load_row(const T* p, int64_t count, const T* limit, Vec<T> fill) {
  if (count >= kLanes<T>) return load(p);
  return count <= 0 ? fill : first_lanes<T>(load_before(p, limit), count, fill);
}

constexpr int kWide = kLanes<double>;
// kWide elements from p on, those before `limit` read.
template <class T> inline vdouble load_wide_before(const T* p, const T* limit) {
  if (limit - p >= kWide) return load_wide(p);
  return p < limit ? load_wide_partial(p, static_cast<int>(limit - p)) : vdouble{};
}
template <class T> inline T narrow(double x) { return static_cast<T>(static_cast<acc_t<T>>(x)); }
// The first `count` lanes of v, rounded to T.
template <class T> inline void store_narrow(T* p, vdouble v, int64_t count) {
  if constexpr (sizeof(T) == 4)
    if (count >= kWide) {
#if defined(__AVX512F__)
      _mm256_storeu_ps(p, _mm512_cvtpd_ps((__m512d)v));
#else
      store_vector(p, __builtin_convertvector(v, vfloat_half));
#endif
      return;
    }
  for (int64_t l = 0; l < count && l < kWide; ++l) p[l] = narrow<T>(v[l]);
}

// The even and the odd elements of two vectors in a row, and back.
template <class T> inline void part(Vec<T> a, Vec<T> b, Vec<T>& even, Vec<T>& odd) {
  const Tag<T> from = iota<T>() * 2;
  even = __builtin_shuffle(a, b, from);
  odd = __builtin_shuffle(a, b, from + 1);
}
template <class T> inline void interleave(Vec<T> even, Vec<T> odd, Vec<T>& a, Vec<T>& b) {
  Tag<T> from;
  for (int i = 0; i < kLanes<T>; ++i) from[i] = i / 2 + i % 2 * kLanes<T>;
  a = __builtin_shuffle(even, odd, from);
  b = __builtin_shuffle(even, odd, from + kLanes<T> / 2);
}

// Rows of an input plane in scratch memory, `fill` around them. Column x is element u = x + pad of the padded row, which
// lies in phase u % stride at place u / stride; tap t of window q is in phase t * dilation % stride at place
// q + t * dilation / stride.
template <class T> struct PhasedRows {
  using A = acc_t<T>;
  int64_t w, stride, pad, length, row_size;
  A* data;
  A fill;

  static int64_t length_of(const PoolShape& s) {  // of a phase
    const int64_t read = round_up(s.out_w, kLanes<T>) + (s.kernel_w - 1) * s.dilation_w / s.stride_w;
    const int64_t written = (round_up(s.w, 2 * kLanes<T>) + s.pad_w) / s.stride_w + 2;
    return round_up(larger(read, written), kLanes<T>);
  }
  static int64_t size(const PoolShape& s) { return s.stride_w * length_of(s); }  // of a row
  PhasedRows(const PoolShape& s, int64_t rows, A* memory, A around)
      : w(s.w),
        stride(s.stride_w),
        pad(s.pad_w),
        length(length_of(s)),
        row_size(stride * length),
        data(memory),
        fill(around) {
    for (int64_t i = 0; i < rows * row_size; ++i) data[i] = fill;
  }
  int64_t tap(int64_t t, int64_t dilation) const { return t * dilation % stride * length + t * dilation / stride; }

  void put(int64_t row, const T* x, const T* limit) {
    const Vec<T> around = broadcast<T>(fill);
    A* to = data + row * row_size;
    if (stride == 1) {
      for (int64_t i = 0; i < w; i += kLanes<T>) store(to + pad + i, load_row(x + i, w - i, limit, around));
    } else if (stride == 2) {
      A *first = to + pad % 2 * length + pad / 2, *second = to + (pad + 1) % 2 * length + (pad + 1) / 2;
      for (int64_t i = 0; i < w; i += 2 * kLanes<T>) {
        Vec<T> even, odd;
        part<T>(load_row(x + i, w - i, limit, around), load_row(x + i + kLanes<T>, w - i - kLanes<T>, limit, around),
                even, odd);
        store(first + i / 2, even);
        store(second + i / 2, odd);
      }
    } else {
      int64_t phase = pad % stride, place = pad / stride;
      for (int64_t i = 0; i < w; ++i) {
        to[phase * length + place] = static_cast<A>(x[i]);
        if (++phase == stride) phase = 0, ++place;
      }
    }
  }
};

// Whether the columns of a window are a pair of its own, so that rows can be read and written where they lie.
inline bool column_pairs(const PoolShape& s) {
  return s.kernel_w == 2 && s.stride_w == 2 && s.pad_w == 0 && s.dilation_w == 1 && s.w == 2 * s.out_w;
}
// Whether the rows, too, are each in one window.
inline bool tiles(const PoolShape& s) {
  return column_pairs(s) && s.kernel_h == s.stride_h && s.pad_h == 0 && s.dilation_h == 1 &&
         s.h == s.kernel_h * s.out_h;
}
// The windows from column x on: the first and the second of each pair.
template <class T> inline void load_pairs(const T* x, const T* limit, Vec<T>& first, Vec<T>& second) {
  part<T>(load_before(x, limit), load_before(x + kLanes<T>, limit), first, second);
}
template <class T> inline void store_pairs(T* x, Vec<T> first, Vec<T> second, const T* limit) {
  Vec<T> a, b;
  interleave<T>(first, second, a, b);
  store_before(x, a, limit);
  store_before(x + kLanes<T>, b, limit);
}

// Along one dimension, the windows that can hold elements e, stride + e, 2 stride + e, … for each e < stride: tap[j] of
// the window `shift[j]` beyond the element's number; those of e are [start[e], start[e + 1]), windows ascending.
// Divisions are slow: these and Walk spare every row its own. (size + 1: with a stride of 2 columns are made in pairs.)
struct WindowTaps {
  int64_t classes, *start, *tap, *shift;
  static int64_t memory(int64_t size, int64_t kernel, int64_t stride) {
    return smaller(stride, size + 1) + 1 + 2 * kernel;
  }
  WindowTaps(int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation, int64_t* memory)
      : classes(smaller(stride, size + 1)), start(memory), tap(start + classes + 1), shift(tap + kernel) {
    auto class_of = [&](int64_t t) {
      const int64_t e = (t * dilation - pad) % stride;
      return e < 0 ? e + stride : e;
    };
    for (int64_t e = 0; e <= classes; ++e) start[e] = 0;
    for (int64_t t = 0; t < kernel; ++t)
      if (class_of(t) < classes) ++start[class_of(t) + 1];
    for (int64_t e = 0; e < classes; ++e) start[e + 1] += start[e];
    for (int64_t t = kernel - 1; t >= 0; --t) {
      const int64_t e = class_of(t);
      if (e >= classes) continue;
      tap[start[e]] = t;
      shift[start[e]++] = (e + pad - t * dilation) / stride;
    }
    for (int64_t e = classes; e > 0; --e) start[e] = start[e - 1];
    start[0] = 0;
  }
  // Calls f(tap, window) for the windows, of `windows`, that hold element m * stride + e.
  template <class F> void each(int64_t m, int64_t e, int64_t windows, F&& f) const {
    for (int64_t j = start[e]; j < start[e + 1]; ++j) {
      const int64_t window = m + shift[j];
      if (window >= 0 && window < windows) f(tap[j], window);
    }
  }
};
struct RowTaps : WindowTaps {
  static int64_t memory(const PoolShape& s) { return WindowTaps::memory(s.h, s.kernel_h, s.stride_h); }
  RowTaps(const PoolShape& s, int64_t* memory)
      : WindowTaps(s.h, s.kernel_h, s.stride_h, s.pad_h, s.dilation_h, memory) {}
};
struct ColumnTaps : WindowTaps {
  static int64_t memory(const PoolShape& s) { return WindowTaps::memory(s.w, s.kernel_w, s.stride_w); }
  ColumnTaps(const PoolShape& s, int64_t* memory)
      : WindowTaps(s.w, s.kernel_w, s.stride_w, s.pad_w, s.dilation_w, memory) {}
  // How far windows lie to the left and to the right of a column's number.
  static int64_t left(const PoolShape& s) { return larger(0, ceil_div((s.kernel_w - 1) * s.dilation_w, s.stride_w)); }
  static int64_t right(const PoolShape& s) { return (s.pad_w + s.stride_w - 1) / s.stride_w; }
};
// Element m * stride + e of a dimension, and the next, and the next.
struct Walk {
  int64_t stride, m, e;
  Walk(int64_t element, int64_t step) : stride(step), m(element / step), e(element % step) {}
  void next() {
    if (++e == stride) e = 0, ++m;
  }
};

// Slots for what was made of the last rows: row `id` keeps its slot until id + size is asked for.
struct RowRing {
  int64_t mask;
  int64_t* held;
  static int64_t size_for(int64_t rows) {
    int64_t size = 1;
    while (size < rows) size *= 2;
    return size;
  }
  RowRing(int64_t size, int64_t* memory) : mask(size - 1), held(memory) {
    for (int64_t i = 0; i < size; ++i) held[i] = -1;
  }
  // The slot of row `id`; make(slot) fills it unless it is there.
  template <class F> int64_t slot(int64_t id, F&& make) {
    const int64_t i = id & mask;
    if (held[i] != id) {
      make(i);
      held[i] = id;
    }
    return i;
  }
};
// Rows are laid out one step ahead of their use where a step is short: a vector that overlaps two stores can only be
// loaded once both have left the store buffer.
constexpr int64_t kStepAhead = 4;
// Input rows that the windows of one output row (and of the next) reach over, and output rows that reach one input row.
inline int64_t reach_of_input(const PoolShape& s) {
  return smaller(s.h, (s.kernel_h - 1) * s.dilation_h + 1 + (s.stride_h <= kStepAhead ? s.stride_h : 0));
}
inline int64_t reach_of_output(const PoolShape& s) {
  return smaller(s.out_h, (s.kernel_h - 1) * s.dilation_h / s.stride_h + 2);
}

// Whether the rows that the plane kernels keep in scratch memory are of a sensible size.
template <class T> inline bool rows_fit(const PoolShape& s) {
  constexpr int64_t kMost = int64_t{1} << 21;
  if (s.kernel_h > kMost || s.kernel_w > kMost || PhasedRows<T>::size(s) > kMost) return false;
  const int64_t width = larger(PhasedRows<T>::size(s), ColumnTaps::left(s) + larger(s.out_w, s.w) + 4 * kLanes<T>);
  return width * RowRing::size_for(larger(reach_of_input(s), reach_of_output(s))) <= kMost;
}

// Window i of an adaptive dimension covers [begin_of, end_of); first_with and last_with are the windows that hold
// element i: the inverse.
inline int64_t begin_of(int64_t i, int64_t size, int64_t out_size) { return i * size / out_size; }
inline int64_t end_of(int64_t i, int64_t size, int64_t out_size) { return ceil_div((i + 1) * size, out_size); }
inline int64_t first_with(int64_t i, int64_t size, int64_t out_size) { return i * out_size / size; }
inline int64_t last_with(int64_t i, int64_t size, int64_t out_size) { return ceil_div((i + 1) * out_size, size) - 1; }

// Pieces of work for parallel_for: as many items as hold some 16,000 steps.
inline int64_t grain_of(int64_t steps) { return larger(1, 16384 / larger(steps, 1)); }

}  // namespace dlkern::cpu::DLKERN_ISA
