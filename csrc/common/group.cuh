// Eight elements as fp32 in registers, what a thread of an element-wise kernel takes at a time: one
// access of 16 bytes for 2-byte types, two for fp32.
#pragma once

#include "common/vec.cuh"

namespace speedrun {

constexpr int kGroup = 8;

// The first `count` elements from `at` on, zeros after them. kAligned promises that `at` is a
// multiple of 16 bytes and that there are kGroup of them.
template <bool kAligned, typename T>
HOST_DEVICE inline void load_group(const void* tensor, int64_t at, int64_t count,
                                   float (&values)[kGroup]) {
  constexpr int kSize = Vec<T>::kSize;
#pragma unroll
  for (int i = 0; i < kGroup; i += kSize) {
    const Vec<T> vec = load_vec<kAligned>(static_cast<const T*>(tensor) + at + i, count - i);
#pragma unroll
    for (int j = 0; j < kSize; ++j) values[i + j] = to_float(vec.get(j));
  }
}

// Stores the first `count` values, each rounded once; kAligned as above.
template <bool kAligned, typename T>
HOST_DEVICE inline void store_group(void* tensor, int64_t at, int64_t count,
                                    const float (&values)[kGroup]) {
  constexpr int kSize = Vec<T>::kSize;
#pragma unroll
  for (int i = 0; i < kGroup; i += kSize) {
    Vec<T> vec{};
#pragma unroll
    for (int j = 0; j < kSize; ++j) vec.fill(j, from_float<T>(values[i + j]));
    // An aligned address is counted in vectors, for row_start's reason.
    T* const start = static_cast<T*>(tensor);
    T* const target = kAligned ? row_start<true>(start, (at + i) / kSize, kSize) : start + at + i;
    store_vec<kAligned>(target, vec, count - i);
  }
}

}  // namespace speedrun
