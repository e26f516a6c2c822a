// simd.h and transpose.h on the instruction set this file is compiled for, against libm and plain loops.
#include "cpu/simd.h"

#include <cmath>
#include <initializer_list>
#include <limits>

#include "check.h"
#include "cpu/transpose.h"

namespace simd = dlkern::cpu::DLKERN_ISA;
using dlkern::acc_t;
using dlkern::bfloat16;
using dlkern::float16;
using dlkern::cpu::DLKERN_ISA::kLanes;
using dlkern::cpu::DLKERN_ISA::Vec;
using namespace dlkern::test;

// Distance in units of the last place of the exact value, for `digits` binary digits and exponents from `lowest` on.
static long double ulps(long double got, long double exact, int digits, int lowest) {
  if (std::isinf(got) || std::isinf(exact)) return got == exact ? 0 : 1e9L;
  int exponent;
  std::frexp(exact, &exponent);
  return std::fabs(got - exact) / std::ldexp(1.0L, (exponent < lowest ? lowest : exponent) - digits);
}

template <class T, class Ours, class Exact>
static void function(const char* name, double from, double to, double most, Ours ours, Exact exact) {
  using Limits = std::numeric_limits<T>;
  constexpr int lanes = kLanes<T>;
  long double worst = 0, where = 0;
  const int64_t steps = 400000;
  for (int64_t i = 0; i < steps; i += lanes) {
    T x[lanes], y[lanes];
    for (int l = 0; l < lanes; ++l) x[l] = static_cast<T>(from + (to - from) * double(i + l) / double(steps));
    simd::store(y, ours(simd::load(x)));
    for (int l = 0; l < lanes; ++l) {
      const long double distance =
          ulps(y[l], exact(static_cast<long double>(x[l])), Limits::digits, Limits::min_exponent);
      if (distance > worst) worst = distance, where = x[l];
    }
  }
  const char* type = sizeof(T) == sizeof(float) ? "float" : "double";
  std::printf("%s %s on [%g, %g]: at most %.2Lf ulp, at %.17Lg\n", type, name, from, to, worst, where);
  CHECK(worst <= most, "%s %s: %.2Lf ulp at %.17Lg, at most %.2f promised", type, name, worst, where, most);
}

template <class T, class Ours> static T at(T x, Ours ours) { return ours(simd::broadcast<T>(x))[0]; }

template <class T> static void functions(double exp_least, double exp_most) {
  const auto exp = [](auto x) { return simd::exp(x); };
  const auto tanh = [](auto x) { return simd::tanh(x); };
  const auto sigmoid = [](auto x) { return simd::sigmoid(x); };
  const auto exact_exp = [](long double x) { return std::exp(x); };
  const auto exact_tanh = [](long double x) { return std::tanh(x); };
  const auto exact_sigmoid = [](long double x) { return 1 / (1 + std::exp(-x)); };
  for (const double range : {0.01, 1.0, 10.0}) function<T>("exp", -range, range, 2, exp, exact_exp);
  function<T>("exp", exp_least, exp_most, 2, exp, exact_exp);
  for (const double range : {0.01, 0.7, 3.0, 20.0}) function<T>("tanh", -range, range, 0.9, tanh, exact_tanh);
  for (const double range : {0.01, 1.0, 10.0, 80.0}) function<T>("sigmoid", -range, range, 3, sigmoid, exact_sigmoid);

  const T infinity = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  CHECK(at(infinity, exp) == infinity && at(T(710), exp) == infinity, "exp overflows to infinity");
  CHECK(at(-infinity, exp) == 0 && at(T(-750), exp) == 0 && at(T(0), exp) == 1, "exp of -inf and of 0");
  CHECK(at(infinity, tanh) == 1 && at(-infinity, tanh) == -1, "tanh of the ends");
  CHECK(at(T(1e30), tanh) == 1 && at(T(-1e30), tanh) == -1, "tanh near the ends");
  CHECK(at(T(0), tanh) == 0 && !std::signbit(at(T(0), tanh)) && std::signbit(at(T(-0.0), tanh)), "tanh of zeros");
  CHECK(at(infinity, sigmoid) == 1 && at(-infinity, sigmoid) == 0, "sigmoid of the ends");
  CHECK(std::isnan(at(nan, exp)) && std::isnan(at(nan, tanh)) && std::isnan(at(nan, sigmoid)), "NaN stays NaN");
}

