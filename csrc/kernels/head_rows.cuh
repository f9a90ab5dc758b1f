// What qk_norm_rope and attention_epilogue share: half a warp has a row, one head of one token, and
// a lane 8 numbers of it.
#pragma once

#include <climits>

#include "common/dtype.h"
#include "common/group.cuh"
#include "common/int_math.h"

namespace speedrun::head_rows {

// Not yet measured on a GPU: the reasons here are arithmetic, for H100.
// A lane has 16 bytes of bf16 of each tensor in flight: with 2 tensors 64 KB a multiprocessor of
// 2,048 threads, of which 10 KB hide the latency.
constexpr int kLanes = 16;
constexpr int kThreads = 256, kRows = kThreads / kLanes;
constexpr int kMaxWidth = kLanes * kGroup;  // of a row

HOST_DEVICE inline float dot(const float (&a)[kGroup], const float (&b)[kGroup]) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) sum += a[i] * b[i];
  return sum;
}

HOST_DEVICE inline void scale_by(float (&x)[kGroup], float factor) {
#pragma unroll
  for (float& value : x) value *= factor;
}

constexpr bool is_width(int64_t width, int64_t multiple) {
  return width > 0 && width <= kMaxWidth && width % multiple == 0;
}

// Whether all are multiples of 16 bytes, or null.
template <typename... Pointers>
bool all_aligned(Pointers... pointers) {
  return (is_aligned(pointers, 0, 0, 0, 1) && ...);
}

// Calls start.operator()<T, kAligned>(blocks), which launches a kernel of kThreads threads for
// in.tokens * in.heads rows of in.dtype.
template <typename Inputs, typename Start>
cudaError_t launch_rows(const Inputs& in, bool is_valid, bool aligned, const Start& start) {
  if (in.tokens == 0) return cudaSuccess;
  if (!is_valid || in.tokens < 0 || in.heads <= 0 || in.tokens > (INT_MAX - kRows) / in.heads) {
    return cudaErrorInvalidValue;
  }
  const auto blocks = static_cast<unsigned>(ceil_div(in.tokens * in.heads, kRows));
  const auto launch = [&]<typename T>() {
    aligned ? start.template operator()<T, true>(blocks)
            : start.template operator()<T, false>(blocks);
    return cudaGetLastError();
  };
  switch (in.dtype) {
    case DType::kFloat16:
      return launch.template operator()<__half>();
    case DType::kBFloat16:
      return launch.template operator()<__nv_bfloat16>();
    case DType::kFloat32:
      return launch.template operator()<float>();
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace speedrun::head_rows
