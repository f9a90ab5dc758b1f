// What the two launches of normuon_step share.
#pragma once

#include "common/ieee.cuh"
#include "kernels/normuon_step.h"

namespace speedrun {

constexpr float kNormuonMin = 1e-10f;

// NaN stays NaN.
HOST_DEVICE inline float at_least(float x, float least) { return x < least ? least : x; }

// What O is multiplied by in a line, before its matrix's norm is put back.
HOST_DEVICE inline float line_factor(float second) {
  return divide(1.0f, square_root(at_least(second, kNormuonMin)));
}

// The first launch, normuon_step_second.cu: S and partials of O, which has an element. `aligned`:
// O's rows are multiples of 16 bytes. Errors as for launch_normuon_step.
cudaError_t launch_normuon_second(const NormuonParams& params, bool aligned, cudaStream_t stream);

}  // namespace speedrun
