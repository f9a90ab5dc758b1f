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
  SoftcapCeParams params{};
  const auto set = [&]<typename T>(T*& data, const Tensor& tensor, ScalarType type, int64_t numel,
                                   const char* name) {
    data = static_cast<T*>(data_of(tensor, type, numel, device, kOp, name));
  };
  set(params.z, z, ScalarType::BFloat16, z.numel(), "z");
  set(params.targets, targets, ScalarType::Long, rows * num_targets, "targets");
  set(params.weights, weights, ScalarType::Float, num_targets, "weights");
  if (prefix_targets) {
    set(params.prefix_targets, *prefix_targets, ScalarType::Long, rows, "prefix_targets");
  }
  set(params.prefix_weight, prefix_weight, ScalarType::Float, 1, "prefix_weight");
  set(params.scale, dz_scale, ScalarType::Float, 1, "dz_scale");
  set(params.loss, loss, ScalarType::Float, rows, "loss");
  set(params.lse, lse, ScalarType::Float, rows, "lse");
  set(params.dz, dz, ScalarType::Float8_e5m2, z.numel(), "dz");
  if (dz_t) set(params.dz_t, *dz_t, ScalarType::Float8_e5m2, z.numel(), "dz_t");
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
