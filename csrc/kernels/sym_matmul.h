// Symmetric products, of which one triangle of tiles is computed and stored twice. With
//
//   out = alpha · A · Bᵀ + beta · C      A, B (n, k)      sums in fp32, one rounding
//   out = alpha · Aᵀ · A + beta · C      A (k, n)         (transposed)
//
// A · Bᵀ and C must be symmetric but for roundings: B = A, or symmetric matrices that commute. What
// is computed are the tiles of 128 x 128 on the diagonal and below it; those below are also stored
// transposed. Where B is not A a second launch copies the lower half of the tiles on the diagonal
// into the upper one: out is symmetric in every bit, since in chains of such products what isn't
// grows from step to step.
//
// sm_90a only. No workspace. Deterministic. All matrices have a last stride of 1; pointers and the
// bytes of all other strides must be multiples of 16 (TMA). out must not overlap a, b or c.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/dtype.h"

namespace speedrun {

struct SymMatmulParams {
  const void* a;  // (batch, n, k), or (batch, k, n); strides (a_batch_stride, a_row_stride, 1)
  const void* b;  // like a, and a itself if transposed
  const void* c;  // (batch, n, n), or null where beta is 0; may be a or b
  void* out;      // (batch, n, n)
  int64_t batch, n, k;
  int64_t a_batch_stride, a_row_stride, b_batch_stride, b_row_stride;
  int64_t c_batch_stride, c_row_stride, out_batch_stride, out_row_stride;
  DType dtype;  // of all four: bf16 or fp16
  bool transposed;
  float alpha, beta;
};

// Launches nothing for an empty output. cudaErrorInvalidValue: another type, k == 0, a size above
// 2^31 - 1, b != a though transposed, no c though beta != 0, or an address or stride that is not a
// multiple of 16 bytes.
cudaError_t launch_sym_matmul(const SymMatmulParams& params, cudaStream_t stream);

}  // namespace speedrun
