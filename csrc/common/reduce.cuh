// Reductions over a warp or a thread block. All threads must call them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace speedrun {

// Sum over groups of kLanes neighbouring lanes (a power of two), the same in each of them.
template <int kLanes>
__device__ inline float group_sum(float value) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(~0u, value, distance);
  }
  return value;
}

// Sum over the lanes that are a multiple of kStride (a power of two) apart, the same in each of
// them.
template <int kStride>
__device__ inline float strided_sum(float value) {
#pragma unroll
  for (int distance = 16; distance >= kStride; distance /= 2) {
    value += __shfl_xor_sync(~0u, value, distance);
  }
  return value;
}

// Sum over the block, the same in each thread; call it once a kernel. blockDim.x: a multiple of 32.
__device__ inline float block_sum(float value) {
  __shared__ float of_warp[32];
  value = group_sum<32>(value);
  const int lane = threadIdx.x % 32;
  if (lane == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  return group_sum<32>(lane < blockDim.x / 32 ? of_warp[lane] : 0);
}

// Greatest value of the block, valid in thread 0. blockDim.x: a multiple of 32.
__device__ inline uint32_t block_max(uint32_t value) {
  __shared__ uint32_t of_warp[32];
  value = __reduce_max_sync(~0u, value);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x >= 32) return 0;
  return __reduce_max_sync(~0u, threadIdx.x < blockDim.x / 32 ? of_warp[threadIdx.x] : 0);
}

}  // namespace speedrun
