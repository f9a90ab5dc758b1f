#include <climits>

#include "common/group.cuh"
#include "common/ieee.cuh"
#include "common/int_math.h"
#include "kernels/adam_step.h"

namespace speedrun {
namespace {

// ---- 1. Tile choice --------------------------------------------------------------------------

// Not yet measured on a GPU: the reasons here are arithmetic, for H100.
// A thread takes a group of 8 elements at a time: 16 bytes of bf16, 32 of fp32, so 96 bytes in
// flight of a bf16 parameter with fp32 moments. With 1,024 threads a multiprocessor, which 64
// registers allow, that is twice what its share of 3.35 TB/s needs in 600 ns of latency (15 KB).
constexpr int kThreads = 256, kWarps = kThreads / 32;
// A block's elements: two rounds of its threads, for the price of finding its tensor once.
constexpr int64_t kChunk = 2 * kThreads * kGroup;

// With `seen` a block has as many whole rows, a multiple of its warps: 8 of 768.
HOST_DEVICE constexpr int64_t rows_per_block(int64_t cols) {
  const int64_t rows_per_warp = kChunk / kWarps / cols;
  return kWarps * (rows_per_warp > 1 ? rows_per_warp : 1);
}

HOST_DEVICE constexpr int64_t blocks_of(const AdamTensor& t) {
  if (t.seen == nullptr) return ceil_div(t.numel, kChunk);
  return ceil_div(t.numel / t.cols, rows_per_block(t.cols));
}

// ---- 2. Device helpers -----------------------------------------------------------------------

// Parameters of a launch: the tensors, the first block of each, and whether it moves 16 bytes at a
// time. At most 4 KB, the limit of drivers older than CUDA 12.1.
struct Table {
  AdamTensor tensors[kAdamTableSize];
  int32_t first_block[kAdamTableSize];
  bool aligned[kAdamTableSize];
  int32_t count;
  float eps;
  bool cautious;
};
static_assert(sizeof(Table) <= 4096);

// The tensor that a block works on: the last one that begins at it or before.
HOST_DEVICE inline int tensor_of(const Table& table, int32_t block) {
  int low = 0, high = table.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.first_block[middle] <= block) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// The numbers of a tensor's update in fp32.
struct Factors {
  float step_size, decay, weight1, beta2, weight2, eps;
  bool cautious;

