// The head's product with what follows it, without its logits in memory, and the targets' share.
//
// T rows, D the model's dim, V columns, M targets a row. With z = x · Wᵀ · x_scale · w_scale,
// sigma = 1 / (1 + exp(-(z + b) / c)), e = exp(a · (sigma - 1)) and g = e · sigma · (1 - sigma):
//
//   head_logits               sums[i, t] = the sum of e over columns 128 i to 128 i + 127; g over
//                             its largest value's share of e5m2's, as e5m2, and its transpose
//   head_target_terms         python/speedrun/reference/head_logits.py has its formulas: losses,
//                             rows' factors, the gradient at the targets; g becomes 0 there
//   head_add_target_rows      dx[t] += the sum over m of sides[t, m] · w[targets[t, m]]
//   head_add_target_columns   dw[:, v] += the sum of sides[t, m] · x[t] where targets[t, m] is v
//
// A target below 0 counts nothing; one of V or more makes the loss NaN. All sums are in fp32, in a
// fixed order. head_logits is for sm_90a only. Matrices are contiguous and start at multiples of 16
// bytes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace speedrun {

constexpr int kHeadColumns = 128;      // of a partial sum
constexpr int kMaxHeadTargets = 8;     // M
constexpr float kMaxHeadSoftcap = 32;  // larger ones leave no numbers for small g in e5m2

struct Softcapped {
  float a, b, c;
};

struct HeadLogitsParams {
  const void* x;         // (rows, dim) e4m3
  const void* w;         // (cols, dim) e4m3
  const float* x_scale;  // ()
  const float* w_scale;  // ()
  float* sums;           // (ceil(cols / 128), rows)
  void* g;               // (rows, cols) e5m2
  void* g_t;             // (cols, rows) e5m2
  int64_t rows, cols, dim;
  Softcapped softcap;
};

struct HeadTargetTermsParams {
  const float* sums;       // (ceil(cols / 128), rows)
  uint8_t* g;              // (rows, cols) e5m2
  uint8_t* g_t;            // (cols, rows) e5m2
  const void* x;           // (rows, dim) bf16
  const void* w;           // (cols, dim) bf16
  const void* x_f8;        // (rows, dim) e4m3
  const void* w_f8;        // (cols, dim) e4m3
  const float* x_scale;    // ()
  const float* w_scale;    // ()
  const int64_t* targets;  // (rows, num_targets)
  const float* weights;    // (num_targets)
  float* loss;             // (rows)
  float* factors;          // (rows)
  float* sides;            // (rows, num_targets)
  int64_t rows, cols, dim, num_targets;
  Softcapped softcap;
};

struct HeadTargetRowsParams {
  const void* w;           // (cols, dim) bf16
  const int64_t* targets;  // (rows, num_targets)
  const float* sides;      // (rows, num_targets)
  void* dx;                // (rows, dim) bf16
  int64_t rows, cols, dim, num_targets;
};

struct HeadTargetColumnsParams {
  const void* x;         // (rows, dim) bf16
  const int32_t* keys;   // (rows * num_targets): the targets in ascending order
  const int64_t* order;  // (rows * num_targets): where each was among them
  const float* sides;    // (rows, num_targets)
  float* dw;             // (dim, cols)
  int64_t rows, cols, dim, num_targets;
};

// Launch nothing where there are no rows or columns. cudaErrorInvalidValue: a or c out of range, no
// dim or one that is no multiple of 8, num_targets outside 1 to 8, or (head_logits, for TMA) a size
// that is no multiple of 16 or above 2^31 - 1.
cudaError_t launch_head_logits(const HeadLogitsParams& params, cudaStream_t stream);
cudaError_t launch_head_target_terms(const HeadTargetTermsParams& params, cudaStream_t stream);
cudaError_t launch_head_add_target_rows(const HeadTargetRowsParams& params, cudaStream_t stream);
cudaError_t launch_head_add_target_columns(const HeadTargetColumnsParams& params,
                                           cudaStream_t stream);

}  // namespace speedrun
