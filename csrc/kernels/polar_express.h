// What precedes the products of Polar Express, for a bank of matrices, in two launches:
//
//   momentum:   M = lerp(M, G, 1 - mu);  sums = sums of squares of N = lerp(G, M, mu), of 8,192
//               consecutive elements of a matrix each
//   normalize:  X = N / (sqrt(sum of the matrix's sums) * norm_factor + eps), rounded once
//
// In fp32; lerp(a, b, w) is a + w * (b - a), or b + (w - 1) * (b - a) where w >= 1/2, with one
// rounding of product and sum, as torch has it; mu is rounded to fp32 first. The second launch
// computes N again, from 6 bytes an element for bf16 gradients, rather than to keep it.
// Bound by memory bandwidth. Deterministic. Fastest where pointers are multiples of 16 bytes and a
// matrix has a multiple of 8 elements; else the same result element by element.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/dtype.h"

namespace speedrun {

constexpr int64_t kPolarChunk = 8192;

// All tensors are contiguous.
struct PolarPrologueParams {
  const void* grad;        // G (batch, numel) fp32 or bf16
  float* momentum;         // M (batch, numel); read only by normalize
  const double* mu;        // ()
  float* sums;             // (batch, ceil(numel / kPolarChunk)); read only by normalize
  void* x;                 // X (batch, numel) fp16 or bf16; normalize only
  int64_t batch, numel;    // numel: of a matrix
  float norm_factor, eps;  // normalize only
  DType grad_dtype, x_dtype;
};

// Launch nothing if there is no element. cudaErrorInvalidValue: another type, a negative size, or
// more than 2^31 - 1 chunks.
cudaError_t launch_polar_express_momentum(const PolarPrologueParams& params, cudaStream_t stream);
cudaError_t launch_polar_express_normalize(const PolarPrologueParams& params, cudaStream_t stream);

}  // namespace speedrun
