// speedrun::polar_express_momentum_out and speedrun::polar_express_normalize_out on CUDA tensors.
// Schemas: python/speedrun/ops/polar_express.py.
#include "kernels/polar_express.h"

#include "common/int_math.h"
#include "torch_utils.h"

namespace speedrun {
namespace {

using torch::headeronly::ScalarType;

// What both operators take; all on grad's device.
PolarPrologueParams prologue_params(const Tensor& grad, const Tensor& momentum, const Tensor& mu,
                                    const Tensor& sums, const char* op) {
  check_cuda(grad, op, "grad");
  STD_TORCH_CHECK(grad.dim() == 3, op, ": grad must be (B, M, N)");
  const int32_t device = grad.get_device_index();
  PolarPrologueParams params{};
  params.batch = grad.size(0);
  params.numel = grad.size(1) * grad.size(2);
  params.grad_dtype = dtype_of(grad, op, "grad");
  params.grad = data_of(grad, grad.scalar_type(), grad.numel(), device, op, "grad");
  params.momentum = static_cast<float*>(
      data_of(momentum, ScalarType::Float, grad.numel(), device, op, "momentum"));
  params.mu = static_cast<const double*>(data_of(mu, ScalarType::Double, 1, device, op, "mu"));
  const int64_t num_sums = params.batch * ceil_div(params.numel, kPolarChunk);
  params.sums = static_cast<float*>(data_of(sums, ScalarType::Float, num_sums, device, op, "sums"));
  return params;
}

void polar_express_momentum_out(const Tensor& grad, Tensor momentum, const Tensor& mu,
                                Tensor sums) {
  constexpr char kOp[] = "polar_express_momentum_out";
  const PolarPrologueParams params = prologue_params(grad, momentum, mu, sums, kOp);
  const int32_t device = grad.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_launch(launch_polar_express_momentum(params, current_stream(device)), kOp);
}

void polar_express_normalize_out(const Tensor& grad, const Tensor& momentum, const Tensor& mu,
                                 const Tensor& sums, double norm_factor, double eps, Tensor x) {
  constexpr char kOp[] = "polar_express_normalize_out";
  PolarPrologueParams params = prologue_params(grad, momentum, mu, sums, kOp);
  const int32_t device = grad.get_device_index();
  params.x = data_of(x, x.scalar_type(), grad.numel(), device, kOp, "x");
  params.x_dtype = dtype_of(x, kOp, "x");
  params.norm_factor = static_cast<float>(norm_factor);
  params.eps = static_cast<float>(eps);
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_launch(launch_polar_express_normalize(params, current_stream(device)), kOp);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(speedrun, CUDA, m) {
  m.impl("polar_express_momentum_out", TORCH_BOX(&polar_express_momentum_out));
  m.impl("polar_express_normalize_out", TORCH_BOX(&polar_express_normalize_out));
}

}  // namespace speedrun
