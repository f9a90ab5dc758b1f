// Why it is built like this, by bytes of device memory for a logit and special functions (MUFU):
//
//   a block a row, g = e * s * (1 - s) kept in shared memory, then a transpose: 2r 1w + 1r 1w = 5
//   two sweeps over the logits by tiles that write both layouts:                2r + 2r 1w 1w = 6
//   a cluster has 16 whole rows in its shared memory:                               2r 1w 1w = 4
//
// The last, for both layouts: on H100 4 bytes are 2.95 ms for 49,152 x 50,304. Three MUFU (two of
// the sigmoid; tanh.approx is one, but its error of 2^-11 moves a logit by 0.006) are 2.0 ms beside
// it, and would be six if g were not kept. bf16 halves g's room, and its 2^-9 is small beside
// e5m2's 2^-3. No maximum is needed: logits lie between 0 and a.
#include <cooperative_groups.h>

#include "common/reduce.cuh"
#include "kernels/softcap_ce.cuh"
#include "kernels/transpose.h"

namespace speedrun {
namespace {

using namespace cross_entropy;

// ---- 1. Tile choice --------------------------------------------------------------------------
// Threads and loads in flight: softcap_ce.cuh. Not yet measured on a GPU.

constexpr int kWarps = kThreads / 32;
constexpr int kGroupRows = 16;   // of a cluster: 16 bytes of each column of the transposed layout
constexpr int kClusterSize = 8;  // the most that every GPU takes; 16 x 6,288 g are 201 KB a block

// ---- 2. Device helpers -----------------------------------------------------------------------

// Sum of a row's powers from those of its warps, kWarpsPerRow in each of the cluster's blocks.
template <bool kCluster, int kWarpsPerRow>
__device__ inline float row_sum(float* of_warp, int row) {
  float sum = 0;
#if __CUDA_ARCH__ >= 900
  if constexpr (kCluster) {
    const auto cluster = cooperative_groups::this_cluster();
    cluster.sync();
    for (int block = 0; block < kClusterSize; ++block) {
      sum += cluster.map_shared_rank(of_warp, block)[row];
    }
    return sum;
  }
#endif
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kWarpsPerRow; ++i) sum += of_warp[row * kWarpsPerRow + i];
  return sum;
}

// ---- 3. Kernel -------------------------------------------------------------------------------

// kRows rows a cluster (16) or a block (1), a strip of `width` columns a block. kKept: the factors
// are in shared memory; else, for long rows, they are computed again.
template <bool kRounded, int kRows, bool kKept>
__global__ void __launch_bounds__(kThreads, kRows == 1 ? 2 : 1)
    softcap_ce_kernel(SoftcapCeParams p, Softcap softcap, int64_t width) {
  constexpr bool kCluster = kRows > 1;
  constexpr int kLanes = kThreads / kRows;
  extern __shared__ uint4 shared[];
  __shared__ float of_warp[kWarps], of_row[kRows];
  const int blocks = kCluster ? kClusterSize : 1, rank = blockIdx.x % blocks;
  const int64_t first_row = int64_t{blockIdx.x / blocks} * kRows;
  const Strip strip(rank * width, width, p.cols);
  const int own = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, pitch = width / 8;
  const int64_t row = first_row + own, offset = row * p.cols + strip.start;
  const bf16* z = static_cast<const bf16*>(p.z) + offset;
  Vec<bf16>* kept = reinterpret_cast<Vec<bf16>*>(shared) + own * pitch;

  const float part = group_sum<32>(
      sum_powers<kRounded, kLanes>(softcap, z, strip.cols, lane, kKept ? kept : nullptr));
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = part;
  const float sum = row_sum<kCluster, kWarps / kRows>(of_warp, own);
  if (lane == 0) {
    of_row[own] = sum;
    if (rank == 0) store_loss<kRounded>(softcap, p, row, sum);
  }

  const float times = Targets{p, row}.total() * (softcap.a / softcap.c) / (sum * *p.scale);
  cast_factors<kRounded, kLanes, kKept, kCluster>(softcap, z, strip.cols, lane, times, kept,
                                                  p.dz + offset);
  __syncthreads();
  if constexpr (kCluster) {
    store_columns(reinterpret_cast<Vec<bf16>*>(shared), pitch, strip.cols,
                  p.dz_t + strip.start * p.rows + first_row, p.rows, threadIdx.x);
    __syncthreads();
  }
  const int64_t count = Targets{p, row}.count();
  for (int64_t i = threadIdx.x; i < kRows * count; i += kThreads) {
    const int of = static_cast<int>(i / count);
    store_target<kRounded>(softcap, p, first_row + of, i % count, strip, of_row[of], kCluster);
  }
#if __CUDA_ARCH__ >= 900
  if constexpr (kCluster) cooperative_groups::this_cluster().sync();  // others have read of_warp
#endif
}

// ---- 4. Launcher -----------------------------------------------------------------------------

// Columns of a block of a cluster.
int64_t strip_width(int64_t cols) { return ceil_div(cols / 16, kClusterSize) * 16; }

// Whether `kernel` can have so much dynamic shared memory; if it can, it may from now on.
template <typename Kernel>
cudaError_t allow_shared(Kernel* kernel, int64_t bytes, const cudaFuncAttributes& attributes,
                         bool* allowed) {
  int device = 0, limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  *allowed = bytes + static_cast<int64_t>(attributes.sharedSizeBytes) <= limit;
  if (error != cudaSuccess || !*allowed) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(bytes));
}

