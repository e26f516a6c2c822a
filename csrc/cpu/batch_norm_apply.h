// The last pass of batch norm over memory: each element from the streams and the constants of its channel, over
// consecutive elements of one channel (apply_segment) or over rows of channels (apply_rows).
#pragma once
#include <cstdint>

#include "activation.h"
#include "simd.h"

namespace dlkern::cpu::DLKERN_ISA {

constexpr int kApplyRows = 8;   // rows that share a load of the constants
constexpr int kConstants = 5;   // of a channel; not all are used by all

// `at` is the element's position, k the constants.
template <class T, int activation> struct ApplyForward {
  const T* input;
  const T* residual;  // or null
  T* output;
  template <class V, class Load, class Store>
  [[gnu::always_inline]] void operator()(int64_t at, const V (&k)[kConstants], Load&& load_at, Store&& store_at) const {
    const V centred = load_at(input + at) - k[0];  // k: mean, scale, bias, what rounding the scale lost
    V y = centred * k[1] + (finite_part(centred * k[3]) + k[2]);
    if (residual) y += load_at(residual + at);
    store_at(output + at, activate(y, activation));
  }
  void prefetch(int64_t at) const {
    prefetch_ahead(input + at);
    if (residual) prefetch_ahead(residual + at);
  }
  void prefetch_results(int64_t at) const { prefetch_ahead_to_store(output + at); }
};
template <class T, int activation, bool train> struct ApplyBackward {
  const T* grad_output;
  const T* input;
  const T* output;  // read where there is an activation
  T* grad_input;
  T* grad_residual;  // or null
  template <class V, class Load, class Store>
  [[gnu::always_inline]] void operator()(int64_t at, const V (&k)[kConstants], Load&& load_at, Store&& store_at) const {
    V g = load_at(grad_output + at);
    if constexpr (activation != kNone) g = activation_backward(g, load_at(output + at), activation);
    if (grad_residual) store_at(grad_residual + at, g);
    // k: mean, scale, mean of g, slope, what rounding the scale lost (on frozen statistics torch multiplies in double).
    if constexpr (train) g = g - k[2] - (load_at(input + at) - k[0]) * k[3];
    g = g * k[1] + finite_part(g * k[4]);
    store_at(grad_input + at, g);
  }
  void prefetch(int64_t at) const {
    prefetch_ahead(grad_output + at);
    if constexpr (train) prefetch_ahead(input + at);
    if constexpr (activation != kNone) prefetch_ahead(output + at);
  }
  void prefetch_results(int64_t at) const {
    prefetch_ahead_to_store(grad_input + at);
    if (grad_residual) prefetch_ahead_to_store(grad_residual + at);
  }
};

// Results of more bytes than the caches hold are stored past them, where addresses allow: `past` is then the bits of an
// address that must be zero, else all.
template <class T> inline uintptr_t past_caches(bool wanted) {
  return kStreams && wanted ? sizeof(T) * kLanes<T> - 1 : ~uintptr_t{0};
}
inline bool is_past(uintptr_t past) { return kStreams && past != ~uintptr_t{0}; }
template <class T> constexpr int64_t kAhead = kAheadBytes / static_cast<int64_t>(sizeof(T));  // in elements
template <class T> inline void store_by(uintptr_t past, T* p, Vec<T> v) {
  if (kStreams && (reinterpret_cast<uintptr_t>(p) & past) == 0)
    stream(p, v);
  else
    store(p, v);
}

// Two bfloat16s a lane.
inline void store_by(uintptr_t past, bfloat16* p, vuint32 words) {
  if (kStreams && (reinterpret_cast<uintptr_t>(p) & (past | (sizeof words - 1))) == 0)
    stream(reinterpret_cast<float*>(p), (vfloat)words);
  else
    std::memcpy(static_cast<void*>(p), &words, sizeof words);
}

// Elements from `at` on, two vectors; constants of those at even places, and at odd ones.
template <class Apply>
[[gnu::always_inline]] inline void apply_even_odd(const Apply& apply, int64_t at, const vfloat (&k_even)[kConstants],
                                                  const vfloat (&k_odd)[kConstants], uintptr_t past) {
  constexpr int most = 2;  // results of an element
  bfloat16* to[most];
  vfloat even[most], odd[most];
  int results = 0, of_odd = 0;
  apply(
      at, k_even, [](const bfloat16* p) { return load_even(p); },
      [&](bfloat16* p, vfloat v) __attribute__((always_inline)) { to[results] = p, even[results++] = v; });
  apply(
      at, k_odd, [](const bfloat16* p) { return load_odd(p); },
      [&](bfloat16*, vfloat v) __attribute__((always_inline)) { odd[of_odd++] = v; });
#pragma GCC unroll 2
  for (int r = 0; r < most; ++r)
    if (r < results) store_by(past, to[r], merge_even_odd(even[r], odd[r]));
}

// `next` elements further is another segment, if short ones far apart follow one another, else 0: the memory of its
// results is fetched along.
template <class T, class Apply> inline void apply_segment(const Apply& shared, int64_t i, int64_t count, int64_t next,
                                                          const acc_t<T>* constants, uintptr_t past) {
  const Apply apply = shared;  // a copy that no store can change
  Vec<T> k[kConstants];
#pragma GCC unroll 8
  for (int m = 0; m < kConstants; ++m) k[m] = broadcast<T>(constants[m]);
  const int64_t end = i + count, ahead = next ? next - kAhead<T> : 0;
  auto load_whole = [](const T* p) { return load(p); };
  if constexpr (kEvenOdd<T>)
    for (; i + 2 * kLanes<T> <= end; i += 2 * kLanes<T>) {
      if (!is_past(past)) apply.prefetch_results(i + ahead);
      apply_even_odd(apply, i, k, k, past);
    }
  if (is_past(past))
    for (; i + kLanes<T> <= end; i += kLanes<T>)
      apply(i, k, load_whole, [past](T* p, Vec<T> v) { store_by(past, p, v); });
  for (; i + kLanes<T> <= end; i += kLanes<T>) {
    apply.prefetch_results(i + ahead);
    apply(i, k, load_whole, [](T* p, Vec<T> v) { store(p, v); });
  }
  if (i < end) {
    const int lanes = static_cast<int>(end - i);
    apply(
        i, k, [lanes](const T* p) { return load_partial<T>(p, lanes); },
        [lanes](T* p, Vec<T> v) { store_partial<T>(p, v, lanes); });
  }
}

// `rows` rows of `width` columns from element `begin` on, `stride` elements apart; constants is [kConstants][constants_apart].
template <class T, class Apply>
inline void apply_row_block(const Apply& shared, int64_t begin, int64_t rows, int64_t stride, int64_t width,
                            const acc_t<T>* constants, int64_t constants_apart, uintptr_t past) {
  constexpr int step = kLanes<T>, tile = kVectorBytes == 64 ? 4 : 2;  // times the constants in registers
  const Apply apply = shared;
  auto columns = [&]<int vectors>(int64_t j, int64_t first, int64_t last, auto&& load_at, auto&& store_at)
                     __attribute__((always_inline)) {
                       Vec<T> k[vectors][kConstants];
#pragma GCC unroll 8
                       for (int u = 0; u < vectors; ++u)
#pragma GCC unroll 8
                         for (int m = 0; m < kConstants; ++m)
                           k[u][m] = load(constants + m * constants_apart + j + u * step);
                       for (int64_t r = first; r < last; ++r)
#pragma GCC unroll 8
                         for (int u = 0; u < vectors; ++u)
                           apply(begin + r * stride + j + u * step, k[u], load_at, store_at);
                     };
  auto load_whole = [](const T* p) { return load(p); };
  auto store_whole = [past](T* p, Vec<T> v) { store_by(past, p, v); };
  // Rows side by side of 16 floats each, often a power of two apart, meet in few sets of the first cache and are what no
  // prefetcher follows: such narrow tiles lose to loading the constants for every row.
  constexpr bool row_by_row = kVectorBytes < 64 && !kEvenOdd<T>;
  const int64_t block = width <= tile * step ? rows : row_by_row ? 1 : kApplyRows;
  for (int64_t first = 0; first < rows; first += block) {
    const int64_t last = first + block < rows ? first + block : rows;
    int64_t j = 0;
    if constexpr (kEvenOdd<T>) {
      for (; j + 2 * step <= width; j += 2 * step) {
        vfloat even[kConstants], odd[kConstants];
#pragma GCC unroll 8
        for (int m = 0; m < kConstants; ++m) {
          const acc_t<T>* of_columns = constants + m * constants_apart + j;
          even[m] = take_even(load(of_columns), load(of_columns + step));
          odd[m] = take_odd(load(of_columns), load(of_columns + step));
        }
        for (int64_t r = first; r < last; ++r) apply_even_odd(apply, begin + r * stride + j, even, odd, past);
      }
    } else if (row_by_row && block == 1) {
      auto row = [&](bool fetch, auto&& store_at) __attribute__((always_inline)) {
        for (const int64_t at = begin + first * stride; j + step <= width; j += step) {
          Vec<T> k[kConstants];
#pragma GCC unroll 8
          for (int m = 0; m < kConstants; ++m) k[m] = load(constants + m * constants_apart + j);
          apply.prefetch(at + j);
          if (fetch) apply.prefetch_results(at + j);
          apply(at + j, k, load_whole, store_at);
        }
      };
      if (is_past(past))
        row(false, store_whole);
      else
        row(true, [](T* p, Vec<T> v) { store(p, v); });
    } else {
      for (; j + tile * step <= width; j += tile * step)
        columns.template operator()<tile>(j, first, last, load_whole, store_whole);
    }
    for (; j + step <= width; j += step) columns.template operator()<1>(j, first, last, load_whole, store_whole);
    if (j < width) {
      const int lanes = static_cast<int>(width - j);
      columns.template operator()<1>(
          j, first, last, [lanes](const T* p) { return load_partial<T>(p, lanes); },
          [lanes](T* p, Vec<T> v) { store_partial<T>(p, v, lanes); });
    }
  }
}

}  // namespace dlkern::cpu::DLKERN_ISA
