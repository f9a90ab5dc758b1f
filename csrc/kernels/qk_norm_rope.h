// From the QKV projection to queries, keys and values, and back, in one launch each. For each token
// t of a part and head h, with x the head's numbers:
//
//   q, k:   y = x / sqrt(mean(x^2) + eps); pairs (a, b) of y's first half become
//           (a cos + b sin, b cos - a sin), the second, stationary half stays
//   k:      with offset_keys the stationary half is that of token t - 1, but where t is the first
//           of its part or first[t] is set
//   v:      x + gate * ve, gate 1 where it is null, ve 0 where it is
//   backward: gradients of qkv, ve and gate from those of q, k and v; the norms are computed again
//
// fp32 inside, each result rounded once. Every number is read and written once: bound by memory
// bandwidth. Deterministic. Fastest where all pointers are multiples of 16 bytes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/dtype.h"

namespace speedrun {

// All tensors are contiguous and of one type but `first`.
struct QkNormRopeInputs {
  const void* qkv;          // (tokens, heads * (2 * head_dim + value_dim)): all q, all k, all v
  const void *cos, *sin;    // (part_tokens, table_heads, head_dim / 4)
  const bool* first;        // (tokens) or null; read only with offset_keys
  const void* ve;           // (tokens, heads, value_dim) or null
  const void* gate;         // (tokens, heads) or null
  int64_t tokens;           // of all parts
  int64_t part_tokens;      // of each part
  int64_t heads, head_dim;  // head_dim: at most 128, a multiple of 16
  int64_t value_dim;        // at most 128, a multiple of 8
  int64_t table_heads;      // heads, or 1: they share the tables
  float eps;
  bool offset_keys;
  DType dtype;  // fp16, bf16 or fp32
};

struct QkNormRopeParams {
  QkNormRopeInputs in;
  void *q, *k;  // (tokens, heads, head_dim)
  void* v;      // (tokens, heads, value_dim)
};

struct QkNormRopeBwdParams {
  QkNormRopeInputs in;
  const void *dq, *dk, *dv;  // like q, k and v
  void* dqkv;                // like qkv
  void *dve, *dgate;         // like ve and gate; only where there is a gate, and ve
};

// Launch nothing if there is no token. cudaErrorInvalidValue: another type or size, or more than
// 2^31 - 16 heads of tokens.
cudaError_t launch_qk_norm_rope(const QkNormRopeParams& params, cudaStream_t stream);
cudaError_t launch_qk_norm_rope_bwd(const QkNormRopeBwdParams& params, cudaStream_t stream);

}  // namespace speedrun
