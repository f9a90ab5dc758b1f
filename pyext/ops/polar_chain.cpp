// speedrun::polar_chain_out on CUDA tensors. Schema: python/speedrun/ops/polar_chain.py.
#include "kernels/polar_chain.h"

#include <vector>

#include "torch_utils.h"

namespace speedrun {
namespace {

constexpr char kOp[] = "polar_chain_out";

// work (4 S - 1, B, N, N) float16; counters (4 S - 1, B, N / 128) int32; coefficients (S, 3)
void polar_chain_out(Tensor work, Tensor counters, const std::vector<double> coefficients) {
  using torch::headeronly::ScalarType;
  check_cuda(work, kOp, "work");
  const int32_t device = work.get_device_index();
  const size_t num_steps = coefficients.size() / 3;
  STD_TORCH_CHECK(coefficients.size() % 3 == 0 && num_steps >= 1 && num_steps <= kMaxChainSteps,
                  kOp, ": coefficients must be a, b, c of 1 to ", kMaxChainSteps, " steps, got ",
                  coefficients.size(), " numbers");
  PolarChainParams params{};
  params.num_steps = static_cast<int>(num_steps);
  for (size_t i = 0; i < coefficients.size(); ++i) {
    params.coefficients[i / 3][i % 3] = coefficients[i];
  }
  const int64_t num_slots = chain_slots(params.num_steps);
  STD_TORCH_CHECK(work.dim() == 4 && work.size(0) == num_slots && work.size(2) == work.size(3) &&
                      work.size(3) % kSquare == 0,
                  kOp, ": work must be (", num_slots, ", B, N, N), N a multiple of ", kSquare);
  params.batch = work.size(1);
  params.n = work.size(3);
  params.work = data_of(work, ScalarType::Half, work.numel(), device, kOp, "work");
  const int64_t num_counters = num_slots * params.batch * squares_per_side(params.n);
  params.counters = static_cast<uint32_t*>(
      data_of(counters, ScalarType::Int, num_counters, device, kOp, "counters"));
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_launch(launch_polar_chain(params, current_stream(device)), kOp);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(speedrun, CUDA, m) {
  m.impl("polar_chain_out", TORCH_BOX(&polar_chain_out));
}

}  // namespace speedrun
