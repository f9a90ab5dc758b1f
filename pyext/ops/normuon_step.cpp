// speedrun::normuon_step_out on CUDA tensors. Schema: python/speedrun/ops/normuon_step.py.
#include "kernels/normuon_step.h"

#include <optional>
#include <type_traits>

#include "torch_utils.h"

namespace speedrun {
namespace {

constexpr char kOp[] = "normuon_step_out";
using OptionalTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;

void normuon_step_out(Tensor weight, OptionalTensor low, const Tensor& o, OptionalTensor second,
                      OptionalTensor partials, const Tensor& lr, const Tensor& decay_lr,
                      const Tensor& wd, double beta2, bool cautious, bool nearest,
                      OptionalTensor scale, OptionalTensor row, OptionalTensor transposed,
                      OptionalTensor amax) {
  STD_TORCH_CHECK(weight.dim() == 3, kOp, ": weight must be (B, M, N)");
  STD_TORCH_CHECK(
      second.has_value() == partials.has_value() && scale.has_value() == amax.has_value(), kOp,
      ": second and partials come together, and so do scale and amax");
  const int64_t batch = weight.size(0), rows = weight.size(1), cols = weight.size(2),
                numel = weight.numel();
  const int32_t device = weight.get_device_index();
  NormuonParams params{};
  const auto set = [&](auto*& target, const OptionalTensor& tensor, ScalarType type, int64_t count,
                       const char* name) {
    if (!tensor) return;
    void* data = data_of(*tensor, type, count, device, kOp, name);
    target = static_cast<std::remove_reference_t<decltype(target)>>(data);
  };
  set(params.weight, weight, weight.scalar_type(), numel, "weight");
  set(params.low, low, ScalarType::Short, numel, "low");
  set(params.o, o, o.scalar_type(), numel, "o");
  set(params.second, second, ScalarType::Float, batch * (rows >= cols ? rows : cols), "second");
  const int64_t num_partials = batch * normuon_partials(rows, cols);
  set(params.partials, partials, ScalarType::Float, 2 * num_partials, "partials");
  set(params.lr, lr, ScalarType::Double, batch, "lr");
  set(params.decay_lr, decay_lr, ScalarType::Double, batch, "decay_lr");
  set(params.wd, wd, ScalarType::Double, 1, "wd");
  set(params.scale, scale, ScalarType::Float, batch, "scale");
  set(params.out, row, ScalarType::Float8_e4m3fn, numel, "row");
  set(params.out_t, transposed, ScalarType::Float8_e4m3fn, numel, "transposed");
  set(params.amax, amax, ScalarType::Float, batch, "amax");
  params.batch = batch, params.rows = rows, params.cols = cols;
  params.beta2 = beta2, params.cautious = cautious, params.nearest = nearest;
  params.weight_dtype = dtype_of(weight, kOp, "weight");
  params.o_dtype = dtype_of(o, kOp, "o");
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_launch(launch_normuon_step(params, current_stream(device)), kOp);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(speedrun, CUDA, m) {
  m.impl("normuon_step_out", TORCH_BOX(&normuon_step_out));
}

}  // namespace speedrun
