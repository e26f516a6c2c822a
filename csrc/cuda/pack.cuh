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

}  // namespace dlkern::cuda
