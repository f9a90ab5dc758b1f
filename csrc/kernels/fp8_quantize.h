// Casts to fp8 with one scale a matrix: real value = fp8 * scale.
//
//   fp8(v) = v rounded to nearest even; beyond the largest number (e4m3 448, e5m2 57344) that one,
//            NaN stays NaN. Quotients are IEEE fp32.
//   quantize:  out[m, n] = fp8(x[m, n] / scale), out_t its transpose, amax = max(amax, |x|)
//   rms_norm:  y[m, n] = bf16(x[m, n] / sqrt(mean_n(x[m]^2) + eps)); out = fp8(y / scale), e4m3
//   refresh:   a bank of up, down, up, down, ... matrices W, e4m3, amax = max |W| (at least 1e-12):
//     up       fp8(bf16(W / scale)), scale = bf16(amax * (1 / 448))
//     down     fp8(W / scale), scale = headroom ? down_amax * (1.12 / 448) : as up
//
// Every element is read once (rms_norm and refresh: a second time, from L2 as far as it holds) and
// written once a layout: bound by memory bandwidth. Deterministic. Before sm_89 the casts are
// emulated. Fastest where pointers, rows and strides of inputs are multiples of 16 bytes and the
// sizes of transposed matrices multiples of 16; else the same result element by element.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/dtype.h"

namespace speedrun {

// Strides count elements; outputs are contiguous. Null: not wanted.
struct Fp8QuantizeParams {
  const void* x;       // (batch, rows, cols), strides (x_batch_stride, x_row_stride, 1)
  const float* scale;  // ()
  void* y;             // (batch, rows, cols) bf16 or null; rms_norm only
  uint8_t* out;        // (batch, rows, cols)
  uint8_t* out_t;      // (batch, cols, rows) or null
  float* amax;         // () or null, not negative: only raised; quantize only
  int64_t batch, rows, cols, x_batch_stride, x_row_stride;
  float eps;                 // rms_norm only
  DType x_dtype, out_dtype;  // fp16, bf16 or fp32; e4m3 or e5m2 (rms_norm: e4m3)
};

struct Fp8RefreshParams {
  const void* bank;        // (2 * layers, rows, cols) bf16, contiguous
  const float* down_amax;  // (layers): of the weights one step before
  uint8_t *up, *up_t;      // (layers, rows, cols); (layers, cols, rows) or null
  uint8_t *down, *down_t;  // the same; `down` or null, and `down_t`
  float* scales;           // (2, layers): up, down
  uint32_t* amax;          // (2, layers): fp32, zero before
  int32_t* progress;       // (1 + 2 * layers), zero before: see refresh_kernel
  int64_t layers, rows, cols;
  bool headroom;
};

// Launch nothing if there is no element. cudaErrorInvalidValue: another type, a negative size, or
// more than 2^31 - 1 tiles (16384 elements each).
cudaError_t launch_fp8_quantize(const Fp8QuantizeParams& params, cudaStream_t stream);
cudaError_t launch_rms_norm_fp8_quantize(const Fp8QuantizeParams& params, cudaStream_t stream);
cudaError_t launch_fp8_refresh(const Fp8RefreshParams& params, cudaStream_t stream);

}  // namespace speedrun
