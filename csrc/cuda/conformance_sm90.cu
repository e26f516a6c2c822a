// Instruction conformance of hopper.cuh, as conformance.cu is of ptx.cuh: tensor copies and wgmma on inputs whose results
// are exact, what lies in shared memory or comes out printed word by word. And wgmma_tile.cuh as a whole: its ring goes
// round, registers are handed over, and wgmma's larger sizes read several panels.
//   host: build/cuda_on_host/conformance_sm90      device: nvcc -std=c++20 -gencode arch=compute_90a,code=sm_90a ...
#include <cstdio>
#include <cstring>
#include <vector>

#include "wgmma_tile.cuh"

using namespace dlkern::cuda;

namespace {

constexpr int kWords = 4096;  // of the result of most cases
constexpr int kTile = 64 * 64;  // elements of a tile, 64 rows of 128 bytes
constexpr int kImage[4] = {72, 7, 5, 3};  // c, w, h, n
constexpr int kRows = 100, kColumns = 136;
constexpr int kSteps = 9, kDepth = 64 * kSteps, kOuter = 256;  // of tiles, more steps than any ring has stages

struct Coordinates {
  int at[4], offset[2];
};

enum class Copy { two, three, four, im2col };

// One copy of ROWS rows, and what it left in shared memory.
template <Copy KIND, int ROWS = 64>
__global__ void __launch_bounds__(128, 1)
    copy_case(const __grid_constant__ TensorMap map, const __grid_constant__ Coordinates c, uint32_t* out) {
#ifdef DLKERN_HOPPER
  DLKERN_DYNAMIC_SHARED(shared);
  DLKERN_SHARED(uint64_t, barrier, [1]);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_init_fence();
    mbarrier_arrive_expect(barrier, 128 * ROWS);
    if (KIND == Copy::three)
      tensor_copy_3d(shared, map, barrier, c.at[0], c.at[1], c.at[2]);
    else if (KIND == Copy::four)
      tensor_copy_4d(shared, map, barrier, c.at[0], c.at[1], c.at[2], c.at[3]);
    else if (KIND == Copy::im2col)
      tensor_copy_im2col(shared, map, barrier, c.at[0], c.at[1], c.at[2], c.at[3], c.offset[0], c.offset[1]);
    else
      tensor_copy_2d(shared, map, barrier, c.at[0], c.at[1]);
  }
  __syncthreads();
  mbarrier_wait(barrier, 0);
  for (int i = static_cast<int>(threadIdx.x); i < 32 * ROWS; i += 128)
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

// The same k of B, 2 N columns of it, with A in registers: element (i, k) of its 32 columns is (5 i + 3 k) % 29 - 14.
template <class T, bool B_FIRST, int N>
__global__ void __launch_bounds__(128, 1) registers_case(const __grid_constant__ TensorMap map, uint32_t* out) {
#ifdef DLKERN_HOPPER
  DLKERN_DYNAMIC_SHARED(shared);
  DLKERN_SHARED(uint64_t, barrier, [1]);
  const T* const b = reinterpret_cast<const T*>(shared);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_init_fence();
    mbarrier_arrive_expect(barrier, N / 32 * 2 * kTile);
    for (int panel = 0; panel < N / 32; panel++)
      tensor_copy_2d(shared + 2 * kTile * panel, map, barrier, 64 + (B_FIRST ? 64 * panel : 0),
                     32 + (B_FIRST ? 0 : 64 * panel));
  }
  __syncthreads();
  mbarrier_wait(barrier, 0);
  float c[N];
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
    wgmma_registers<T, B_FIRST>(c, a[step], matrix_descriptor(b + 48 * step * (B_FIRST ? 64 : 1), 2 * kTile), step > 0);
  wgmma_commit();
  wgmma_wait_all(c);
#pragma unroll
  for (int i = 0; i < N; i++) memcpy(out + N * thread + i, &c[i], 4);
#endif
}

