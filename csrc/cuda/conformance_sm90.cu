// Instruction conformance of hopper.cuh, as conformance.cu is of ptx.cuh: tensor copies and wgmma on inputs whose results
// are exact, what lies in shared memory or comes out printed word by word.
//   host: build/cuda_on_host/conformance_sm90      device: nvcc -std=c++20 -gencode arch=compute_90a,code=sm_90a ...
#include <cstdio>
#include <cstring>
#include <vector>

#include "hopper.cuh"

using namespace dlkern::cuda;

namespace {

constexpr int kWords = 4096;  // of the result of each case
constexpr int kTile = 64 * 64;  // elements of a tile, 64 rows of 128 bytes
constexpr int kImage[4] = {72, 7, 5, 3};  // c, w, h, n
constexpr int kRows = 100, kColumns = 136;

struct Coordinates {
  int at[4], offset[2];
};

enum class Copy { two, four, im2col };

// One copy of 64 rows, and what it left in shared memory.
template <Copy KIND>
__global__ void __launch_bounds__(128, 1)
    copy_case(const __grid_constant__ TensorMap map, const __grid_constant__ Coordinates c, uint32_t* out) {
#ifdef DLKERN_HOPPER
  DLKERN_DYNAMIC_SHARED(shared);
  DLKERN_SHARED(uint64_t, barrier, [1]);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_init_fence();
    mbarrier_arrive_expect(barrier, 2 * kTile);
    if (KIND == Copy::four)
      tensor_copy_4d(shared, map, barrier, c.at[0], c.at[1], c.at[2], c.at[3]);
    else if (KIND == Copy::im2col)
      tensor_copy_im2col(shared, map, barrier, c.at[0], c.at[1], c.at[2], c.at[3], c.offset[0], c.offset[1]);
    else
      tensor_copy_2d(shared, map, barrier, c.at[0], c.at[1]);
  }
  __syncthreads();
  mbarrier_wait(barrier, 0);
  for (int i = static_cast<int>(threadIdx.x); i < kTile / 2; i += 128)
    out[i] = reinterpret_cast<const uint32_t*>(shared)[i];
#endif
}

// Two products of small integers: k 0..15 and 48..63 of two tiles that one thread copies, k last or k first.
template <class T, bool A_FIRST, bool B_FIRST>
__global__ void __launch_bounds__(128, 1) product_case(const __grid_constant__ TensorMap map, uint32_t* out) {
#ifdef DLKERN_HOPPER
  DLKERN_DYNAMIC_SHARED(shared);
  DLKERN_SHARED(uint64_t, barrier, [1]);
  T* const a = reinterpret_cast<T*>(shared);
  T* const b = a + kTile;
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_init_fence();
    mbarrier_arrive_expect(barrier, 4 * kTile);
    tensor_copy_2d(a, map, barrier, 0, 0);
    tensor_copy_2d(b, map, barrier, 64, 32);
  }
  __syncthreads();
  mbarrier_wait(barrier, 0);
  float c[32];
  wgmma_fence(c);
  for (int k = 0; k < 64; k += 48) {
    wgmma<T, A_FIRST, B_FIRST>(c, matrix_descriptor(a + k * (A_FIRST ? 64 : 1), 16),
                               matrix_descriptor(b + k * (B_FIRST ? 64 : 1), 16), k > 0);
  }
  wgmma_commit();
  wgmma_wait_all(c);
#pragma unroll
  for (int i = 0; i < 32; i++) memcpy(out + 32 * threadIdx.x + i, &c[i], 4);
#endif
}

// The same k of B, with A in registers: element (i, k) of its 32 columns is (5 i + 3 k) % 29 - 14.
template <class T, bool B_FIRST>
__global__ void __launch_bounds__(128, 1) registers_case(const __grid_constant__ TensorMap map, uint32_t* out) {
#ifdef DLKERN_HOPPER
  DLKERN_DYNAMIC_SHARED(shared);
  DLKERN_SHARED(uint64_t, barrier, [1]);
  const T* const b = reinterpret_cast<const T*>(shared);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_init_fence();
    mbarrier_arrive_expect(barrier, 2 * kTile);
    tensor_copy_2d(shared, map, barrier, 64, 32);
  }
  __syncthreads();
  mbarrier_wait(barrier, 0);
  float c[32];
  uint32_t a[2][4];
#pragma unroll
  for (int r = 0; r < 8; r++) {
    const int i = thread / 32 * 16 + thread % 32 / 4 + r % 2 * 8, k = r / 4 * 16 + thread % 4 * 2 + r % 4 / 2 * 8;
    const auto element = [&](int column) { return static_cast<float>((5 * i + 3 * column) % 29 - 14); };
    a[r / 4][r % 4] = pack_pair<T>(element(k), element(k + 1));
  }
  wgmma_fence(c, a);
#pragma unroll
  for (int step = 0; step < 2; step++)
    wgmma_registers<T, B_FIRST>(c, a[step], matrix_descriptor(b + 48 * step * (B_FIRST ? 64 : 1), 16), step > 0);
  wgmma_commit();
  wgmma_wait_all(c);
#pragma unroll
  for (int i = 0; i < 32; i++) memcpy(out + 32 * thread + i, &c[i], 4);
#endif
}

// Roundings, and powers that are exact.
__global__ void __launch_bounds__(128, 1) numbers_case(uint32_t* out) {
  const int thread = static_cast<int>(threadIdx.x);
  const float x = static_cast<float>(thread * 40503 % 65521) / 77.0f;
  out[2 * thread] = pack_pair<bf16>(x, -1.0f / (x + 1.0f));
  out[256 + thread] = pack_pair<fp16>(x * 100.0f, -1e-4f / (x + 1.0f));
  const float power = exp2_fast(thread == 127 ? -INFINITY : static_cast<float>(thread - 100) * 2.0f);
  memcpy(out + 2 * thread + 1, &power, 4);
}

