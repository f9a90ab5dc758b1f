#include <climits>

#include "common/group.cuh"
#include "common/ieee.cuh"
#include "common/int_math.h"
#include "common/reduce.cuh"
#include "kernels/polar_express.h"

namespace speedrun {
namespace {

// ---- 1. Tile choice --------------------------------------------------------------------------

// Not yet measured on a GPU: the reasons here are arithmetic, for H100.
// A block takes a chunk in 4 rounds of groups of 8 elements; 10.4 million parameters, one of 8
// GPUs' share of the record, are 1,273 blocks for 132 multiprocessors.
constexpr int kThreads = 256;

// ---- 2. Device helpers -----------------------------------------------------------------------

// With one rounding of product and sum, as torch's lerp on either device.
HOST_DEVICE inline float lerp(float a, float b, float weight) {
  const float distance = add(b, -a);
  return fabsf(weight) < 0.5f ? fmaf(weight, distance, a) : fmaf(add(weight, -1.0f), distance, b);
}

// A block's part of a matrix.
struct Chunk {
  int64_t matrix, begin, end;  // elements counted over the whole bank

  HOST_DEVICE Chunk(int64_t block, int64_t numel, int64_t chunks)
      : matrix(block / chunks), begin(matrix * numel + block % chunks * kPolarChunk) {
    const int64_t last = (matrix + 1) * numel;
    end = begin + kPolarChunk < last ? begin + kPolarChunk : last;
  }
};

// G and M from `at` on.
template <typename G, bool kAligned>
HOST_DEVICE inline void load_both(const PolarPrologueParams& p, int64_t at, int64_t count,
                                  float (&g)[kGroup], float (&m)[kGroup]) {
  load_group<kAligned, G>(p.grad, at, count, g);
  load_group<kAligned, float>(p.momentum, at, count, m);
}

// A thread's share of a chunk's momentum; returns the sum of squares of its N.
template <typename G, bool kAligned>
HOST_DEVICE inline float update_momentum(const PolarPrologueParams& p, const Chunk& chunk,
                                         int thread) {
  const auto mu = static_cast<float>(*p.mu), weight = static_cast<float>(1.0 - mu);
  float sum = 0;
  for (int64_t at = chunk.begin + thread * kGroup; at < chunk.end; at += kThreads * kGroup) {
    float g[kGroup], m[kGroup];
    load_both<G, kAligned>(p, at, chunk.end - at, g, m);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      m[i] = lerp(m[i], g[i], weight);
      const float nesterov = lerp(g[i], m[i], mu);
      sum += nesterov * nesterov;  // 0 behind the end
    }
    store_group<kAligned, float>(p.momentum, at, chunk.end - at, m);
  }
  return sum;
}

// A thread's share of a chunk's X.
template <typename G, typename X, bool kAligned>
HOST_DEVICE inline void divide_by_norm(const PolarPrologueParams& p, const Chunk& chunk,
                                       float sum_of_squares, int thread) {
  const auto mu = static_cast<float>(*p.mu);
  const float divisor = add(multiply(square_root(sum_of_squares), p.norm_factor), p.eps);
  for (int64_t at = chunk.begin + thread * kGroup; at < chunk.end; at += kThreads * kGroup) {
    float g[kGroup], m[kGroup];
    load_both<G, kAligned>(p, at, chunk.end - at, g, m);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) g[i] = divide(lerp(g[i], m[i], mu), divisor);
    store_group<kAligned, X>(p.x, at, chunk.end - at, g);
  }
}

// Whether each matrix is whole groups at multiples of 16 bytes.
inline bool groups_are_aligned(const PolarPrologueParams& p) {
  return p.numel % kGroup == 0 && is_aligned(p.grad, 0, 0, 0, 1) &&
         is_aligned(p.momentum, 0, 0, 0, 1) && is_aligned(p.x, 0, 0, 0, 1);
}

// ---- 3. Kernel -------------------------------------------------------------------------------

template <typename G, bool kAligned>
__global__ void __launch_bounds__(kThreads) momentum_kernel(PolarPrologueParams p, int64_t chunks) {
  const Chunk chunk(blockIdx.x, p.numel, chunks);
  const float sum = block_sum(update_momentum<G, kAligned>(p, chunk, threadIdx.x));
  if (threadIdx.x == 0) p.sums[blockIdx.x] = sum;
}

template <typename G, typename X, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    normalize_kernel(PolarPrologueParams p, int64_t chunks) {
  const Chunk chunk(blockIdx.x, p.numel, chunks);
  float sum = 0;
  for (int64_t i = threadIdx.x; i < chunks; i += kThreads) sum += p.sums[chunk.matrix * chunks + i];
  divide_by_norm<G, X, kAligned>(p, chunk, block_sum(sum), threadIdx.x);
}

// ---- 4. Launcher -----------------------------------------------------------------------------

using Kernel = void (*)(PolarPrologueParams, int64_t);

template <typename G>
Kernel momentum_kernel_for(bool aligned) {
  return aligned ? momentum_kernel<G, true> : momentum_kernel<G, false>;
}

template <typename G>
Kernel normalize_kernel_for(DType x_dtype, bool aligned) {
  if (x_dtype == DType::kFloat16) {
    return aligned ? normalize_kernel<G, __half, true> : normalize_kernel<G, __half, false>;
  }
  return aligned ? normalize_kernel<G, __nv_bfloat16, true>
                 : normalize_kernel<G, __nv_bfloat16, false>;
}

cudaError_t launch(const PolarPrologueParams& p, Kernel kernel, cudaStream_t stream) {
  if (p.batch < 0 || p.numel < 0) return cudaErrorInvalidValue;
  if (p.batch == 0 || p.numel == 0) return cudaSuccess;
  const int64_t chunks = ceil_div(p.numel, kPolarChunk);
  if (chunks > INT_MAX / p.batch) return cudaErrorInvalidValue;
  kernel<<<static_cast<unsigned>(p.batch * chunks), kThreads, 0, stream>>>(p, chunks);
  return cudaGetLastError();
}

bool is_gradient_type(DType dtype) { return dtype == DType::kFloat32 || dtype == DType::kBFloat16; }

}  // namespace

cudaError_t launch_polar_express_momentum(const PolarPrologueParams& params, cudaStream_t stream) {
  if (!is_gradient_type(params.grad_dtype)) return cudaErrorInvalidValue;
  const bool aligned = groups_are_aligned(params);
  const Kernel kernel = params.grad_dtype == DType::kFloat32
                            ? momentum_kernel_for<float>(aligned)
                            : momentum_kernel_for<__nv_bfloat16>(aligned);
  return launch(params, kernel, stream);
}

cudaError_t launch_polar_express_normalize(const PolarPrologueParams& params, cudaStream_t stream) {
  if (!is_gradient_type(params.grad_dtype)) return cudaErrorInvalidValue;
  if (params.x_dtype != DType::kFloat16 && params.x_dtype != DType::kBFloat16) {
    return cudaErrorInvalidValue;
  }
  const bool aligned = groups_are_aligned(params);
  const Kernel kernel = params.grad_dtype == DType::kFloat32
                            ? normalize_kernel_for<float>(params.x_dtype, aligned)
                            : normalize_kernel_for<__nv_bfloat16>(params.x_dtype, aligned);
  return launch(params, kernel, stream);
}

}  // namespace speedrun
