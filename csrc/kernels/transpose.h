// Transpose of a batch of matrices, moved or added.
//
//   add == false:  out[b, n, m]  = in[b, m, n]                    any type, bit for bit
//   add == true:   out[b, n, m] += in[b, m, n]                    fp32 sum, rounded once to nearest
//                                                                 even; fp16, bf16, fp32 only
//
// Reads and writes every element once (add: reads `out` too): bound by memory bandwidth.
// Deterministic. Fastest where both pointers and the byte lengths of rows and strides on both sides
// are multiples of 16; a side that isn't is moved element by element, and the result is the same.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/dtype.h"

namespace speedrun {

// Strides count elements; the last dimension of both has stride 1. `in` may overlap itself
// (stride 0), `out` may not, and they may not overlap each other.
struct TransposeParams {
  const void* in;  // (batch, rows, cols), strides (in_batch_stride, in_row_stride, 1)
  void* out;       // (batch, cols, rows), strides (out_batch_stride, out_row_stride, 1)
  int64_t batch, rows, cols;
  int64_t in_batch_stride, in_row_stride;
  int64_t out_batch_stride, out_row_stride;
  DType dtype;
  bool add;
};

// Needs no workspace. Launches nothing for an empty matrix. cudaErrorInvalidValue: `add` for a type
// that isn't fp16, bf16 or fp32, a negative size, or more than 2^31 - 1 tiles (4096 elements each).
cudaError_t launch_transpose(const TransposeParams& params, cudaStream_t stream);

}  // namespace speedrun