// Two warps hand numbers to two others and get them back changed, twice.
__global__ void __launch_bounds__(128, 1) barriers_case(uint32_t* out) {
  DLKERN_SHARED(uint32_t, numbers, [64]);
  const int thread = static_cast<int>(threadIdx.x), place = thread % 64;
  const bool first = thread < 64;
  for (int round = 0; round < 2; round++) {
    if (first) {
      numbers[place] = static_cast<uint32_t>(1000 * round + place);
      barrier_arrive<128>(1);
      barrier_sync<128>(2);
      out[64 * round + place] = numbers[63 - place];
    } else {
      barrier_sync<128>(1);
      numbers[place] = numbers[place] * 3;
      barrier_arrive<128>(2);
    }
    __syncthreads();
  }
}

// Elements that a kernel sees, and their copy on the host.
struct Memory {
  std::vector<uint4> blocks;
  uint32_t* const host;
  uint32_t* device;

  explicit Memory(int words) : blocks(static_cast<size_t>(words) / 4), host(&blocks[0].x), device(host) {
#ifdef __CUDACC__
    throw_on_error(cudaMalloc(&device, bytes()), "cudaMalloc");
#endif
  }
  size_t bytes() const { return blocks.size() * 16; }
  void to_device() {
#ifdef __CUDACC__
    throw_on_error(cudaMemcpy(device, host, bytes(), cudaMemcpyHostToDevice), "copy");
#endif
  }
  void to_host() {
#ifdef __CUDACC__
    throw_on_error(cudaMemcpy(host, device, bytes(), cudaMemcpyDeviceToHost), "copy");
#endif
  }
};

template <class... Parameters, class... Arguments>
void run(const char* name, void (*kernel)(Parameters...), int words, const Arguments&... arguments) {
  Memory out(kWords);
  out.to_device();
  launch(name, kernel, dim3(1), dim3(128), 4 * kTile, nullptr, false, arguments..., out.device);
  out.to_host();
  for (int i = 0; i < words; i += 4) {
    std::printf("%s %d: %08x %08x %08x %08x\n", name, i, out.host[i], out.host[i + 1], out.host[i + 2],
                out.host[i + 3]);
  }
}

void need(bool made) {
  if (!made) throw std::runtime_error("no tensor map");
}

// A matrix whose element i is i % 29 - 14.
template <class Rounding>
Memory matrix(Rounding rounded) {
  Memory in(kRows * kColumns / 2);
  for (int i = 0; i < kRows * kColumns; i++) {
    const auto value = rounded(static_cast<float>(i % 29 - 14));
    std::memcpy(reinterpret_cast<char*>(in.host) + 2 * i, &value, 2);
  }
  in.to_device();
  return in;
}

template <class T>
void products(const TensorMap& map) {
  run("product", product_case<T, false, false>, kWords, map);
  run("product", product_case<T, false, true>, kWords, map);
  run("product", product_case<T, true, false>, kWords, map);
  run("product", product_case<T, true, true>, kWords, map);
  run("registers", registers_case<T, false>, kWords, map);
  run("registers", registers_case<T, true>, kWords, map);
}

}  // namespace

int main() {
  const Memory in = matrix([](float value) { return __float2bfloat16(value); });
  const Memory in_half = matrix([](float value) { return __float2half(value); });
  TensorMap map, half_map;
  need(make_tiled_map(map, in.device, 2, {kColumns, kRows, 1}, {kColumns, 0}, 64));
  need(make_tiled_map(half_map, in_half.device, 2, {kColumns, kRows, 1}, {kColumns, 0}, 64));
  run("copy", copy_case<Copy::two>, kTile / 2, map, Coordinates{{8, 3}, {}});
  run("copy", copy_case<Copy::two>, kTile / 2, map, Coordinates{{96, 60}, {}});
  run("copy", copy_case<Copy::two>, kTile / 2, map, Coordinates{{-8, -5}, {}});
  products<bf16>(map);
  products<fp16>(half_map);
  run("numbers", numbers_case, 384);
  run("barriers", barriers_case, 128);

  // [2, 30, 3, 40] seen as [2, 3, 30, 40].
  need(make_tiled_map(map, in.device, 4, {40, 30, 3, 2}, {120, 40, 3600}, 64));
  run("copy4", copy_case<Copy::four>, kTile / 2, map, Coordinates{{8, 5, 1, 1}, {}});
  run("copy4", copy_case<Copy::four>, kTile / 2, map, Coordinates{{0, -3, 2, 0}, {}});

  // A filter of 3 x 2, padding 1 and 2, dilation 1 and 3; steps of 2 and 1.
  const int64_t size[4] = {kImage[0], kImage[1], kImage[2], kImage[3]};
  const int64_t stride[3] = {kImage[0], kImage[0] * kImage[1], int64_t{kImage[0]} * kImage[1] * kImage[2]};
  need(make_im2col_map(map, in.device, size, stride, {-1, -2}, {-1, -1}, {2, 1}, 64));
  run("im2col", copy_case<Copy::im2col>, kTile / 2, map, Coordinates{{0, -1, -2, 0}, {0, 0}});
  run("im2col", copy_case<Copy::im2col>, kTile / 2, map, Coordinates{{64, 1, 0, 1}, {2, 3}});
  return 0;
}
