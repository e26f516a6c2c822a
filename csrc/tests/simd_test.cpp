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
  bfloat16_rounding();
  square_transpose<float>();
  square_transpose<double>();
  matrix_transpose<float, float>();
  matrix_transpose<double, double>();
  matrix_transpose<bfloat16, float>();
  matrix_transpose<float, bfloat16>();
  matrix_transpose<bfloat16, bfloat16>();
  reductions();
  return report("simd");
}
