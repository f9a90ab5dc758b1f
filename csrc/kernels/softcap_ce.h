// Cross-entropy of softcapped logits against several weighted targets, and its gradient in fp8:
//
//   s = sigmoid((z + b) / c), rounded to bf16 if round_sigmoid;  l = a * s
//   lse[t] = log(sum_v exp(l[t, v])),  loss[t] = sum_n w[n] * (lse[t] - l[t, target n])
//   dz[t, v] = e5m2(a / c * s * (1 - s) * (S * exp(l - lse) - sum of w[n] whose target v is) /
//   scale)
//
// over the targets that are not negative: num_targets of them, and the prefix target with a weight
// of its own. S: the sum of the weights that count, with count_missing also of those that a row
// lacks if it has its first target. Beyond e5m2's largest number dz is that one; NaN stays NaN. A
// target of cols or more makes the row's loss NaN.
//
// Accuracy: sums and exponentials in fp32. The factor exp(l) * s * (1 - s) of an element is kept in
// bf16 until its row's sum is known, so that one byte in a hundred is e5m2's other neighbour;
// targets' bytes are computed anew, in fp32 alone. Deterministic. One launch; a second one for dz_t
// before sm_90, if rows isn't a multiple of 16, or if 16 rows don't fit into a cluster's shared
// memory (on H100 more than 58,000 columns).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace speedrun {

// All tensors are contiguous.
struct SoftcapCeParams {
  const void* z;                  // (rows, cols) bf16
  const int64_t* targets;         // (rows, num_targets)
  const float* weights;           // (num_targets)
  const int64_t* prefix_targets;  // (rows) or null
  const float* prefix_weight;     // ()
  const float* scale;             // ()
  float *loss, *lse;              // (rows)
  uint8_t* dz;                    // (rows, cols) e5m2
  uint8_t* dz_t;                  // (cols, rows) e5m2 or null
  int64_t rows, cols, num_targets;
  float a, b, c;
  bool count_missing, round_sigmoid;
};

// Beyond this, exp(a / 2) times a row's columns might not be an fp32 number.
constexpr float kLargestSoftcap = 140;

// Launches nothing if there is no element. cudaErrorInvalidValue: cols not a multiple of 16, z or
// dz not at a multiple of 16 bytes, a not in (0, kLargestSoftcap], c not above 0, too many rows.
cudaError_t launch_softcap_ce(const SoftcapCeParams& params, cudaStream_t stream);

}  // namespace speedrun
