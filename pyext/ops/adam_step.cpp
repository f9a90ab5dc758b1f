// speedrun::adam_step_out on CUDA tensors. Schema: python/speedrun/ops/adam_step.py.
#include "kernels/adam_step.h"

#include <vector>

#include "torch_utils.h"

namespace speedrun {
namespace {

constexpr char kOp[] = "adam_step_out";
using Tensors = std::vector<Tensor>;
using torch::headeronly::ScalarType;

void adam_step_out(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs,
                   Tensors scalars, Tensors seen, std::vector<double> beta1s,
                   std::vector<double> beta2s, double eps, bool cautious) {
  const size_t count = params.size();
  for (const Tensors* tensors : {&grads, &exp_avgs, &exp_avg_sqs, &scalars, &seen}) {
    STD_TORCH_CHECK(tensors->size() == count, kOp, ": lists must have one length");
  }
  STD_TORCH_CHECK(beta1s.size() == count && beta2s.size() == count, kOp,
                  ": lists must have one length");
  if (count == 0) return;
  const int32_t device = params[0].get_device_index();
  std::vector<AdamTensor> table(count);
  for (size_t i = 0; i < count; ++i) {
    const int64_t numel = params[i].numel(), rows = seen[i].numel();
    const ScalarType type = params[i].scalar_type(), moment_type = exp_avgs[i].scalar_type();
    AdamTensor& t = table[i];
    t.param = data_of(params[i], type, numel, device, kOp, "param");
    t.grad = data_of(grads[i], type, numel, device, kOp, "grad");
    t.exp_avg = data_of(exp_avgs[i], moment_type, numel, device, kOp, "exp_avg");
    t.exp_avg_sq = data_of(exp_avg_sqs[i], moment_type, numel, device, kOp, "exp_avg_sq");
    t.scalars =
        static_cast<double*>(data_of(scalars[i], ScalarType::Double, 2, device, kOp, "scalars"));
    void* flags = data_of(seen[i], ScalarType::Bool, rows, device, kOp, "seen");
    t.seen = rows ? static_cast<uint8_t*>(flags) : nullptr;
    t.numel = numel;
    t.cols = rows ? numel / rows : 0;
    t.beta1 = beta1s[i];
    t.beta2 = beta2s[i];
    t.param_dtype = dtype_of(params[i], kOp, "param");
    t.moment_dtype = dtype_of(exp_avgs[i], kOp, "exp_avg");
  }
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_launch(launch_adam_step(table.data(), static_cast<int64_t>(count), static_cast<float>(eps),
                                cautious, current_stream(device)),
               kOp);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(speedrun, CUDA, m) { m.impl("adam_step_out", TORCH_BOX(&adam_step_out)); }

}  // namespace speedrun
