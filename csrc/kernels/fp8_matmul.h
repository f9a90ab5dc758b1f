// GEMMs of FP8 matrices with per-tensor scales, and what is fused behind them. With
//
//   s = (A · Bᵀ) · scale_a · scale_b     A (m, k), B (n, k); each e4m3 or e5m2; sums in fp32
//
//   fp8_matmul          out = s · row_scale[m], bf16;  = quantised(.., out_scale), e4m3;
//                       or fp32 out = s, or += s (K cut in parts: the order of the sums varies)
//   fp8_matmul_relu2    post = bf16(relu(bf16(s))²), post_f8 = quantised(post, post_scale), e4m3,
//                       also transposed; amax = max(amax, post)
//   fp8_matmul_drelu2   dpre = 2 · s · √post, bf16, of a bf16 post; or, of an e4m3 post,
//                       quantised(.., out_scale), e5m2, also transposed; amax = max(amax, |dpre|)
//
// quantised(x, scale) = x · (1 / scale) rounded to nearest even, clamped to the type's largest
// value; NaN stays NaN. amax is unclamped, NaN if anything is, and not set to zero here.
// Which types and epilogues go together: the table in kernels/fp8_matmul_tiles.h.
//
// sm_90a only. No workspace. Deterministic, but for fp32 outputs. All matrices have a last stride
// of 1; pointers and the bytes of all other strides must be multiples of 16 (TMA).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/dtype.h"

namespace speedrun {

struct Fp8Operands {
  const void* a;         // (batch, m, k), strides (a_batch_stride, a_row_stride, 1)
  const void* b;         // (batch, n, k), strides (b_batch_stride, b_row_stride, 1)
  const float* scale_a;  // ()
  const float* scale_b;  // ()
  int64_t batch, m, n, k;
  int64_t a_batch_stride, a_row_stride, b_batch_stride, b_row_stride;
  DType a_dtype, b_dtype;
  bool fast_accum;  // allows, not demands, sums of about 14 bits
};

struct Fp8MatmulParams {
  Fp8Operands in;
  const float* row_scale;  // (m), or null for 1; null for fp32
  const float* out_scale;  // (), for e4m3 only
  void* out;               // (batch, m, n), strides (out_batch_stride, out_row_stride, 1)
  int64_t out_batch_stride, out_row_stride;
  DType out_dtype;
  bool accumulate;  // fp32 only; fp32 takes batch == 1 only
};

struct Fp8MatmulRelu2Params {
  Fp8Operands in;           // batch == 1
  const float* post_scale;  // ()
  void* post;               // (m, n) bf16, contiguous, or null
  void* post_f8;            // (m, n) e4m3, contiguous
  void* post_f8_t;          // (n, m) e4m3, contiguous, or null
  float* amax;              // ()
};

struct Fp8MatmulDrelu2Params {
  Fp8Operands in;           // batch == 1
  const void* post;         // (m, n) contiguous, bf16 if post_scale is null, else e4m3
  const float* post_scale;  // (), or null: then out_scale, dpre_t and amax are null too
  const float* out_scale;   // (), or null
  void* dpre;               // (m, n) contiguous, bf16 if out_scale is null, else e5m2
  void* dpre_t;             // (n, m) e5m2, contiguous, or null
  float* amax;              // (), or null
};

// Launch nothing for an empty output. cudaErrorInvalidValue: no kernel for these types, k == 0, a
// size above 2^31 - 1, or an address or stride that is not a multiple of 16 bytes.
cudaError_t launch_fp8_matmul(const Fp8MatmulParams& params, cudaStream_t stream);
cudaError_t launch_fp8_matmul_relu2(const Fp8MatmulRelu2Params& params, cudaStream_t stream);
cudaError_t launch_fp8_matmul_drelu2(const Fp8MatmulDrelu2Params& params, cudaStream_t stream);

}  // namespace speedrun
