// Pack<T, N>: N neighbouring elements, loaded and stored in one access (16 bytes where N * sizeof(T) is).
#pragma once
#include "platform.cuh"

namespace dlkern::cuda {

template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T at[N];
};

template <class T, int N>
DLKERN_DEVICE Pack<T, N> load_pack(const T* address) {
  return *reinterpret_cast<const Pack<T, N>*>(address);
}
template <class T, int N>
DLKERN_DEVICE void store_pack(T* address, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(address) = pack;
}

// VEC elements at `address` as floats, in accesses of 16 bytes at most, which is what addresses are aligned to.
template <int VEC, class T>
DLKERN_DEVICE void load_floats(float* out, const T* address) {
  constexpr int kStep = VEC < 16 / static_cast<int>(sizeof(T)) ? VEC : 16 / static_cast<int>(sizeof(T));
#pragma unroll
  for (int start = 0; start < VEC; start += kStep) {
    const auto pack = load_pack<T, kStep>(address + start);
#pragma unroll
    for (int v = 0; v < kStep; v++) out[start + v] = to_float(pack.at[v]);
  }
}
// The same stored; VEC * sizeof(T) is 16 at most.
template <int VEC, class T>
DLKERN_DEVICE void store_floats(T* address, const float* values) {
  Pack<T, VEC> pack;
#pragma unroll
  for (int v = 0; v < VEC; v++) pack.at[v] = from_float<T>(values[v]);
  store_pack(address, pack);
}

}  // namespace dlkern::cuda
