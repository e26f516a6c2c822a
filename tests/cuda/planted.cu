// Kernels for the tests of csrc/cuda_on_host itself (tests/test_cuda_on_host.py). Each of the first group is right, and
// with BUG wrong in one way that the checked build must report; those of the second group compute something exactly.
#include <array>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "cuda/block_reduce.cuh"
#include "cuda/grid_sync.cuh"
#include "cuda/hopper.cuh"
#include "cuda/pack.cuh"
#include "cuda/ptx.cuh"
#include "cuda_on_host/control.h"

using namespace dlkern::cuda;

namespace {

constexpr int kThreads = 128;
constexpr int kSize = 4 * kThreads;  // elements of each tensor

// ---- Right, or wrong in one way ----

template <bool BUG>
__global__ void barrier_before_read(const float* in, float* out) {
  DLKERN_SHARED(float, value, [kThreads]);
  value[threadIdx.x] = in[threadIdx.x];
  if (!BUG) __syncthreads();
  out[threadIdx.x] = value[kThreads - 1 - threadIdx.x];
}

template <bool BUG>
__global__ void barrier_before_overwrite(const float* in, float* out) {
  DLKERN_SHARED(float, value, [kThreads]);
  float sum = 0;
  for (int i = 0; i < 4; i++) {
    value[threadIdx.x] = in[i * kThreads + threadIdx.x];
    __syncthreads();
    sum += value[(threadIdx.x + 1) % kThreads];
    if (!BUG) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

template <bool BUG>
__global__ void syncwarp_before_read(const float* in, float* out) {
  DLKERN_SHARED(float, value, [kThreads]);
  value[threadIdx.x] = in[threadIdx.x];
  if (!BUG) __syncwarp();
  out[threadIdx.x] = value[threadIdx.x ^ 1];
}

template <bool BUG>
__global__ void cp_async_wait_for_all(const float* in, float* out) {
  DLKERN_SHARED(float, value, [2][4 * kThreads]);
  for (int stage = 0; stage < 2; stage++) {
    cp_async16(value[stage] + 4 * threadIdx.x, in + 4 * threadIdx.x, 16);
    cp_async_commit();
  }
  cp_async_wait<BUG ? 1 : 0>();
  __syncthreads();
  const float read = value[1][4 * ((threadIdx.x + 1) % kThreads)];
  cp_async_wait<0>();
  out[threadIdx.x] = read;
}

template <bool BUG>
__global__ void barrier_after_cp_async_wait(const float* in, float* out) {
  DLKERN_SHARED(float, value, [4 * kThreads]);
  cp_async16(value + 4 * threadIdx.x, in + 4 * threadIdx.x, 16);
  cp_async_commit();
  cp_async_wait<0>();
  if (!BUG) __syncthreads();
  out[threadIdx.x] = value[4 * ((threadIdx.x + 1) % kThreads)];
}

template <bool BUG>
__global__ void ldmatrix_after_barrier(const float* in, float* out) {
  DLKERN_DYNAMIC_SHARED(raw);
  float* value = reinterpret_cast<float*>(raw);  // 64 rows of 16 bytes
  for (int i = threadIdx.x; i < 256; i += kThreads) value[i] = in[i];
  if (!BUG) __syncthreads();
  uint32_t fragment[4];
  ldmatrix_x4(fragment, raw + 16 * ((threadIdx.x + 32) % 64));
  out[threadIdx.x] = static_cast<float>(fragment[0] & 0xff);
}

// Static and dynamic arrays together: more than 48 KB, and a dynamic part that is less and so asks for nothing.
__global__ void shared_in_all(const float* in, float* out) {
  DLKERN_DYNAMIC_SHARED(raw);
  DLKERN_SHARED(float, value, [kThreads]);
  float* const other = reinterpret_cast<float*>(raw);
  other[threadIdx.x] = value[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = other[threadIdx.x] + value[threadIdx.x];
}

template <bool BUG>
__global__ void all_of_shared_written(const float* in, float* out) {
  DLKERN_SHARED(float, value, [kThreads]);
  if (!BUG || threadIdx.x != 77) value[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = value[threadIdx.x ^ 1];
}

template <bool BUG>
__global__ void shared_read_inside(const float* in, float* out) {
  DLKERN_SHARED(float, value, [kThreads]);
  value[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = value[threadIdx.x + (BUG ? 1 : 0)];
}

template <bool BUG>
__global__ void shared_write_inside(const float* in, float* out) {
  DLKERN_SHARED(float, value, [kThreads]);
  value[threadIdx.x + (BUG ? 1 : 0)] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = value[threadIdx.x == 0 ? 1 : threadIdx.x];
}

template <bool BUG>
__global__ void global_read_inside(const float* in, float* out) {
  out[threadIdx.x] = in[kSize - kThreads + threadIdx.x + (BUG ? 1 : 0)];
}

template <bool BUG>
__global__ void global_write_inside(const float* in, float* out) {
  const int at = threadIdx.x == kThreads - 1 && BUG ? kSize : static_cast<int>(threadIdx.x);
  out[at] = in[threadIdx.x];
}

template <bool BUG>
__global__ void vector_read_inside(const float* in, float* out) {
  const auto pack = load_pack<float, 4>(in + kSize - 4 * kThreads + 4 * threadIdx.x + (BUG ? 4 : 0));
  out[threadIdx.x] = pack.at[0] + pack.at[3];
}

template <bool BUG>
__global__ void inputs_only_read(float* in, float* out) {
  out[threadIdx.x] = in[threadIdx.x];
  if (BUG && threadIdx.x == 5) in[5] = 1.0f;
}

template <bool BUG>
__global__ void one_writer_a_result(const float* in, float* out) {  // two blocks
  out[BUG ? threadIdx.x : blockIdx.x * kThreads + threadIdx.x] = in[threadIdx.x];
}

template <bool BUG>
__global__ void grid_sync_before_read(const float* in, float* out) {  // two blocks, cooperative
  const int self = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  out[self] = in[self];
  if (!BUG) grid_sync();
  out[2 * kThreads + self] = out[(self + kThreads) % (2 * kThreads)];
}

// Two blocks, cooperative, that meet through a counter, as csrc/cuda/rnn_steps.cuh does.
enum class Missing { nothing, wait, barrier_before_release, barrier_after_acquire, arrival };

template <Missing MISSING>
__global__ void meet(const float* in, float* out) {
  const int self = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  auto* const counter = reinterpret_cast<unsigned*>(out + kSize - 1);
  if (self == 0) *counter = 0;
  grid_sync();
  out[self] = in[self];
  if (MISSING != Missing::barrier_before_release) __syncthreads();
  if (threadIdx.x == 0) {
    if (MISSING != Missing::arrival || blockIdx.x == 0) red_release_add(counter, 1);
    while (MISSING != Missing::wait && ld_acquire(counter) < 2) spin_wait();
  }
  if (MISSING != Missing::barrier_after_acquire) __syncthreads();
  if (threadIdx.x < kThreads / 2) out[2 * kThreads + self] = out[(self + kThreads) % (2 * kThreads)];
}
template <bool BUG>
constexpr auto counter_waited_for = meet < BUG ? Missing::wait : Missing::nothing > ;
template <bool BUG>
constexpr auto barrier_before_release = meet < BUG ? Missing::barrier_before_release : Missing::nothing > ;
template <bool BUG>
constexpr auto barrier_after_acquire = meet < BUG ? Missing::barrier_after_acquire : Missing::nothing > ;
template <bool BUG>
constexpr auto everybody_arrives = meet < BUG ? Missing::arrival : Missing::nothing > ;

template <bool BUG>
__global__ void atomic_counting(const float* in, float* out) {
  if (threadIdx.x == 0) out[0] = 0.0f;
  __syncthreads();
  if (BUG)
    out[0] = out[0] + in[threadIdx.x];
  else
    atomicAdd(out, in[threadIdx.x]);
}

template <bool BUG>
__global__ void everybody_shuffles(const float* in, float* out) {
  float value = in[threadIdx.x];
  if (BUG && threadIdx.x == 3)
    __syncthreads();
  else
    value = __shfl_xor_sync(0xffffffffu, value, 1);
  out[threadIdx.x] = value;
}

template <bool BUG>
__global__ void one_barrier_for_all(const float* in, float* out) {
  if (BUG && threadIdx.x >= 64) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = in[threadIdx.x];
}

// Two warps write, two others read, behind a barrier of these threads.
enum class Named { right, wait, count };
template <Named WRONG>
__global__ void named_barrier(const float* in, float* out) {
  DLKERN_SHARED(float, value, [kThreads / 2]);
  const int place = static_cast<int>(threadIdx.x) % 64;
  if (threadIdx.x < 64) {
    value[place] = in[place];
    if (WRONG == Named::count)
      barrier_arrive<96>(3);
    else
      barrier_arrive<128>(3);
  } else if (WRONG == Named::wait) {
    barrier_arrive<128>(3);
    out[place] = value[63 - place];
  } else {
    barrier_sync<128>(3);
    out[place] = value[63 - place];
  }
}

// A tensor copy by the first warpgroup into two stages, multiplied by the second one, as csrc/cuda/wgmma_tile.cuh does.
enum class Hopper {
  right,
  init_fence,
  barrier_after_init,
  empty_wait,
  full_wait,
  full_parity,
  bytes,
  arrivals,
  copies,
  alignment,
  tensor,
  proxy_fence,
  wgmma_fence,
  release_after_wait,
  last_wait,
  operand_write,
  a_fence,
  a_write,
};

template <Hopper WRONG>
__global__ void hopper(const float* in, float* out) {
  constexpr int kSteps = 4, kTile = 64 * 64, kBytes = 2 * kTile;
  DLKERN_DYNAMIC_SHARED(raw);
  auto* const shared = reinterpret_cast<bf16*>(raw);  // two stages of A, then B
  bf16* const b = shared + 2 * kTile;
  DLKERN_SHARED(uint64_t, full, [2]);
  DLKERN_SHARED(uint64_t, empty, [2]);
  TensorMap map;
  const int64_t size[3] = {64, WRONG == Hopper::tensor ? 17 : 16, 1}, stride[2] = {64, 0};
  make_tiled_map(map, in, 2, size, stride, 64);
  for (int i = static_cast<int>(threadIdx.x); i < kTile; i += 256) b[i] = from_float<bf16>(static_cast<float>(i % 7));
  if (WRONG != Hopper::proxy_fence) fence_proxy_async();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < 2; stage++) {
      mbarrier_init(full + stage, 1);
      mbarrier_init(empty + stage, WRONG == Hopper::arrivals ? 5 : 4);
    }
    if (WRONG != Hopper::init_fence) mbarrier_init_fence();
  }
  if (WRONG != Hopper::barrier_after_init) __syncthreads();
  if (threadIdx.x < 128) {
    for (int step = 0; threadIdx.x == 0 && step < kSteps + (WRONG == Hopper::copies); step++) {
      const int stage = step % 2;
      if (WRONG != Hopper::empty_wait) mbarrier_wait(empty + stage, (step / 2 + 1) % 2);
      mbarrier_arrive_expect(full + stage, WRONG == Hopper::bytes ? kBytes - 128 : kBytes);
      tensor_copy_2d(shared + stage * kTile + (WRONG == Hopper::alignment ? 64 : 0), map, full + stage, 0, step);
    }
    return;
  }
  float c[32] = {};
  for (int step = 0; step < kSteps; step++) {
    bf16* const a = shared + step % 2 * kTile;
    if (WRONG != Hopper::full_wait)
      mbarrier_wait(full + step % 2, (step / 2 + (WRONG == Hopper::full_parity ? 1 : 0)) % 2);
    if (WRONG != Hopper::wgmma_fence) wgmma_fence(c);
    for (int k = 0; k < 64; k += 16)
      wgmma<bf16, false, false>(c, matrix_descriptor(a + k, 16), matrix_descriptor(b + k, 16), true);
    wgmma_commit();
    if (WRONG == Hopper::operand_write && threadIdx.x == 128) a[5] = b[5];
    if (WRONG != Hopper::release_after_wait) wgmma_wait<0>();
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(empty + step % 2);
    if (WRONG == Hopper::release_after_wait && step + 1 < kSteps) wgmma_wait<0>();
  }
  if (WRONG != Hopper::last_wait) {
    wgmma_wait_all(c);
  } else {
    wgmma_fence(c);
    wgmma<bf16, false, false>(c, matrix_descriptor(b, 16), matrix_descriptor(b, 16), true);
    wgmma_commit();
  }
  for (int i = 0; i < 4; i++) out[(threadIdx.x - 128) * 4 + i] = c[i];
}

// A product becomes the next one's A, in registers.
template <Hopper WRONG>
__global__ void hopper_registers(const float* in, float* out) {
  DLKERN_DYNAMIC_SHARED(raw);
  auto* const b = reinterpret_cast<bf16*>(raw);
  for (int i = static_cast<int>(threadIdx.x); i < 64 * 64; i += 128) b[i] = from_float<bf16>(in[i % kSize]);
  fence_proxy_async();
  __syncthreads();
  float c[32], d[32];
  wgmma_fence(c);
  for (int k = 0; k < 64; k += 16)
    wgmma<bf16, false, false>(c, matrix_descriptor(b + k, 16), matrix_descriptor(b + k, 16), k > 0);
  wgmma_commit();
  wgmma_wait_all(c);
  uint32_t a[4][4];
  for (int i = 0; i < 16; i++) a[i / 4][i % 4] = pack_pair<bf16>(c[2 * i], c[2 * i + 1]);
  if (WRONG != Hopper::a_fence) wgmma_fence(d, a);
  for (int k = 0; k < 4; k++) wgmma_registers<bf16, true>(d, a[k], matrix_descriptor(b + k * 16 * 64, 16), k > 0);
  wgmma_commit();
  if (WRONG == Hopper::a_write) a[1][2]++;
  wgmma_wait_all(d);
  for (int i = 0; i < 4; i++) out[threadIdx.x * 4 + i] = d[i];
}

struct Case {
  void (*kernel)(const float*, float*);
  unsigned blocks = 1;
  bool cooperative = false;
  size_t shared = 0;
  unsigned threads = kThreads;
};
#define HOPPER_CASE(name)                                                                                       \
  {                                                                                                             \
    "hopper_" #name, {                                                                                          \
      Case{hopper<Hopper::right>, 1, false, 3 * 8192, 256}, Case{hopper<Hopper::name>, 1, false, 3 * 8192, 256} \
    }                                                                                                           \
  }

#define HOPPER_REGISTERS_CASE(name)                                                                               \
  {                                                                                                               \
    "hopper_" #name, {                                                                                            \
      Case{hopper_registers<Hopper::right>, 1, false, 8192}, Case{hopper_registers<Hopper::name>, 1, false, 8192} \
    }                                                                                                             \
  }

#define CASE(name, ...)                                                    \
  {                                                                        \
    #name, {                                                               \
      Case{name<false>, ##__VA_ARGS__}, Case { name<true>, ##__VA_ARGS__ } \
    }                                                                      \
  }
const std::map<std::string, std::array<Case, 2>>& cases() {
  static const std::map<std::string, std::array<Case, 2>> all = {
      CASE(barrier_before_read),
      CASE(barrier_before_overwrite),
      CASE(syncwarp_before_read),
      CASE(cp_async_wait_for_all),
      CASE(barrier_after_cp_async_wait),
      CASE(ldmatrix_after_barrier, 1, false, 1024),
      CASE(all_of_shared_written),
      CASE(shared_read_inside),
      CASE(shared_write_inside),
      CASE(global_read_inside),
      CASE(global_write_inside),
      CASE(vector_read_inside),
      CASE(one_writer_a_result, 2),
      CASE(grid_sync_before_read, 2, true),
      CASE(counter_waited_for, 2, true),
      CASE(barrier_before_release, 2, true),
      CASE(barrier_after_acquire, 2, true),
      CASE(everybody_arrives, 2, true),
      CASE(atomic_counting),
      CASE(everybody_shuffles),
      CASE(one_barrier_for_all),
      HOPPER_CASE(init_fence),
      HOPPER_CASE(barrier_after_init),
      HOPPER_CASE(empty_wait),
      HOPPER_CASE(full_wait),
      HOPPER_CASE(full_parity),
      HOPPER_CASE(bytes),
      HOPPER_CASE(arrivals),
      HOPPER_CASE(copies),
      HOPPER_CASE(alignment),
      HOPPER_CASE(tensor),
      HOPPER_CASE(proxy_fence),
      HOPPER_CASE(wgmma_fence),
      HOPPER_CASE(release_after_wait),
      HOPPER_CASE(last_wait),
      HOPPER_CASE(operand_write),
      HOPPER_REGISTERS_CASE(a_fence),
      HOPPER_REGISTERS_CASE(a_write),
      {"named_barrier_wait", {Case{named_barrier<Named::right>}, Case{named_barrier<Named::wait>}}},
      {"named_barrier_count", {Case{named_barrier<Named::right>}, Case{named_barrier<Named::count>}}},
      {"shared_in_all", {Case{shared_in_all, 1, false, 47 * 1024}, Case{shared_in_all, 1, false, 48 * 1024}}},
      {"shared_in_a_block", {Case{shared_in_all, 1, false, 226 * 1024}, Case{shared_in_all, 1, false, 227 * 1024}}},
      {"some_blocks", {Case{atomic_counting<false>, 1}, Case{atomic_counting<false>, 0}}},
      {"inputs_only_read",
       {Case{reinterpret_cast<void (*)(const float*, float*)>(inputs_only_read<false>)},
        Case{reinterpret_cast<void (*)(const float*, float*)>(inputs_only_read<true>)}}},
  };
  return all;
}

// ---- Exact ----

__global__ void shuffles_kernel(const float* in, float* out) {
  const float value = in[threadIdx.x];
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, value, 5);
  out[kThreads + threadIdx.x] = __shfl_down_sync(0xffffffffu, value, 3);
  out[2 * kThreads + threadIdx.x] = __shfl_sync(0xffffffffu, value, (threadIdx.x * 7) % 32);
  // Two halves of a warp apart from each other.
  const unsigned half = threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  out[3 * kThreads + threadIdx.x] = __shfl_xor_sync(half, value, 9);
}
bool shuffles(const float* in, float* out) {
  DLKERN_LAUNCH(shuffles_kernel, dim3(1), dim3(kThreads), 0, nullptr, in, out);
  bool same = true;
  for (int i = 0; i < kThreads; i++) {
    const int warp = i / 32 * 32, lane = i % 32;
    same &= out[i] == in[warp + (lane ^ 5)];
    same &= out[kThreads + i] == in[warp + (lane + 3 > 31 ? lane : lane + 3)];
    same &= out[2 * kThreads + i] == in[warp + i * 7 % 32];
    same &= out[3 * kThreads + i] == in[warp + (lane ^ 9)];
  }
  return same;
}

__global__ void ballots_kernel(const float* in, float* out) {
  const unsigned votes = __ballot_sync(0xffffffffu, in[threadIdx.x] > 0.0f);
  out[threadIdx.x] = static_cast<float>(__popc(votes)) + (votes >> (threadIdx.x % 32) & 1 ? 100.0f : 0.0f);
}
bool ballots(const float* in, float* out) {
  DLKERN_LAUNCH(ballots_kernel, dim3(1), dim3(kThreads), 0, nullptr, in, out);
  bool same = true;
  for (int i = 0; i < kThreads; i++) {
    int votes = 0;
    for (int j = i / 32 * 32; j < i / 32 * 32 + 32; j++) votes += in[j] > 0.0f;
    same &= out[i] == static_cast<float>(votes + (in[i] > 0.0f ? 100 : 0));
  }
  return same;
}

__global__ void zeros_kernel(float* out) { out[threadIdx.x] = 0.0f; }
__global__ void atomics_kernel(const float* in, float* out) {
  atomicAdd(reinterpret_cast<int*>(out) + threadIdx.x % 3, static_cast<int>(in[blockIdx.x * kThreads + threadIdx.x]));
}
bool atomics(const float* in, float* out) {
  int expected[3] = {}, found[3];
  DLKERN_LAUNCH(zeros_kernel, dim3(1), dim3(kThreads), 0, nullptr, out);
  DLKERN_LAUNCH(atomics_kernel, dim3(4), dim3(kThreads), 0, nullptr, in, out);
  for (int i = 0; i < kSize; i++) expected[i % kThreads % 3] += static_cast<int>(in[i]);
  std::memcpy(found, out, sizeof found);
  return std::memcmp(expected, found, sizeof found) == 0;
}

__global__ void sums_kernel(const float* in, float* out) {
  DLKERN_SHARED(float, partial, [32]);
  out[blockIdx.x * kThreads + threadIdx.x] = block_sum<kThreads>(in[blockIdx.x * kThreads + threadIdx.x], partial);
}
bool block_sums(const float* in, float* out) {
  DLKERN_LAUNCH(sums_kernel, dim3(4), dim3(kThreads), 0, nullptr, in, out);
  bool same = true;
  for (int block = 0; block < 4; block++) {
    float sum = 0.0f;  // of small integers: exact in any order
    for (int i = 0; i < kThreads; i++) sum += in[block * kThreads + i];
    for (int i = 0; i < kThreads; i++) same &= out[block * kThreads + i] == sum;
  }
  return same;
}

// A persistent kernel: each step every thread takes half of its right neighbour's value, across blocks.
constexpr int kSteps = 10;
__global__ void persistent_kernel(const float* in, float* out) {
  const int self = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x), count = kSize / 2;
  out[self] = in[self];
  for (int step = 0; step < kSteps; step++) {
    grid_sync();
    const float* from = out + step % 2 * count;
    float* to = out + (step + 1) % 2 * count;
    to[self] = 0.5f * from[(self + 1) % count] + in[self];
  }
}
bool cooperative_grid(const float* in, float* out) {
  DLKERN_LAUNCH_COOPERATIVE(persistent_kernel, dim3(8), dim3(kSize / 16), 0, nullptr, in, out);
  constexpr int count = kSize / 2;
  std::vector<float> value(in, in + count), next(count);
  for (int step = 0; step < kSteps; step++) {
    for (int i = 0; i < count; i++) next[i] = 0.5f * value[(i + 1) % count] + in[i];
    value.swap(next);
  }
  return std::memcmp(value.data(), out, count * sizeof(float)) == 0;
}

