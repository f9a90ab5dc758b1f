// Adam with cautious weight decay, in place, of any number of tensors:
//
//   m = m + (g - m) * (1 - beta1);  v = v * beta2 + g^2 * (1 - beta2)
//   u = m / (sqrt(v) + eps) * step_size;  W = W - u, and where u * W > 0 also - decay * W
//   (not cautious: everywhere)
//
// in fp32, every operation rounded once (python/speedrun/reference/adam_step.py has the same bits);
// each result is rounded once to its tensor's type. With `seen`, a row that has never had a nonzero
// gradient costs only the read of its gradient; if not cautious, all rows count as seen.
//
// Each element is read and written once: bound by memory bandwidth. Deterministic. Fastest where
// pointers are multiples of 16 bytes, with `seen` also rows; else the same result element by
// element. Rows are a warp's work each, made for some hundred to some thousand elements.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/dtype.h"

namespace speedrun {

// All tensors are contiguous.
struct AdamTensor {
  void* param;            // (numel) fp32 or bf16
  const void* grad;       // (numel), of param's type
  void* exp_avg;          // (numel) fp32 or bf16
  void* exp_avg_sq;       // (numel), of exp_avg's type
  const double* scalars;  // (2): step size lr * sqrt(1 - beta2^t) / (1 - beta1^t), and decay
  uint8_t* seen;          // (numel / cols) 0 or 1, or null
  int64_t numel, cols;    // cols: a row's elements, which divide numel; only read with `seen`
  double beta1, beta2;
  DType param_dtype, moment_dtype;
};

// One launch for every kAdamTableSize tensors that have elements; none if there is no such.
// cudaErrorInvalidValue: another type, a negative size, cols that don't divide numel.
constexpr int kAdamTableSize = 40;
cudaError_t launch_adam_step(const AdamTensor* tensors, int64_t count, float eps, bool cautious,
                             cudaStream_t stream);

}  // namespace speedrun
