// What follows attention, and its backward, in one launch each. For each token and head, with y the
// attention's output and v the head's own value:
//
//   s = <y, v> / max(|v|^2, 1e-8), tau = tanh(alpha)
//   z = y - tau * s * v              exclusive self-attention; z = y where alpha is null
//   out = gate * z                   out = z where gate is null
//   out_f8 = e4m3(out / scale), amax = max(amax, |out|)     of out as it was rounded
//
//   backward, with G = gate * grad and b = <G, v> / max(|v|^2, 1e-8):
//   dgate = <grad, z>, dalpha = -(1 - tau^2) * s * <G, v>, dy = G - tau * b * v,
//   dv = -tau * (s * G + b * (y - 2 * s * v)), without 2 * s * v where |v|^2 < 1e-8
//
// fp32 inside, each result rounded once. Every number is read and written once, v only for
// exclusive self-attention: bound by memory bandwidth. Deterministic. Fastest where pointers are
// multiples of 16 bytes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/dtype.h"

namespace speedrun {

// All tensors but alpha and gate are contiguous, all but the fp8 copy's of one type.
struct AttentionEpilogueInputs {
  const void* y;                                  // (tokens, heads, dim)
  const void* v;                                  // like y; null without alpha
  const void* alpha;                              // (tokens, heads) or null, of any strides
  const void* gate;                               // the same
  int64_t tokens, heads, dim;                     // dim: at most 128, a multiple of 8
  int64_t alpha_token_stride, alpha_head_stride;  // in elements; 0: shared
  int64_t gate_token_stride, gate_head_stride;
  DType dtype;  // fp16, bf16 or fp32
};

struct AttentionEpilogueParams {
  AttentionEpilogueInputs in;
  void* out;           // like y
  const float* scale;  // (), read where out_f8 isn't null
  uint8_t* out_f8;     // like y, or null
  float* amax;         // (), with out_f8; not negative, only raised
};

struct AttentionEpilogueBwdParams {
  AttentionEpilogueInputs in;
  const void* grad;   // like y
  void* dy;           // like y
  void *dv, *dalpha;  // like v; (tokens, heads); with alpha
  void* dgate;        // (tokens, heads); with gate
};

// Launch nothing if there is no token. cudaErrorInvalidValue: another type or size, or more than
// 2^31 - 16 heads of tokens.
cudaError_t launch_attention_epilogue(const AttentionEpilogueParams& params, cudaStream_t stream);
cudaError_t launch_attention_epilogue_bwd(const AttentionEpilogueBwdParams& params,
                                          cudaStream_t stream);

}  // namespace speedrun
