// wgmma.mma_async of bfloat16 and float16: D[64][n] (+)= A[64][16] B[16][n], operands in shared memory behind descriptors,
// or A in registers. From the issue until the wait, the accumulators are NaN: the product is made when a thread
// waits for it. Operands are read then, too; the checked build remembers them as being read from the issue on. A's
// registers must then hold what they held at the issue.
#include <algorithm>

#include "checker.h"
#include "machine.h"

namespace cuda_on_host {

namespace {

constexpr int kRows = 64, kDepth = 16;

// The byte offset in shared memory of element (outer, k) of an operand, as its descriptor tells it: bits 0-13 the start,
// 16-29 the leading and 32-45 the stride byte offset, all in units of 16 bytes; bits 62-63 are 1 for 128-byte swizzle.
struct Operand {
  uint32_t start, leading, stride;
  bool transposed;

  Operand(uint64_t descriptor, bool transposed)
      : start(static_cast<uint32_t>(descriptor & 0x3fff) << 4),
        leading(static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4),
        stride(static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4),
        transposed(transposed) {}

  uint32_t offset(int outer, int k) const {
    // k last: groups of 8 rows, 128 bytes a row. k first: rows of 64 outer elements, groups of 8 of them.
    const uint32_t o = static_cast<uint32_t>(outer), d = static_cast<uint32_t>(k);
    const uint32_t at = transposed ? start + o / 64 * leading + o % 64 * 2 + d / 8 * stride + d % 8 * 128
                                   : start + o / 8 * stride + o % 8 * 128 + d * 2;
    return at ^ (at >> 3 & 0x70);
  }
};

bool is_right(uint64_t descriptor) {
  // No other swizzle, and no base offset: the eight rows of the swizzle begin at a multiple of 1024.
  return descriptor >> 62 == 1 && (descriptor >> 46 & 0xffff) == 0 && (descriptor >> 14 & 3) == 0 &&
         (descriptor >> 30 & 3) == 0;
}

Warpgroup& warpgroup_of(const Thread& thread, size_t& number) {
  Block& block = *thread.block;
  if (block.warpgroups.empty()) block.warpgroups.resize((block.warps.size() + 3) / 4);
  number = static_cast<size_t>(thread.warp - block.warps.data()) / 4;
  return block.warpgroups[number];
}

int rank_of(const Thread& thread) {
  return static_cast<int>(thread.warp - thread.block->warps.data()) % 4 * 32 + thread.lane;
}

// Calls f(i, row, column) for each accumulator i of a thread of the warpgroup.
template <class F>
void for_each_accumulator(int rank, int n, F&& f) {
  const int row = rank / 32 * 16 + rank % 32 / 4, column = rank % 4 * 2;
  for (int i = 0; i < n / 2; i++) f(i, row + i / 2 % 2 * 8, column + i / 4 * 8 + i % 2);
}

float number_of(uint16_t bits, bool half) { return half ? __half2float({bits}) : __bfloat162float({bits}); }

float element(const Block& block, uint32_t offset, bool half) {
  uint16_t bits = 0;
  if (offset + 2 <= kArenaBytes) std::memcpy(&bits, block.memory + offset, 2);
  return number_of(bits, half);
}

// A thread of rank 32 w + 4 g + t holds rows 16 w + g and 8 further, columns 2 t and 2 t + 1, then those 8 further.
float element_of_registers(const MatrixProduct& product, int i, int k) {
  const int rank = i / 16 * 32 + i % 8 * 4 + k % 8 / 2, which = i % 16 / 8 + k / 8 * 2;
  const uint32_t pair = product.a_values[static_cast<size_t>(rank)][static_cast<size_t>(which)];
  return number_of(static_cast<uint16_t>(k % 2 ? pair >> 16 : pair), product.half);
}

void multiply(const Block& block, const MatrixProduct& product) {
  float a[kRows][kDepth], b[kDepth][256];
  const Operand of_a(product.a, product.a_transposed), of_b(product.b, product.b_transposed);
  const int n = product.n;
  for (int k = 0; k < kDepth; k++) {
    for (int i = 0; i < kRows; i++) {
      a[i][k] = product.a_in_registers ? element_of_registers(product, i, k)
                                       : element(block, of_a.offset(i, k), product.half);
    }
    for (int j = 0; j < n; j++) b[k][j] = element(block, of_b.offset(j, k), product.half);
  }
  for (int i = 0; i < kRows; i++) {
    float* sum = product.sum->value + 256 * i;
    if (!product.adds) std::fill_n(sum, n, 0.0f);
    for (int k = 0; k < kDepth; k++) {
      for (int j = 0; j < n; j++) sum[j] += a[i][k] * b[k][j];
    }
  }
}

void check_operands(Thread& thread, const MatrixProduct& product, size_t group, bool all) {
  Block& block = *thread.block;
  const Operand a(product.a, product.a_transposed), b(product.b, product.b_transposed);
  const auto check = [&](const Operand& operand, int outer) {
    for (int o = 0; o < outer; o += all ? 1 : outer - 1) {
      for (int k = 0; k < kDepth; k += all ? 1 : kDepth - 1) {
        if (!check_operand(thread, block, operand.offset(o, k), group, all)) return;
      }
    }
  };
  if (!product.a_in_registers) check(a, kRows);
  check(b, product.n);
}

void issue(float* c, const MatrixProduct& wanted, const uint32_t* a_registers) {
  Thread& thread = *machine.current;
  size_t group;
  Warpgroup& warpgroup = warpgroup_of(thread, group);
  const int rank = rank_of(thread), n = wanted.n;
  if (thread.block->warps.size() < 4 * group + 4 || group >= 8)
    return report("wgmma: the warps here are not a whole warpgroup");
  if (n % 8 || n < 8 || n > 256 || !(a_registers || is_right(wanted.a)) || !is_right(wanted.b))
    return report("wgmma: a wrong size or descriptor");

  const auto index = static_cast<size_t>(thread.products++);
  if (index == warpgroup.products.size()) {
    MatrixProduct& made = warpgroup.products.emplace_back(wanted);
    for (Sum* sum : thread.sums) {
      if (sum->registers[rank] == c) made.sum = sum;
    }
    if (!made.sum) made.sum = &warpgroup.sums.emplace_back(), made.sum->columns = n;
    if (a_registers) made.a_values.resize(128), made.a_registers.resize(128);
  }
  MatrixProduct& product = warpgroup.products[index];
  if (product.a != wanted.a || product.b != wanted.b || product.n != n || product.a_transposed != wanted.a_transposed ||
      product.b_transposed != wanted.b_transposed || product.adds != wanted.adds || product.half != wanted.half ||
      product.a_in_registers != wanted.a_in_registers)
    report("wgmma: threads of one warpgroup bring different arguments");
  if (a_registers && product.a_in_registers) {
    if (!thread.wgmma_fenced) report("wgmma: no wgmma.fence since A's registers were the thread's");
    std::memcpy(product.a_values[static_cast<size_t>(rank)].data(), a_registers, 16);
    product.a_registers[static_cast<size_t>(rank)] = a_registers;
  }

  Sum& sum = *product.sum;
  if (!sum.registers[rank]) {
    if (!thread.wgmma_fenced) report("wgmma: no wgmma.fence since the accumulators were the thread's");
    for_each_accumulator(rank, n, [&](int i, int row, int column) { sum.value[256 * row + column] = c[i]; });
    std::memset(c, kPoison, sizeof(float) * static_cast<size_t>(n) / 2);
    sum.registers[rank] = c;
    thread.sums.push_back(&sum);
  } else if (sum.registers[rank] != c) {
    report("wgmma: threads of one warpgroup bring different accumulators");
  }
  if (sum.columns != n) return report("wgmma: another size for the accumulators of a product under way");
  for (int i = 0; i < n / 2; i++) {
    uint32_t word;
    std::memcpy(&word, c + i, 4);
    if (word == 0xffffffffu) continue;
    report("wgmma: accumulators were written while a product was under way");
    break;
  }
  sum.last[rank] = static_cast<int>(index) + 1;
  const bool last = ++product.issued == 128;
  check_operands(thread, product, group, last);
  if (!last) return;
  product.time = machine.clock++;
  for (Thread* waiting : warpgroup.waiting) make_ready(waiting);
  warpgroup.waiting.clear();
}

}  // namespace

void wgmma_fence() { machine.current->wgmma_fenced = true; }

void wgmma(float* c, int n, uint64_t a, uint64_t b, bool a_transposed, bool b_transposed, bool adds, bool half) {
  issue(c, {a, b, n, a_transposed, b_transposed, adds, half, false}, nullptr);
}

void wgmma(float* c, int n, const uint32_t (&a)[4], uint64_t b, bool b_transposed, bool adds, bool half) {
  issue(c, {0, b, n, false, b_transposed, adds, half, true}, a);
}

void wgmma_commit() { machine.current->product_groups.push_back(machine.current->products); }

void wgmma_wait(int groups_left) {
  Thread& thread = *machine.current;
  size_t group;
  Warpgroup& warpgroup = warpgroup_of(thread, group);
  const int rank = rank_of(thread);
  const auto groups = static_cast<int>(thread.product_groups.size());
  if (groups <= groups_left) return;
  const int upto = thread.product_groups[static_cast<size_t>(groups - 1 - groups_left)];
  if (upto == 0) return;
  while (warpgroup.products[static_cast<size_t>(upto) - 1].issued < 128) {
    warpgroup.waiting.push_back(&thread);
    sleep("wgmma.wait_group");
  }
  for (; warpgroup.done < static_cast<size_t>(upto); warpgroup.done++)
    multiply(*thread.block, warpgroup.products[warpgroup.done]);
  learn(thread.known, thread.block->warpgroup_slot(group), warpgroup.products[static_cast<size_t>(upto) - 1].time + 1);
  for (; thread.products_waited < upto; thread.products_waited++) {
    const MatrixProduct& product = warpgroup.products[static_cast<size_t>(thread.products_waited)];
    if (product.a_in_registers && std::memcmp(product.a_registers[static_cast<size_t>(rank)],
                                              product.a_values[static_cast<size_t>(rank)].data(), 16) != 0)
      report("wgmma: A's registers were written while a product was under way");
  }
  size_t kept = 0;
  for (Sum* sum : thread.sums) {
    if (sum->last[rank] > upto) {
      thread.sums[kept++] = sum;
      continue;
    }
    const int n = sum->columns;
    float* c = sum->registers[rank];
    for_each_accumulator(rank, n, [&](int i, int row, int column) { c[i] = sum->value[256 * row + column]; });
    sum->retired++;
    thread.wgmma_fenced = false;
  }
  thread.sums.resize(kept);
  while (!warpgroup.sums.empty() && warpgroup.sums.front().retired == 128) warpgroup.sums.pop_front();
}

}  // namespace cuda_on_host