template <class T> static void partial_loads_and_stores() {
  constexpr int lanes = kLanes<T>;
  for (int count = 1; count <= lanes; ++count) {
    Guarded<T> from(count), to(count);
    for (int i = 0; i < count; ++i) from[i] = static_cast<T>(static_cast<acc_t<T>>(i + 1));
    const Vec<T> v = count == lanes ? simd::load(from.data()) : simd::load_partial<T>(from.data(), count);
    for (int i = 0; i < lanes; ++i)
      CHECK(v[i] == (i < count ? i + 1 : 0), "load of %d: lane %d is %g", count, i, double(v[i]));
    if (count == lanes)
      simd::store(to.data(), v);
    else
      simd::store_partial<T>(to.data(), v, count);
    for (int i = 0; i < count; ++i) CHECK(static_cast<acc_t<T>>(to[i]) == i + 1, "store of %d: element %d", count, i);
  }
  for (int count = 1; count <= kLanes<double>; ++count) {
    Guarded<T> from(count);
    for (int i = 0; i < count; ++i) from[i] = static_cast<T>(static_cast<acc_t<T>>(i + 1));
    const auto v =
        count == kLanes<double> ? simd::load_wide(from.data()) : simd::load_wide_partial<T>(from.data(), count);
    for (int i = 0; i < kLanes<double>; ++i)
      CHECK(v[i] == (i < count ? i + 1 : 0), "wide load of %d: lane %d", count, i);
  }
}

// The nearer of the two bfloat16 around a float; the even one where both are as near.
static uint16_t rounded(float value) {
  uint32_t u;
  std::memcpy(&u, &value, 4);
  const uint16_t toward_zero = static_cast<uint16_t>(u >> 16), away = static_cast<uint16_t>(toward_zero + 1);
  const uint32_t rest = u & 0xffffu;
  if (rest != 0x8000u) return rest < 0x8000u ? toward_zero : away;
  return toward_zero & 1 ? away : toward_zero;
}

static void bfloat16_rounding() {
  constexpr int lanes = kLanes<float>;
  const uint32_t lows[] = {0, 1, 0x7fff, 0x8000, 0x8001, 0xffff};
  for (uint32_t high = 0; high < 0x10000; ++high)
    for (uint32_t low : lows) {
      const uint32_t u = high << 16 | low;
      float value;
      std::memcpy(&value, &u, 4);
      bfloat16 stored[lanes];
      simd::store(stored, simd::broadcast<float>(value));
      // The bits themselves: arithmetic on a NaN may change them, on a denormal not.
      if (std::isnan(value)) {
        CHECK(std::isnan(static_cast<float>(bfloat16(value))), "scalar NaN %08x", u);
        CHECK(std::isnan(static_cast<float>(stored[0])), "vector NaN %08x", u);
        continue;
      }
      CHECK(bfloat16(value).bits == rounded(value), "scalar %08x", u);
      CHECK(stored[0].bits == rounded(value) && stored[lanes - 1].bits == stored[0].bits, "vector %08x", u);
    }
}

// What a float16's bits stand for, by their definition.
static double value_of_half(uint32_t bits) {
  const int exponent = static_cast<int>(bits >> 10 & 31), fraction = static_cast<int>(bits & 0x3ff);
  double value;
  if (exponent == 31)
    value = fraction ? std::nan("") : std::numeric_limits<double>::infinity();
  else
    value = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  return bits & 0x8000 ? -value : value;
}

// The float16 that `value` rounds to: the nearest, of two as near the even one; the largest's next is infinity.
static uint32_t half_nearest(double value) {
  const double size = std::fabs(value);
  uint32_t below = 0;  // the largest that is not larger
  for (uint32_t step = 0x4000; step; step /= 2)
    if (below + step < 0x7c00 && value_of_half(below + step) <= size) below += step;
  const double above = below + 1 < 0x7c00 ? value_of_half(below + 1) : 65536, to_above = above - size,
               to_below = size - value_of_half(below);
  const uint32_t rounded = to_below < to_above || (to_below == to_above && !(below & 1)) ? below : below + 1;
  return rounded | (std::signbit(value) ? 0x8000u : 0);
}

static void check_to_half(float value) {
  constexpr int lanes = kLanes<float>;
  uint32_t u;
  std::memcpy(&u, &value, 4);
  float16 whole[lanes], some[1];
  simd::store(whole, simd::broadcast<float>(value));
  simd::store_partial<float16>(some, simd::broadcast<float>(value), 1);
  const float16 scalar(value);
  if (std::isnan(value)) {
    CHECK(std::isnan(value_of_half(scalar.bits)), "scalar NaN %08x", u);
    CHECK(whole[0].bits == scalar.bits && whole[lanes - 1].bits == scalar.bits, "vector NaN %08x", u);
    return;
  }
  const uint32_t expected = half_nearest(static_cast<double>(value));
  CHECK(scalar.bits == expected, "scalar %08x: %04x, not %04x", u, scalar.bits, expected);
  CHECK(whole[0].bits == expected && whole[lanes - 1].bits == expected, "vector %08x: %04x", u, whole[0].bits);
  CHECK(some[0].bits == expected, "partial store of %08x: %04x", u, some[0].bits);
}

