// gemm.h against a loop in double, on the instruction set this file is compiled for: odd sizes, every layout, sums onto
// C, an epilogue. The bound is the textbook one (Higham 2002, section 3.1): a sum of k products in any order is off by
// at most gamma_k = k u / (1 - k u) times the sum of their absolute values. Operands end at a guarded page.
#include "cpu/gemm.h"

#include <type_traits>
#include <vector>

#include "check.h"

namespace simd = dlkern::cpu::DLKERN_ISA;
using dlkern::acc_t;
using dlkern::bfloat16;
using dlkern::float16;
using dlkern::cpu::DLKERN_ISA::Gemm;
using namespace dlkern::test;

template <class T> constexpr double kUnit = sizeof(acc_t<T>) == 4 ? 5.9604644775390625e-8 : 1.1102230246251565e-16;
template <class T> constexpr double kStorageUnit = std::is_same_v<T, bfloat16> ? 0x1p-8 : 0x1p-11;
constexpr double kSubnormal = 0x1p-25;  // half of float16's smallest number, which its subnormals are off by

// C + bias[j] - i: that it sees each element once, with its own row and column.
template <class T> struct ShiftByPlace {
  const acc_t<T>* bias;
  template <class V> V operator()(V value, int64_t i, int64_t j, int count) const {
    for (int l = 0; l < count; ++l) value[l] += bias[j + l] - static_cast<acc_t<T>>(i);
    return value;
  }
};

// A matrix of rows x columns in one of several layouts.
template <class T> struct Operand {
  int64_t row, column;
  Guarded<T> memory;
  static int64_t extent(int64_t rows, int64_t columns, int64_t row, int64_t column) {
    return rows && columns ? (rows - 1) * row + (columns - 1) * column + 1 : 1;
  }
  Operand(int64_t rows, int64_t columns, int64_t row, int64_t column, Random& random)
      : row(row), column(column), memory(extent(rows, columns, row, column)) {
    for (int64_t i = 0; i < extent(rows, columns, row, column); ++i)
      memory[i] = static_cast<T>(static_cast<acc_t<T>>(random.value()));
  }
  double at(int64_t i, int64_t j) { return static_cast<acc_t<T>>(memory[i * row + j * column]); }
};

template <class T> static Operand<T> operand(int64_t rows, int64_t columns, Random& random) {
  const int64_t gap = random.one_of({int64_t{0}, int64_t{0}, int64_t{1}, int64_t{5}});
  switch (random.below(5)) {
    case 0:
    case 1: return {rows, columns, columns + gap, 1, random};
    case 2:
    case 3: return {rows, columns, 1, rows + gap, random};
    default: return {rows, columns, 2 * columns + gap, 2, random};
  }
}

template <class T> static void one_product(Random& random) {
  const int64_t sizes[] = {1,  2,  3,  5,  6,  7,   12,  13,  16,  17,  24,  25,  31,
                           33, 47, 64, 65, 97, 130, 193, 259, 300, 400, 800, 1100};
  const int64_t depths[] = {0, 1, 2, 3, 8, 15, 31, 32, 33, 64, 100, 127, 128, 129, 257, 300, 530, 700};
  const int64_t m = random.one_of(sizes), n = random.one_of(sizes), k = random.one_of(depths);
  if (m * n * (k + 1) > 1500000) return;
  auto a = operand<T>(m, k, random);
  auto b = operand<T>(k, n, random);
  const int64_t c_row = n + random.one_of({int64_t{0}, int64_t{0}, int64_t{3}}), c_count = (m - 1) * c_row + n;
  const bool accumulate = random.below(2), shift = random.below(2), biased = random.below(2);
  Guarded<T> c(c_count), alone(c_count);
  std::vector<double> before(static_cast<size_t>(c_count));
  for (int64_t i = 0; i < c_count; ++i) {
    c[i] = alone[i] = static_cast<T>(static_cast<acc_t<T>>(random.value()));
    before[static_cast<size_t>(i)] = static_cast<acc_t<T>>(c[i]);
  }
  std::vector<acc_t<T>> bias(static_cast<size_t>(n));
  for (auto& value : bias) value = static_cast<acc_t<T>>(random.value());

  Guarded<T> added(n);
  for (int64_t j = 0; j < n; ++j) added[j] = static_cast<T>(static_cast<acc_t<T>>(random.value()));

  Gemm<T> g{};
  g.m = m, g.n = n, g.k = k;
  g.a = a.memory.data(), g.a_row = a.row, g.a_column = a.column;
  g.b = b.memory.data(), g.b_row = b.row, g.b_column = b.column;
  g.c_row = c_row, g.accumulate = accumulate, g.bias = biased ? added.data() : nullptr;
  for (T* result : {c.data(), alone.data()}) {  // on all threads, and on this one: the same bits
    g.c = result;
    const bool threads = result == c.data();
    if (shift && threads) simd::gemm(g, ShiftByPlace<T>{bias.data()});
    if (shift && !threads) simd::gemm_block(g, ShiftByPlace<T>{bias.data()});
    if (!shift && threads) simd::gemm(g);
    if (!shift && !threads) simd::gemm_block(g);
  }
  CHECK(!std::memcmp(c.data(), alone.data(), static_cast<size_t>(c_count) * sizeof(T)),
        "m %ld n %ld k %ld: bits depend on the threads", long(m), long(n), long(k));

  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < c_row && i * c_row + j < c_count; ++j) {
      const double old = before[static_cast<size_t>(i * c_row + j)], got = static_cast<acc_t<T>>(c[i * c_row + j]);
      if (j >= n) {
        CHECK(got == old, "m %ld n %ld k %ld: wrote between the rows of C, (%ld, %ld)", long(m), long(n), long(k),
              long(i), long(j));
        continue;
      }
      double exact = accumulate ? old : 0, size = std::fabs(exact);
      for (int64_t p = 0; p < k; ++p) {
        exact += a.at(i, p) * b.at(p, j);
        size += std::fabs(a.at(i, p) * b.at(p, j));
      }
      if (biased) {
        const double moved = static_cast<acc_t<T>>(added[j]);
        exact += moved;
        size += std::fabs(moved);
      }
      if (shift) {
        const double moved = static_cast<double>(bias[static_cast<size_t>(j)]) - static_cast<double>(i);
        exact += moved;
        size += std::fabs(static_cast<double>(bias[static_cast<size_t>(j)])) + static_cast<double>(i);
      }
      const double roundings = static_cast<double>(k + 4 + biased) * kUnit<T>;
      double bound = roundings / (1 - roundings) * size;
      if (sizeof(T) == 8) bound *= 2;  // the loop it is compared with rounds as much
      if (sizeof(T) == 2) bound += kStorageUnit<T> * (std::fabs(exact) + bound) + kSubnormal;
      CHECK(std::fabs(got - exact) <= bound,
            "m %ld n %ld k %ld strides %ld %ld %ld %ld accumulate %d: (%ld, %ld) is %.9g, not %.9g", long(m), long(n),
            long(k), long(a.row), long(a.column), long(b.row), long(b.column), accumulate, long(i), long(j), got,
            exact);
    }
}

int main() {
  if (!cpu_has_this_instruction_set()) return kSkipped;
  Random random;
  for (int i = 0; i < 500; ++i) {
    one_product<float>(random);
    one_product<double>(random);
    one_product<bfloat16>(random);
    one_product<float16>(random);
  }
  return report("gemm");
}
