// The targets' share of the head, kernels; csrc/tests/head_logits_smoke.cu runs them on the host.
#pragma once

#include <cuda_fp8.h>

#include <cmath>

#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "kernels/head_logits.h"

namespace speedrun::head {

using bf16 = __nv_bfloat16;

// ---- 1. Tile choice --------------------------------------------------------------------------
// Not yet measured on a GPU. All three wait for memory: of 16,384 rows, 4 targets and 50,304
// columns they move about 0.3 GB (terms: rows of W in bf16 and FP8, mostly from L2), 0.15 GB and
// 0.4 GB.

constexpr int kThreads = 256, kWarps = kThreads / 32;  // terms and rows: a row of x a warp
// add_target_columns: a block has 32 columns of dW, so that it writes whole lines of 128 bytes,
// and goes through the model's dim, or its half, 4 elements a lane at a time.
constexpr int kBlockColumns = 32, kLaneDims = 4, kDims = 32 * kLaneDims, kDimParts = 2;
// Columns with more entries are for all warps of a block: of a text's commonest token there are
// thousands, and one warp alone would take a millisecond.
constexpr int kMostForOneWarp = 64;

// ---- 2. Device helpers -----------------------------------------------------------------------

struct Sigmoid {
  float sigma, e, g;
};

__device__ inline Sigmoid sigmoid_of(const Softcapped& softcap, float z) {
  const float sigma = 1 / (1 + expf(-(z + softcap.b) / softcap.c));
  const float e = expf(softcap.a * (sigma - 1));
  return {sigma, e, e * sigma * (1 - sigma)};
}

// Eight elements of row `row`, from `at` on, in fp32.
__device__ inline void load_row(const void* matrix, int64_t row, int64_t dim, int at,
                                float (&values)[8]) {
  const Vec<bf16> vec = load16<bf16>(static_cast<const bf16*>(matrix) + row * dim + at);
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = to_float(vec.get(i));
}

__device__ inline void load_row_f8(const void* matrix, int64_t row, int64_t dim, int at,
                                   float (&values)[8]) {
  const auto* start = static_cast<const uint8_t*>(matrix) + row * dim + at;
  const uint2 words = *reinterpret_cast<const uint2*>(start);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t word = i < 2 ? words.x : words.y;
    const auto pair = static_cast<__nv_fp8x2_storage_t>(word >> i % 2 * 16);
    const __half2 halves(__nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3));
    values[2 * i] = __low2float(halves);
    values[2 * i + 1] = __high2float(halves);
  }
}

// The warp's sum of x[row] · w[column]; the same in each lane.
template <auto kLoad>
__device__ inline float dot(const void* x, int64_t row, const void* w, int64_t column, int64_t dim,
                            int lane) {
  float sum = 0;
  for (int at = lane * 8; at < dim; at += 32 * 8) {
    float of_x[8], of_w[8];
    kLoad(x, row, dim, at, of_x);
    kLoad(w, column, dim, at, of_w);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = fmaf(of_x[i], of_w[i], sum);
  }
  return group_sum<32>(sum);
}

// The first place whose key is `key` or more.
__device__ inline int lower_bound(const int32_t* keys, int count, int64_t key) {
  int begin = 0;
  while (count > 0) {
    const int half = count / 2;
    if (keys[begin + half] < key) {
      begin += half + 1;
      count -= half + 1;
    } else {
      count = half;
    }
  }
  return begin;
}

// Adds sides · x of a column's entries number begin, begin + step, .. below end, in this order.
__device__ inline void add_entries(const HeadTargetColumnsParams& p, int begin, int end, int step,
                                   int dim, float (&sum)[kLaneDims]) {
  constexpr int kAtOnce = 4;
  for (int first = begin; first < end; first += kAtOnce * step) {
    uint2 loaded[kAtOnce];
    float sides[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int entry = first + i * step;
      sides[i] = 0;
      loaded[i] = {};
      if (entry >= end || dim >= p.dim) continue;
      const int64_t place = p.order[entry];
      sides[i] = p.sides[place];
      const bf16* row = static_cast<const bf16*>(p.x) + place / p.num_targets * p.dim;
      loaded[i] = *reinterpret_cast<const uint2*>(row + dim);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const Vec<bf16> of_x{{loaded[i].x, loaded[i].y, 0, 0}};
#pragma unroll
      for (int j = 0; j < kLaneDims; ++j) sum[j] = fmaf(sides[i], to_float(of_x.get(j)), sum[j]);
    }
  }
}

