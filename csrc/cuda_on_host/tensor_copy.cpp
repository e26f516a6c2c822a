// cp.async.bulk.tensor from global to shared memory. The destination is NaN from the issue until the copy runs: when
// somebody waits for its mbarrier (or at once, in some thread orders). Outside the tensor it writes zeros.
//
// im2col: box[1] pixels of a [N, H, W, C] tensor in reading order, starting at (at[1], at[2], at[3]) = (w, h, n) and
// going by `step` over the positions from `lower` up to size - 1 + `upper`, the last image's last pixel followed by
// zeros; each is read at w + offset[0], h + offset[1].
#include <algorithm>

#include "checker.h"
#include "machine.h"

namespace cuda_on_host {

namespace {

constexpr int kRowBytes = 128;  // of a box; the swizzle's period is eight rows

// Calls f(row, source, begin, end) for each row of the box: its bytes from `begin` to `end` lie inside the tensor, from
// `source` on, and the rest is zero.
template <class F>
void for_each_row(const TensorMap& map, const int (&start)[4], const int (&offset)[2], F&& f) {
  const int64_t first = start[0];
  const int64_t box = map.box[0];
  const int64_t begin = std::clamp<int64_t>(-first, 0, box);
  const int64_t end = std::clamp<int64_t>(static_cast<int64_t>(map.size[0]) - first, begin, box);
  int at[4] = {start[0], start[1], start[2], start[3]};
  const uint32_t rows = map.im2col ? map.box[1] : map.box[1] * map.box[2] * map.box[3];
  for (uint32_t row = 0; row < rows; row++) {
    int64_t where[4] = {first, at[1], at[2], at[3]};
    if (map.im2col) where[1] += offset[0], where[2] += offset[1];
    bool outside = false;
    int64_t byte = (first + begin) * 2;
    for (int d = 1; d < map.rank; d++) {
      outside |= where[d] < 0 || where[d] >= static_cast<int64_t>(map.size[d]);
      byte += where[d] * static_cast<int64_t>(map.stride[d]);
    }
    const auto* source = static_cast<const char*>(map.base) + byte;
    f(row, source, static_cast<int>(begin) * 2, static_cast<int>(outside ? begin : end) * 2);
    if (map.im2col) {
      for (int d = 1; d <= 2; d++) {
        at[d] += map.step[d - 1];
        if (at[d] <= static_cast<int64_t>(map.size[d]) - 1 + map.upper[d - 1]) break;
        at[d] = map.lower[d - 1];
        if (d == 2) at[3]++;
      }
    } else {
      for (int d = 1; d < map.rank; d++) {
        if (++at[d] < start[d] + static_cast<int>(map.box[d])) break;
        at[d] = start[d];
      }
    }
  }
}

uint32_t box_rows(const TensorMap& map) { return map.im2col ? map.box[1] : map.box[1] * map.box[2] * map.box[3]; }

}  // namespace

bool tensor_map_is_valid(const TensorMap& map) {
  if (reinterpret_cast<uintptr_t>(map.base) % 16 || map.rank < 2 || map.rank > 4) return false;
  for (int d = 0; d < map.rank; d++) {
    if (map.size[d] == 0 || map.size[d] > uint64_t{1} << 32) return false;
    if (d > 0 && (map.stride[d] % 16 || map.stride[d] >= uint64_t{1} << 40)) return false;
    if (!map.im2col && (map.box[d] == 0 || map.box[d] > 256)) return false;
  }
  if (map.box[0] * 2 != kRowBytes) return false;  // this tool's own limit: rows as long as the swizzle
  if (!map.im2col) return true;
  if (map.rank != 4 || map.box[1] == 0 || map.box[1] > 1024) return false;
  for (int i = 0; i < 2; i++) {
    if (map.step[i] < 1 || map.step[i] > 8) return false;
    if (map.lower[i] < -128 || map.lower[i] > 127 || map.upper[i] < -128 || map.upper[i] > 127) return false;
  }
  return true;
}

void tensor_copy(void* destination, const TensorMap& map, uint64_t* barrier, const int (&at)[4],
                 const int (&offset)[2]) {
  Thread& thread = *machine.current;
  Mbarrier* found = find_mbarrier(barrier, "cp.async.bulk.tensor");
  if (!found) return;
  if (!found->fenced) report("cp.async.bulk.tensor: no fence after the init of its mbarrier");
  if (shared_address(destination) % 1024)
    return report("cp.async.bulk.tensor: the destination is not a multiple of 1024, the swizzle's period");
  if (map.im2col && (offset[0] < 0 || offset[0] > 255 || offset[1] < 0 || offset[1] > 255))
    return report("cp.async.bulk.tensor: an im2col offset that does not fit 8 bits");
  const size_t bytes = size_t{kRowBytes} * box_rows(map);
  for_each_row(map, at, offset, [&](uint32_t, const char* source, int begin, int end) {
    check_read(thread, source, static_cast<size_t>(end - begin));
  });
  check_tensor_issue(thread, destination, bytes);
  std::memset(destination, kPoison, bytes);
  TensorCopy copy{static_cast<unsigned char*>(destination), map, {at[0], at[1], at[2], at[3]}, {offset[0], offset[1]}};
  found->copies.push_back(copy);
  found->copied = found->phase + 1;
  if (early()) return run_copy(*found, found->copies.size() - 1);
  for (Thread* waiting : found->waiting) make_ready(waiting);
  found->waiting.clear();
}

void run_copy(Mbarrier& barrier, size_t which) {
  Block& block = *machine.current->block;
  const TensorCopy copy = barrier.copies[which];
  barrier.copies.erase(barrier.copies.begin() + static_cast<ptrdiff_t>(which));
  const auto start = static_cast<uint32_t>(copy.destination - block.memory);
  for_each_row(copy.map, copy.at, copy.offset, [&](uint32_t row, const char* source, int begin, int end) {
    unsigned char bytes[kRowBytes] = {};
    if (end > begin) std::memcpy(bytes + begin, source, static_cast<size_t>(end - begin));
    for (uint32_t piece = 0; piece < kRowBytes; piece += 16) {
      const uint32_t address = start + row * kRowBytes + piece;
      std::memcpy(block.memory + (address ^ (address >> 3 & 0x70)), bytes + piece, 16);
    }
  });
  const size_t bytes = size_t{kRowBytes} * box_rows(copy.map);
  size_t number = 0;
  while (&block.mbarriers[number] != &barrier) number++;
  mark_copied(block, copy.destination, bytes, number);
  learn(barrier.arriving, block.mbarrier_slot(number), ++machine.clock);
  barrier.bytes -= static_cast<int64_t>(bytes);
  settle(barrier);
}

}  // namespace cuda_on_host
