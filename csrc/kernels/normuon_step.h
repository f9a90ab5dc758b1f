// NorMuon from the orthogonalised update O to new weights W, in place, for each matrix of a bank:
//
//   S[l] = lerp(S[l], mean(O[l]^2), 1 - beta2), l a row where rows >= cols, else a column
//   f[l] = 1 / sqrt(max(S[l], 1e-10));  O = O * f * |O| / max(|O * f|, 1e-10)  (Frobenius norms)
//   W = W - (O * W >= 0 ? W : 0) * wd * decay_lr - O * lr;  not cautious: W decays everywhere
//   out = e4m3(W / scale), out_t its transpose, amax = max(amax, |W|)
//
// in fp32, O rounded once to its type. W's operations are rounded one by one and have the bits of
// python/speedrun/reference/normuon_step.py for the same O. With `low` W is exact: bf16 upper half,
// cut off or `nearest`, and lower half; without, it is rounded to nearest; e4m3 is of the stored W.
//
// Two launches, without `second` only the other one. O is read twice, the second time from L2 as
// far as it holds, everything else once: bound by memory bandwidth. Deterministic. Fastest where
// pointers and rows are multiples of 16 bytes and with e4m3 the sizes multiples of 16; else the
// same result element by element.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/dtype.h"
#include "common/int_math.h"

namespace speedrun {

// All tensors are contiguous. Null: not wanted.
struct NormuonParams {
  void* weight;                 // (batch, rows, cols) bf16 or fp32
  uint16_t* low;                // (batch, rows, cols) or null; wants weight in bf16
  const void* o;                // (batch, rows, cols) fp16, bf16 or fp32
  float* second;                // (batch, max(rows, cols)) S, or null: O is taken as it is
  float2* partials;             // (batch, normuon_partials(rows, cols)), workspace of `second`
  const double *lr, *decay_lr;  // (batch)
  const double* wd;             // ()
  const float* scale;           // (batch), or null: none of the following
  uint8_t *out, *out_t;         // (batch, rows, cols), (batch, cols, rows); each may be null
  float* amax;                  // (batch), not negative: only raised
  int64_t batch, rows, cols;
  double beta2;
  bool cautious, nearest;
  DType weight_dtype, o_dtype;
};

constexpr int kNormuonLines = 16;  // rows or columns of which a block finds S
HOST_DEVICE constexpr int64_t normuon_partials(int64_t rows, int64_t cols) {
  return ceil_div(rows >= cols ? rows : cols, kNormuonLines);
}

// Launches nothing if there is no element. cudaErrorInvalidValue: another type, a negative size, or
// more than 2^31 - 1 tiles.
cudaError_t launch_normuon_step(const NormuonParams& params, cudaStream_t stream);

}  // namespace speedrun
