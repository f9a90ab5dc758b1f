// 16 bytes of elements in registers, the unit in which a thread moves memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <bit>
#include <cstdint>
#include <type_traits>

#include "common/int_math.h"

namespace speedrun {

// Words, not an array of T: from arrays of bytes the compiler keeps one register a byte, and from a
// union it makes four stores of one.
template <typename T>
struct alignas(16) Vec {
  static constexpr int kSize = 16 / sizeof(T);
  static constexpr int kPerWord = 4 / sizeof(T);
  uint32_t words[4];

  HOST_DEVICE T get(int i) const {
    const uint32_t shifted = words[i / kPerWord] >> (i % kPerWord * 8 * sizeof(T));
    return std::bit_cast<T>(static_cast<Bits>(shifted));
  }
  // The element must be zero before.
  HOST_DEVICE void fill(int i, T element) {
    const uint32_t bits = std::bit_cast<Bits>(element);
    words[i / kPerWord] |= bits << (i % kPerWord * 8 * sizeof(T));
  }

 private:
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t,
                                  std::conditional_t<sizeof(T) == 2, uint16_t, uint8_t>>;
};

// One load, one store of 16 bytes; the address is a multiple of 16.
template <typename T>
HOST_DEVICE inline Vec<T> load16(const void* source) {
  const uint4 bits = *static_cast<const uint4*>(source);
  return {{bits.x, bits.y, bits.z, bits.w}};
}

template <typename T>
HOST_DEVICE inline void store16(void* target, const Vec<T>& vec) {
  *static_cast<uint4*>(target) = make_uint4(vec.words[0], vec.words[1], vec.words[2], vec.words[3]);
}

HOST_DEVICE inline float to_float(float x) { return x; }
HOST_DEVICE inline float to_float(__half x) { return __half2float(x); }
HOST_DEVICE inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounds to nearest even.
template <typename T>
HOST_DEVICE inline T from_float(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

// Whether each row starts at a multiple of 16 bytes and ends at one.
inline bool is_aligned(const void* pointer, int64_t length, int64_t row_stride,
                       int64_t batch_stride, int64_t element_bytes) {
  const int64_t bits = static_cast<int64_t>(reinterpret_cast<uintptr_t>(pointer)) |
                       (length * element_bytes) | (row_stride * element_bytes) |
                       (batch_stride * element_bytes);
  return bits % 16 == 0;
}

// Start of row `row`. Counting an aligned row's bytes in vectors lets the compiler see the
// alignment; otherwise it makes four 4-byte stores of one.
template <bool kAligned, typename T>
HOST_DEVICE inline T* row_start(T* matrix, int64_t row, int64_t row_stride) {
  if constexpr (kAligned) {
    return reinterpret_cast<T*>(reinterpret_cast<uint4*>(matrix) +
                                row * (row_stride / Vec<T>::kSize));
  } else {
    return matrix + row * row_stride;
  }
}

// The first `count` elements at `source`, zeros after them. kAligned promises that `source` is a
// multiple of 16 bytes and that `count` is <= 0 or >= Vec<T>::kSize, and makes it one instruction.
template <bool kAligned, typename T>
HOST_DEVICE inline Vec<T> load_vec(const T* source, int64_t count) {
  Vec<T> vec{};
  if constexpr (kAligned) {
    if (count > 0) vec = load16<T>(source);
  } else {
#pragma unroll
    for (int i = 0; i < Vec<T>::kSize; ++i) {
      if (i < count) vec.fill(i, source[i]);
    }
  }
  return vec;
}

// Stores the first `count` elements of `vec` at `target`; kAligned as above.
template <bool kAligned, typename T>
HOST_DEVICE inline void store_vec(T* target, const Vec<T>& vec, int64_t count) {
  if constexpr (kAligned) {
    if (count > 0) store16(target, vec);
  } else {
#pragma unroll
    for (int i = 0; i < Vec<T>::kSize; ++i) {
      if (i < count) target[i] = vec.get(i);
    }
  }
}

// Bytes of (b, a) picked by the four hexadecimal digits of `selector`; a holds bytes 0 to 3.
HOST_DEVICE inline uint32_t byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
#ifdef __CUDA_ARCH__
  return __byte_perm(a, b, selector);
#else  // for the host test
  const uint64_t bytes = (uint64_t{b} << 32) | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= ((bytes >> (8 * ((selector >> (4 * i)) & 7))) & 0xff) << (8 * i);
  }
  return result;
#endif
}

// Transposes the square of elements in 1, 2 or 4 words (1, 2 or 4 elements a word), in place.
HOST_DEVICE inline void transpose_words(uint32_t (&)[1]) {}

HOST_DEVICE inline void transpose_words(uint32_t (&w)[2]) {
  const uint32_t first = byte_perm(w[0], w[1], 0x5410);
  w[1] = byte_perm(w[0], w[1], 0x7632);
  w[0] = first;
}

HOST_DEVICE inline void transpose_words(uint32_t (&w)[4]) {
  const uint32_t top_low = byte_perm(w[0], w[1], 0x5140);
  const uint32_t top_high = byte_perm(w[0], w[1], 0x7362);
  const uint32_t bottom_low = byte_perm(w[2], w[3], 0x5140);
  const uint32_t bottom_high = byte_perm(w[2], w[3], 0x7362);
  w[0] = byte_perm(top_low, bottom_low, 0x5410);
  w[1] = byte_perm(top_low, bottom_low, 0x7632);
  w[2] = byte_perm(top_high, bottom_high, 0x5410);
  w[3] = byte_perm(top_high, bottom_high, 0x7632);
}

}  // namespace speedrun