  HOST_DEVICE Factors(const AdamTensor& t, float eps, bool cautious)
      : step_size(static_cast<float>(t.scalars[0])),
        decay(static_cast<float>(t.scalars[1])),
        weight1(static_cast<float>(1 - t.beta1)),
        beta2(static_cast<float>(t.beta2)),
        weight2(static_cast<float>(1 - t.beta2)),
        eps(eps),
        cautious(cautious) {}
};

HOST_DEVICE inline void update_element(float& w, float g, float& m, float& v, const Factors& f) {
  m = add(multiply(add(g, -m), f.weight1), m);
  v = add(multiply(multiply(g, f.weight2), g), multiply(v, f.beta2));
  float update = multiply(divide(m, add(square_root(v), f.eps)), f.step_size);
  if (!f.cautious || multiply(update, w) > 0) update = add(multiply(w, f.decay), update);
  w = add(w, -update);
}

// P, M: types of parameter and moments.
template <typename P, typename M, bool kAligned>
HOST_DEVICE inline void update_group(const AdamTensor& t, int64_t at, int64_t count,
                                     const Factors& factors) {
  float w[kGroup], g[kGroup], m[kGroup], v[kGroup];
  load_group<kAligned, P>(t.param, at, count, w);
  load_group<kAligned, P>(t.grad, at, count, g);
  load_group<kAligned, M>(t.exp_avg, at, count, m);
  load_group<kAligned, M>(t.exp_avg_sq, at, count, v);
#pragma unroll
  for (int i = 0; i < kGroup; ++i) update_element(w[i], g[i], m[i], v[i], factors);
  store_group<kAligned, P>(t.param, at, count, w);
  store_group<kAligned, M>(t.exp_avg, at, count, m);
  store_group<kAligned, M>(t.exp_avg_sq, at, count, v);
}

// Elements `begin` to `end`, of which thread `thread` of `threads` takes every threads-th group.
template <typename P, typename M>
HOST_DEVICE inline void update_span(const AdamTensor& t, bool aligned, int64_t begin, int64_t end,
                                    int thread, int threads, const Factors& factors) {
  for (int64_t at = begin + thread * kGroup; at < end; at += threads * kGroup) {
    if (aligned && end - at >= kGroup) {
      update_group<P, M, true>(t, at, kGroup, factors);
    } else {
      update_group<P, M, false>(t, at, end - at, factors);
    }
  }
}

// Whether a lane's groups of a gradient hold a number that isn't zero (NaN isn't).
template <typename P>
HOST_DEVICE inline bool has_gradient(const void* grad, bool aligned, int64_t begin, int64_t end,
                                     int lane) {
  bool found = false;
  for (int64_t at = begin + lane * kGroup; at < end; at += 32 * kGroup) {
    float g[kGroup];
    if (aligned && end - at >= kGroup) {
      load_group<true, P>(grad, at, kGroup, g);
    } else {
      load_group<false, P>(grad, at, end - at, g);
    }
#pragma unroll
    for (float value : g) found |= value != 0;
  }
  return found;
}

// Whether all groups, which with `seen` begin anew in each row, start at multiples of 16 bytes.
inline bool groups_are_aligned(const AdamTensor& t) {
  const int64_t length = t.seen == nullptr ? kGroup : t.cols;
  for (const void* tensor : {static_cast<const void*>(t.param), t.grad}) {
    if (!is_aligned(tensor, length, 0, 0, element_bytes(t.param_dtype))) return false;
  }
  for (const void* tensor : {t.exp_avg, t.exp_avg_sq}) {
    if (!is_aligned(tensor, length, 0, 0, element_bytes(t.moment_dtype))) return false;
  }
  return true;
}

// ---- 3. Kernel -------------------------------------------------------------------------------

// All threads update one span after another where there is no `seen`; else each warp its own rows.
template <typename P, typename M>
__device__ inline void update_block(const AdamTensor& t, bool aligned, int64_t block,
                                    const Factors& factors) {
  const bool by_rows = t.seen != nullptr;
  const int threads = by_rows ? 32 : kThreads, thread = threadIdx.x % threads;
  const int64_t length = by_rows ? t.cols : kChunk;
  const int64_t spans = by_rows ? rows_per_block(t.cols) : 1;
  const int64_t last = min((block + 1) * spans, ceil_div(t.numel, length));
  for (int64_t span = block * spans + threadIdx.x / threads; span < last; span += kWarps) {
    const int64_t begin = span * length, end = min(begin + length, t.numel);
    if (by_rows && !t.seen[span]) {  // so for all lanes
      const bool found = !factors.cautious || has_gradient<P>(t.grad, aligned, begin, end, thread);
      if (!__any_sync(~0u, found)) continue;
      if (thread == 0) t.seen[span] = 1;
    }
    update_span<P, M>(t, aligned, begin, end, thread, threads, factors);
  }
}

__global__ void __launch_bounds__(kThreads) adam_step_kernel(const __grid_constant__ Table table) {
  const int32_t block = blockIdx.x;
  const int index = tensor_of(table, block);
  const AdamTensor& t = table.tensors[index];
  const bool aligned = table.aligned[index], wide = t.param_dtype == DType::kFloat32;
  const int32_t own = block - table.first_block[index];
  const Factors factors(t, table.eps, table.cautious);
  if (t.moment_dtype == DType::kFloat32) {
    wide ? update_block<float, float>(t, aligned, own, factors)
         : update_block<__nv_bfloat16, float>(t, aligned, own, factors);
  } else {
    wide ? update_block<float, __nv_bfloat16>(t, aligned, own, factors)
         : update_block<__nv_bfloat16, __nv_bfloat16>(t, aligned, own, factors);
  }
}

// ---- 4. Launcher -----------------------------------------------------------------------------

bool is_valid(const AdamTensor& t) {
  for (const DType dtype : {t.param_dtype, t.moment_dtype}) {
    if (dtype != DType::kFloat32 && dtype != DType::kBFloat16) return false;
  }
  if (t.numel < 0) return false;
  return t.seen == nullptr || t.numel == 0 || (t.cols > 0 && t.numel % t.cols == 0);
}

// Appends a tensor and returns the number of blocks then; 0 if the table has no room for it.
int64_t append(Table& table, const AdamTensor& t, int64_t blocks) {
  const int64_t more = blocks_of(t);
  if (table.count == kAdamTableSize || more > INT_MAX - blocks) return 0;
  table.tensors[table.count] = t;
  table.first_block[table.count] = static_cast<int32_t>(blocks);
  table.aligned[table.count] = groups_are_aligned(t);
  ++table.count;
  return blocks + more;
}

}  // namespace

cudaError_t launch_adam_step(const AdamTensor* tensors, int64_t count, float eps, bool cautious,
                             cudaStream_t stream) {
  for (int64_t i = 0; i < count; ++i) {
    if (!is_valid(tensors[i])) return cudaErrorInvalidValue;
  }
  for (int64_t i = 0; i < count;) {
    Table table{};
    table.eps = eps;
    table.cautious = cautious;
    int64_t blocks = 0;
    for (; i < count; ++i) {
      if (tensors[i].numel == 0) continue;
      const int64_t with_it = append(table, tensors[i], blocks);
      if (with_it == 0) break;
      blocks = with_it;
    }
    if (table.count == 0) {  // nothing is left, or a tensor of more blocks than a grid has
      return i == count ? cudaSuccess : cudaErrorInvalidValue;
    }
    adam_step_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(table);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace speedrun
