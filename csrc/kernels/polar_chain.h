// Steps of Polar Express in its Gram form, for a bank of symmetric matrices R, in one launch. With
// Q = I at first, each step (a, b, c) is
//
//   Z = b · R + c · R²,   Q <- (Z + a · I) · Q,   R <- (Z + a · I) · R · (Z + a · I)
//
// the last without its R. Products: Z = c · R · R + b · R; Q = Z + a · I in the first step, later
// Q · Z + a · Q; P = R · Z + a · R; R = Z · P + a · P. Each is summed in fp32 and rounded once to
// fp16; the squares of 128 x 128 on the diagonal and below it are computed, and their lower
// triangle is stored twice: all matrices are symmetric in every bit, as those of sym_matmul (whose
// launches one by one compute the same, up to the order of sums).
//
// sm_90a only. Deterministic. The thread blocks wait for each other's squares, so all of them must
// run at once: a cooperative launch, which the driver refuses otherwise.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/polar_chain_schedule.h"

namespace speedrun {

struct PolarChainParams {
  // (chain_slots(num_steps), batch, n, n) fp16, contiguous, at a multiple of 16 bytes. The first
  // (batch, n, n) is R, which is read; the last becomes Q; the others are scratch.
  void* work;
  uint32_t* counters;                      // (chain_slots(num_steps), batch, n / 128): scratch
  int64_t batch, n;                        // n: a multiple of 128, at most kMaxChainN
  int num_steps;                           // 1 to kMaxChainSteps
  double coefficients[kMaxChainSteps][3];  // a, b, c
};

// Launches nothing for an empty bank, else clears the counters and launches the chain.
// cudaErrorInvalidValue: another n or number of steps, an address that isn't a multiple of 16
// bytes, or more than about 2^31 squares. cudaErrorCooperativeLaunchTooLarge: no thread block
// fits on the GPU.
cudaError_t launch_polar_chain(const PolarChainParams& params, cudaStream_t stream);

}  // namespace speedrun