// ---- 3. Kernels ------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads) target_terms_kernel(HeadTargetTermsParams p) {
  __shared__ float parts[32][kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t first_row = int64_t{blockIdx.x} * kWarps, row = first_row + warp;
  {  // neighbouring threads read neighbouring rows
    const int64_t own = first_row + threadIdx.x % kWarps, blocks = ceil_div(p.cols, kHeadColumns);
    float sum = 0;
    for (int64_t i = threadIdx.x / kWarps; own < p.rows && i < blocks; i += 32) {
      sum += p.sums[i * p.rows + own];
    }
    parts[threadIdx.x / kWarps][threadIdx.x % kWarps] = sum;
  }
  __syncthreads();
  float sum = group_sum<32>(parts[lane][warp]);
  if (row >= p.rows) return;

  const int num_targets = static_cast<int>(p.num_targets);
  const int64_t* const targets = p.targets + row * num_targets;
  const float f8_scale = *p.x_scale * *p.w_scale, slope = p.softcap.a / p.softcap.c;
  Sigmoid found[kMaxHeadTargets];
  bool first[kMaxHeadTargets], is_wrong = false;
  float weight = 0;
#pragma unroll
  for (int m = 0; m < kMaxHeadTargets; ++m) {
    const int64_t target = m < num_targets ? targets[m] : -1;
    found[m] = {};
    first[m] = target >= 0 && target < p.cols;
    is_wrong |= target >= p.cols;
    if (!first[m]) continue;  // the same for all lanes
    weight += p.weights[m];
    for (int n = 0; n < m; ++n) first[m] &= targets[n] != target;
    found[m] = sigmoid_of(p.softcap, dot<load_row>(p.x, row, p.w, target, p.dim, lane));
    if (!first[m]) continue;
    const float z_f8 = dot<load_row_f8>(p.x_f8, row, p.w_f8, target, p.dim, lane) * f8_scale;
    sum += found[m].e - sigmoid_of(p.softcap, z_f8).e;
  }
  const float factor = weight * slope / sum, lse = p.softcap.a + logf(sum);
  float loss = is_wrong ? NAN : 0;
#pragma unroll
  for (int m = 0; m < kMaxHeadTargets; ++m) {
    if (m >= num_targets) break;
    const int64_t target = targets[m];
    const float sigma = found[m].sigma;
    float side = 0;
    if (target >= 0 && target < p.cols) loss += p.weights[m] * (lse - p.softcap.a * sigma);
    if (first[m]) {
      float of_column = 0;
      for (int n = m; n < num_targets; ++n) of_column += targets[n] == target ? p.weights[n] : 0;
      side = factor * found[m].g - of_column * sigma * (1 - sigma) * slope;
      if (lane == 0) {
        p.g[row * p.cols + target] = 0;
        p.g_t[target * p.rows + row] = 0;
      }
    }
    if (lane == 0) p.sides[row * num_targets + m] = side;
  }
  if (lane == 0) {
    p.loss[row] = loss;
    p.factors[row] = factor;
  }
}

__global__ void __launch_bounds__(kThreads) add_target_rows_kernel(HeadTargetRowsParams p) {
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (row >= p.rows) return;
  const int num_targets = static_cast<int>(p.num_targets);
  const int64_t* const targets = p.targets + row * num_targets;
  bf16* const dx = static_cast<bf16*>(p.dx) + row * p.dim;
  for (int at = threadIdx.x % 32 * 8; at < p.dim; at += 32 * 8) {
    float sum[8];
    load_row(p.dx, row, p.dim, at, sum);
    for (int m = 0; m < num_targets; ++m) {
      if (targets[m] < 0 || targets[m] >= p.cols) continue;
      const float side = p.sides[row * num_targets + m];
      float of_w[8];
      load_row(p.w, targets[m], p.dim, at, of_w);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i] = fmaf(side, of_w[i], sum[i]);
    }
    Vec<bf16> rounded{};
#pragma unroll
    for (int i = 0; i < 8; ++i) rounded.fill(i, from_float<bf16>(sum[i]));
    store16(dx + at, rounded);
  }
}

__global__ void __launch_bounds__(kThreads) add_target_columns_kernel(HeadTargetColumnsParams p) {
  __shared__ float tile[kBlockColumns][kDims + 1];  // + 1: a column of it without bank conflicts
  __shared__ float parts[kWarps][kDims];
  __shared__ int starts[kBlockColumns + 1];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t first_column = int64_t{blockIdx.x} * kBlockColumns;
  const int count = static_cast<int>(p.rows * p.num_targets);
  if (threadIdx.x <= kBlockColumns) {
    const int64_t key = first_column + threadIdx.x;
    starts[threadIdx.x] = lower_bound(p.keys, count, key < p.cols ? key : p.cols);
  }
  __syncthreads();
  if (starts[0] == starts[kBlockColumns]) return;

  for (int first_dim = blockIdx.y * kDims; first_dim < p.dim; first_dim += kDimParts * kDims) {
    const int dim = first_dim + lane * kLaneDims;
    for (int column = warp; column < kBlockColumns; column += kWarps) {
      const int begin = starts[column], end = starts[column + 1];
      if (end - begin > kMostForOneWarp) continue;
      float sum[kLaneDims] = {};
      add_entries(p, begin, end, 1, dim, sum);
#pragma unroll
      for (int j = 0; j < kLaneDims; ++j) tile[column][lane * kLaneDims + j] = sum[j];
    }
    for (int column = 0; column < kBlockColumns; ++column) {
      const int begin = starts[column], end = starts[column + 1];
      if (end - begin <= kMostForOneWarp) continue;
      float sum[kLaneDims] = {};
      add_entries(p, begin + warp, end, kWarps, dim, sum);
#pragma unroll
      for (int j = 0; j < kLaneDims; ++j) parts[warp][lane * kLaneDims + j] = sum[j];
      __syncthreads();
      if (threadIdx.x < kDims) {
        float total = 0;
        for (int i = 0; i < kWarps; ++i) total += parts[i][threadIdx.x];
        tile[column][threadIdx.x] = total;
      }
      __syncthreads();
    }
    __syncthreads();
    const bool is_there = starts[lane] < starts[lane + 1];
    for (int i = warp; i < kDims && first_dim + i < p.dim; i += kWarps) {
      if (is_there) p.dw[(first_dim + i) * p.cols + first_column + lane] += tile[lane][i];
    }
    __syncthreads();
  }
}

}  // namespace speedrun::head