const std::map<std::string, bool (*)(const float*, float*)>& exact_cases() {
  static const std::map<std::string, bool (*)(const float*, float*)> all = {{"shuffles", shuffles},
                                                                            {"ballots", ballots},
                                                                            {"atomics", atomics},
                                                                            {"block_sums", block_sums},
                                                                            {"cooperative_grid", cooperative_grid}};
  return all;
}

// Calls f(in, out) on tracked tensors of kSize elements; `in` holds small integers. A little more is allocated than
// announced, so that a planted access out of bounds harms nobody.
template <class F>
auto with_tensors(F&& f) {
  struct alignas(16) Block {
    float value[4];
  };
  std::vector<Block> in_blocks(kSize / 4 + 1), out_blocks(kSize / 4 + 1);
  float *in = in_blocks[0].value, *out = out_blocks[0].value;
  for (int i = 0; i < kSize + 4; i++) in[i] = static_cast<float>(i * 37 % 19 - 9);
  std::memset(out, 0xff, (kSize + 4) * sizeof(float));
  cuda_on_host::track_tensor(in, kSize * sizeof(float), false);
  cuda_on_host::track_tensor(out, kSize * sizeof(float), true);
  const auto result = f(in, out);
  cuda_on_host::forget_tensors();
  return result;
}

#define EXPORT extern "C" [[gnu::visibility("default")]]

// Runs a case, right or with its bug, and returns how many findings there are now; -1 for an unknown name.
EXPORT int64_t run_case(const char* name, int bug) {
  const auto found = cases().find(name);
  if (found == cases().end()) return -1;
  const Case& c = found->second[bug != 0];
  return with_tensors([&](const float* in, float* out) {
    launch(name, c.kernel, dim3(c.blocks), dim3(c.threads), c.shared, nullptr, c.cooperative, in, out);
    return cuda_on_host::findings();
  });
}

// Whether the result is exact; -1 for an unknown name.
EXPORT int run_exact(const char* name) {
  const auto found = exact_cases().find(name);
  if (found == exact_cases().end()) return -1;
  return with_tensors([&](const float* in, float* out) { return found->second(in, out) ? 1 : 0; });
}

// Names of all cases ("right or wrong" first, then after a blank line the exact ones), a line each.
EXPORT const char* case_names() {
  static std::string names;
  names.clear();
  for (const auto& entry : cases()) names += entry.first + "\n";
  names += "\n";
  for (const auto& entry : exact_cases()) names += entry.first + "\n";
  return names.c_str();
}

}  // namespace
