// The two products of the bf16 MLP that have something fused behind them; its others are plain.
//
//   relu2_up   post = bf16(relu(bf16(h · upᵀ))²)
//   drelu2     dpre = bf16(2 · (grad · downᵀ) · √post)     post stands for relu² of its input
//
// Sums in fp32. sm_90a only. No workspace. Deterministic. All matrices bf16 with a last stride of
// 1; pointers and the bytes of row strides must be multiples of 16 (TMA).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace speedrun {

struct Relu2UpParams {
  const void* h;   // (tokens, dim), strides (h_stride, 1)
  const void* up;  // (hidden, dim), strides (up_stride, 1)
  void* post;      // (tokens, hidden), strides (post_stride, 1)
  int64_t tokens, dim, hidden;
  int64_t h_stride, up_stride, post_stride;
};

struct Drelu2Params {
  const void* grad;  // (tokens, dim), strides (grad_stride, 1)
  const void* down;  // (hidden, dim), strides (down_stride, 1)
  const void* post;  // (tokens, hidden), strides (post_stride, 1)
  void* dpre;        // (tokens, hidden), strides (dpre_stride, 1)
  int64_t tokens, dim, hidden;
  int64_t grad_stride, down_stride, post_stride, dpre_stride;
};

// Launch nothing for an empty output. cudaErrorInvalidValue: dim == 0, a size above 2^31 - 1, or an
// address or stride that is not a multiple of 16 bytes.
cudaError_t launch_relu2_up(const Relu2UpParams& params, cudaStream_t stream);
cudaError_t launch_drelu2(const Drelu2Params& params, cudaStream_t stream);

}  // namespace speedrun