template <bool kRounded>
cudaError_t launch_clusters(const SoftcapCeParams& p, cudaStream_t stream, bool* launched) {
  const auto kernel = softcap_ce_kernel<kRounded, kGroupRows, true>;
  const int64_t width = strip_width(p.cols), bytes = kGroupRows * width * int64_t{sizeof(bf16)};
  cudaFuncAttributes attributes{};
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess || attributes.ptxVersion < 90) return error;  // no clusters in that code
  error = allow_shared(kernel, bytes, attributes, launched);
  if (error != cudaSuccess || !*launched) return error;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kClusterSize, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = {static_cast<unsigned>(p.rows / kGroupRows * kClusterSize), 1, 1};
  config.blockDim = {kThreads, 1, 1};
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, p, Softcap(p), width);
}

template <bool kRounded>
cudaError_t launch_rows(const SoftcapCeParams& p, cudaStream_t stream) {
  const auto kernel = softcap_ce_kernel<kRounded, 1, true>;
  const auto blocks = static_cast<unsigned>(p.rows);
  const int64_t bytes = p.cols * int64_t{sizeof(bf16)};
  cudaFuncAttributes attributes{};
  bool fits = false;
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess) error = allow_shared(kernel, bytes, attributes, &fits);
  if (error != cudaSuccess) return error;
  if (fits) {
    kernel<<<blocks, kThreads, bytes, stream>>>(p, Softcap(p), p.cols);
  } else {
    softcap_ce_kernel<kRounded, 1, false><<<blocks, kThreads, 0, stream>>>(p, Softcap(p), p.cols);
  }
  return cudaGetLastError();
}

template <bool kRounded>
cudaError_t launch(const SoftcapCeParams& p, cudaStream_t stream) {
  if (p.dz_t != nullptr && is_aligned(p.dz_t, p.rows, p.rows, 0, 1)) {  // whole groups of rows
    bool launched = false;
    const cudaError_t error = launch_clusters<kRounded>(p, stream, &launched);
    if (error != cudaSuccess || launched) return error;
  }
  const cudaError_t error = launch_rows<kRounded>(p, stream);
  if (error != cudaSuccess || p.dz_t == nullptr) return error;
  TransposeParams transpose{};
  transpose.in = p.dz;
  transpose.out = p.dz_t;
  transpose.batch = 1;
  transpose.rows = p.rows;
  transpose.cols = p.cols;
  transpose.in_row_stride = p.cols;
  transpose.out_row_stride = p.rows;
  transpose.dtype = DType::kUInt8;
  return launch_transpose(transpose, stream);
}

}  // namespace

cudaError_t launch_softcap_ce(const SoftcapCeParams& p, cudaStream_t stream) {
  if (p.rows < 0 || p.cols < 0 || p.rows > INT_MAX / kClusterSize || p.cols > INT_MAX / 2 ||
      !(p.a > 0 && p.a <= kLargestSoftcap && p.c > 0) ||
      !is_aligned(p.z, p.cols, p.cols, 0, sizeof(bf16)) ||
      !is_aligned(p.dz, p.cols, p.cols, 0, 1)) {
    return cudaErrorInvalidValue;
  }
  if (p.rows == 0 || p.cols == 0) return cudaSuccess;
  return p.round_sigmoid ? launch<true>(p, stream) : launch<false>(p, stream);
}

}  // namespace speedrun