// All of them to float and back; what lies on and beside each of them and each middle of two, and around float's ends.
static void float16_conversions() {
  constexpr int lanes = kLanes<float16>, wide = kLanes<double>;
  Guarded<float16> from(lanes), few(wide);
  Guarded<float> to(lanes);
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const double exact = value_of_half(bits);
    const auto same = [&](double got) {
      return std::isnan(exact) ? std::isnan(got) : got == exact && std::signbit(got) == std::signbit(exact);
    };
    for (int i = 0; i < lanes; ++i) from[i].bits = static_cast<uint16_t>(i % 2 ? bits : bits ^ 0x5555u);
    for (int i = 0; i < wide; ++i) few[i].bits = static_cast<uint16_t>(bits);
    const float scalar = static_cast<float>(from[1]);
    CHECK(same(static_cast<double>(scalar)), "scalar %04x: %g", bits, static_cast<double>(scalar));
    const auto v = simd::load(from.data());
    CHECK(same(static_cast<double>(v[1])) && same(static_cast<double>(v[lanes - 1])), "vector %04x", bits);
    CHECK(same(static_cast<double>(simd::load_partial<float16>(from.data() + lanes - 1, 1)[0])), "partial %04x", bits);
    const auto w = simd::load_wide(few.data());
    CHECK(same(w[0]) && same(w[wide - 1]), "wide %04x", bits);
    if (std::isnan(exact)) continue;
    const float next = static_cast<float>(value_of_half(bits + 1)),
                middle = std::isfinite(scalar) && std::isfinite(next) ? (scalar + next) / 2 : scalar;
    for (const float value : {scalar, middle})
      for (const float beside : {value, std::nextafter(value, -1e30f), std::nextafter(value, 1e30f)})
        check_to_half(beside);
  }
  for (const float value : {65519.996f, 65520.0f, 65535.0f, 65536.0f, 1e9f, 3.4e38f, 1e-30f, 1e-45f, 2.98e-8f})
    check_to_half(value), check_to_half(-value);
  check_to_half(std::numeric_limits<float>::quiet_NaN());
  for (uint32_t low : {1u, 0x1000u, 0x2000u, 0x400000u, 0x7fffffu})
    for (uint32_t sign : {0u, 0x80000000u}) {
      const uint32_t u = sign | 0x7f800000u | low;
      float nan;
      std::memcpy(&nan, &u, 4);
      check_to_half(nan);
    }
}

template <class T> static void square_transpose() {
  constexpr int lanes = kLanes<T>;
  Vec<T> rows[lanes];
  for (int i = 0; i < lanes; ++i)
    for (int j = 0; j < lanes; ++j) rows[i][j] = static_cast<T>(100 * i + j);
  simd::transpose(rows);
  for (int i = 0; i < lanes; ++i)
    for (int j = 0; j < lanes; ++j) CHECK(rows[i][j] == 100 * j + i, "row %d, lane %d: %g", i, j, double(rows[i][j]));
}

template <class S, class D> static void matrix_transpose() {
  Random random;
  for (int64_t rows : {1, 3, 7, 8, 9, 16, 21})
    for (int64_t columns : {1, 2, 8, 13, 16, 33}) {
      const int64_t source_row = columns + random.below(3), target_row = rows + random.below(3);
      Guarded<S> source((rows - 1) * source_row + columns);
      Guarded<D> target((columns - 1) * target_row + rows);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j)
          source[i * source_row + j] = static_cast<S>(static_cast<acc_t<S>>(i * 8 + j % 8));
      for (int64_t i = 0; i < (columns - 1) * target_row + rows; ++i) target[i] = static_cast<D>(acc_t<D>(-1));
      simd::transpose(source.data(), source_row, rows, columns, target.data(), target_row);
      for (int64_t j = 0; j < columns; ++j)
        for (int64_t i = 0; i < (j + 1 < columns ? target_row : rows); ++i)
          CHECK(static_cast<acc_t<D>>(target[j * target_row + i]) ==
                    (i < rows ? static_cast<acc_t<D>>(i * 8 + j % 8) : -1),
                "%ld x %ld: element (%ld, %ld)", long(rows), long(columns), long(j), long(i));
    }
}

static void reductions() {
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = static_cast<float>(i + 1);
  CHECK(simd::reduce_add(v) == kLanes<float> * (kLanes<float> + 1) / 2, "%g", double(simd::reduce_add(v)));
  const Vec<float> one = simd::broadcast<float>(1), nan = simd::broadcast<float>(std::nanf(""));
  CHECK(simd::maximum(one, v)[1] == 2 && simd::maximum(v, one)[0] == 1, "maximum");
  CHECK(std::isnan(simd::maximum(one, nan)[0]) && std::isnan(simd::maximum(nan, one)[0]), "NaN wins a maximum");
}

int main() {
  if (!cpu_has_this_instruction_set()) return kSkipped;
  functions<float>(-87.3, 88.37);
  functions<double>(-745.0, 709.7);
  partial_loads_and_stores<float>();
  partial_loads_and_stores<double>();
  partial_loads_and_stores<bfloat16>();
  partial_loads_and_stores<float16>();
  bfloat16_rounding();
  float16_conversions();
  square_transpose<float>();
  square_transpose<double>();
  matrix_transpose<float, float>();
  matrix_transpose<double, double>();
  matrix_transpose<bfloat16, float>();
  matrix_transpose<float, bfloat16>();
  matrix_transpose<bfloat16, bfloat16>();
  matrix_transpose<float16, float>();
  matrix_transpose<float, float16>();
  matrix_transpose<float16, float16>();
  reductions();
  return report("simd");
}
