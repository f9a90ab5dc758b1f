// speedrun::softcap_ce_fp8_out on CUDA tensors. Schema: python/speedrun/ops/softcap_ce.py.
#include "kernels/softcap_ce.h"

#include <optional>

#include "torch_utils.h"

namespace speedrun {
namespace {

constexpr char kOp[] = "softcap_ce_fp8_out";
using OptionalTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;

// z (T, V) bf16, targets (T, N) int64, weights (N,); outputs (T,), (T,), (T, V), (V, T).
void softcap_ce_fp8_out(const Tensor& z, const Tensor& targets, const Tensor& weights, double a,
                        double b, double c, const OptionalTensor& prefix_targets,
                        const Tensor& prefix_weight, bool count_missing, bool rounded,
                        const Tensor& dz_scale, Tensor loss, Tensor lse, Tensor dz,
                        OptionalTensor dz_t) {
  check_cuda(z, kOp, "z");
  STD_TORCH_CHECK(z.dim() == 2 && targets.dim() == 2, kOp, ": z and targets must be matrices");
  const int32_t device = z.get_device_index();
  const int64_t rows = z.size(0), num_targets = targets.size(1);
  const auto of = [&](const Tensor& tensor, ScalarType type, int64_t numel, const char* name) {
    return data_of(tensor, type, numel, device, kOp, name);
  };
  const auto floats = [&](const Tensor& tensor, int64_t numel, const char* name) {
    return static_cast<float*>(of(tensor, ScalarType::Float, numel, name));
  };
  const auto indices = [&](const Tensor& tensor, int64_t numel, const char* name) {
    return static_cast<const int64_t*>(of(tensor, ScalarType::Long, numel, name));
  };
  const auto codes = [&](const Tensor& tensor, const char* name) {
    return static_cast<uint8_t*>(of(tensor, ScalarType::Float8_e5m2, z.numel(), name));
  };
  SoftcapCeParams params{};
  params.z = of(z, ScalarType::BFloat16, z.numel(), "z");
  params.targets = indices(targets, rows * num_targets, "targets");
  params.weights = floats(weights, num_targets, "weights");
  if (prefix_targets) params.prefix_targets = indices(*prefix_targets, rows, "prefix_targets");
  params.prefix_weight = floats(prefix_weight, 1, "prefix_weight");
  params.scale = floats(dz_scale, 1, "dz_scale");
  params.loss = floats(loss, rows, "loss");
  params.lse = floats(lse, rows, "lse");
  params.dz = codes(dz, "dz");
  if (dz_t) params.dz_t = codes(*dz_t, "dz_t");
  params.rows = rows;
  params.cols = z.size(1);
  params.num_targets = num_targets;
  params.a = static_cast<float>(a);
  params.b = static_cast<float>(b);
  params.c = static_cast<float>(c);
  params.count_missing = count_missing;
  params.round_sigmoid = rounded;

  const torch::stable::accelerator::DeviceGuard guard(device);
  check_launch(launch_softcap_ce(params, current_stream(device)), kOp);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(speedrun, CUDA, m) {
  m.impl("softcap_ce_fp8_out", TORCH_BOX(&softcap_ce_fp8_out));
}

}  // namespace speedrun