// One block's tile of a product of kDepth, by everything in wgmma_tile.cuh.
template <class T, class SHAPE, bool A_FIRST, bool B_FIRST>
__global__ void __launch_bounds__(SHAPE::kThreads, 1)
    tile_case(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, uint32_t* out) {
#ifdef DLKERN_HOPPER
  DLKERN_DYNAMIC_SHARED(shared);
  const auto copy = [](T* tile, const TensorMap& map, uint64_t* barrier, bool k_first, int copies, int k) {
    for (int panel = 0; panel < copies; panel++)
      tensor_copy_2d(tile + kTile * panel, map, barrier, k_first ? 64 * panel : k, k_first ? k : 0);
  };
  wgmma_tile<SHAPE, A_FIRST, B_FIRST>(
      reinterpret_cast<T*>(shared), kSteps,
      [&](T* a_tile, T* b_tile, uint64_t* barrier, int step) {
        copy(a_tile, a, barrier, A_FIRST, WgmmaTile<A_FIRST, SHAPE::kBlockM>::kCopies, 64 * step);
        copy(b_tile, b, barrier, B_FIRST, WgmmaTile<B_FIRST, SHAPE::kBlockN>::kCopies, 64 * step);
      },
      [](const T*) {},
      [&](const WgmmaSum<SHAPE>& sum) {
        sum.for_each_pair([&](int r, int c, float first, float second) {
          memcpy(out + r * SHAPE::kBlockN + c, &first, 4);
          memcpy(out + r * SHAPE::kBlockN + c + 1, &second, 4);
        });
      });
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
void run_block(const char* name, void (*kernel)(Parameters...), int threads, size_t shared_bytes, int words,
               const Arguments&... arguments) {
  Memory out(words);
  out.to_device();
  launch(name, kernel, dim3(1), dim3(static_cast<unsigned>(threads)), shared_bytes, nullptr, false, arguments...,
         out.device);
  out.to_host();
  for (int i = 0; i < words; i += 4) {
    std::printf("%s %d: %08x %08x %08x %08x\n", name, i, out.host[i], out.host[i + 1], out.host[i + 2],
                out.host[i + 3]);
  }
}

template <class... Parameters, class... Arguments>
void run(const char* name, void (*kernel)(Parameters...), int words, const Arguments&... arguments) {
  run_block(name, kernel, 128, 4 * kTile, words, arguments...);
}

void need(bool made) {
  if (!made) throw std::runtime_error("no tensor map");
}

// Elements of which the i-th is i % 29 - 14.
template <class Rounding>
Memory elements(int count, Rounding rounded) {
  Memory in(count / 2);
  for (int i = 0; i < count; i++) {
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
  run("registers", registers_case<T, false, 32>, kWords, map);
  run("registers", registers_case<T, true, 32>, kWords, map);
}

// The map of a matrix of `outer` rows of kDepth, or of kDepth rows of `outer`.
template <bool FIRST, int OUTER>
TensorMap operand(const Memory& in) {
  TensorMap map;
  const int64_t size[3] = {FIRST ? OUTER : kDepth, FIRST ? kDepth : OUTER, 1}, stride[2] = {size[0], 0};
  need(make_tiled_map(map, in.device, 2, size, stride, WgmmaTile<FIRST, OUTER>::kMapRows));
  return map;
}

template <class T, int BLOCK_N, int STAGES, bool A_FIRST, bool B_FIRST>
void tile(const Memory& in) {
  using Shape = WgmmaShape<BLOCK_N, STAGES>;
  run_block("tile", tile_case<T, Shape, A_FIRST, B_FIRST>, Shape::kThreads, Shape::kSharedBytes, 128 * BLOCK_N,
            operand<A_FIRST, Shape::kBlockM>(in), operand<B_FIRST, BLOCK_N>(in));
}

}  // namespace

int main() {
  const auto to_bf16 = [](float value) { return __float2bfloat16(value); };
  const auto to_half = [](float value) { return __float2half(value); };
  const Memory in = elements(kRows * kColumns, to_bf16), in_half = elements(kRows * kColumns, to_half);
  const Memory large = elements(kOuter * kDepth, to_bf16), large_half = elements(kOuter * kDepth, to_half);
  TensorMap map, half_map;
  need(make_tiled_map(map, in.device, 2, {kColumns, kRows, 1}, {kColumns, 0}, 64));
  need(make_tiled_map(half_map, in_half.device, 2, {kColumns, kRows, 1}, {kColumns, 0}, 64));
  run("copy", copy_case<Copy::two>, kTile / 2, map, Coordinates{{8, 3}, {}});
  run("copy", copy_case<Copy::two>, kTile / 2, map, Coordinates{{96, 60}, {}});
  run("copy", copy_case<Copy::two>, kTile / 2, map, Coordinates{{-8, -5}, {}});
  products<bf16>(map);
  products<fp16>(half_map);
  need(make_tiled_map(map, large.device, 2, {kDepth, kOuter, 1}, {kDepth, 0}, 64));
  run("registers128", registers_case<bf16, false, 64>, 2 * kWords, map);
  run("registers128", registers_case<bf16, true, 64>, 2 * kWords, map);
  tile<bf16, 256, 4, true, true>(large);
  tile<fp16, 128, 4, false, true>(large_half);
  tile<bf16, 64, 6, true, false>(large);
  run("numbers", numbers_case, 384);
  run("barriers", barriers_case, 128);

  // [2, 30, 3, 40] seen as [2, 3, 30, 40].
  need(make_tiled_map(map, in.device, 4, {40, 30, 3, 2}, {120, 40, 3600}, 64));
  run("copy4", copy_case<Copy::four>, kTile / 2, map, Coordinates{{8, 5, 1, 1}, {}});
  run("copy4", copy_case<Copy::four>, kTile / 2, map, Coordinates{{0, -3, 2, 0}, {}});

  // [4, 70, 40].
  need(make_tiled_map(map, in.device, 3, {40, 70, 4}, {40, 2800}, 64));
  run("copy3", copy_case<Copy::three>, kTile / 2, map, Coordinates{{8, 5, 2}, {}});
  run("copy3", copy_case<Copy::three>, kTile / 2, map, Coordinates{{0, -3, 3}, {}});

  // A filter of 3 x 2, padding 1 and 2, dilation 1 and 3; steps of 2 and 1.
  const int64_t size[4] = {kImage[0], kImage[1], kImage[2], kImage[3]};
  const int64_t stride[3] = {kImage[0], kImage[0] * kImage[1], int64_t{kImage[0]} * kImage[1] * kImage[2]};
  need(make_im2col_map(map, in.device, size, stride, {-1, -2}, {-1, -1}, {2, 1}, 64));
  run("im2col", copy_case<Copy::im2col>, kTile / 2, map, Coordinates{{0, -1, -2, 0}, {0, 0}});
  run("im2col", copy_case<Copy::im2col>, kTile / 2, map, Coordinates{{64, 1, 0, 1}, {2, 3}});
  need(make_im2col_map(map, in.device, size, stride, {-1, -2}, {-1, -1}, {2, 1}, 128));
  run("im2col128", copy_case<Copy::im2col, 128>, kTile, map, Coordinates{{8, 3, -1, 0}, {0, 3}});
  return 0;
}
