// speedrun::fp8_quantize_out and its relatives on CUDA tensors. Schemas:
// python/speedrun/ops/fp8_quantize.py, which also says what the tensors are.
#include "kernels/fp8_quantize.h"

#include <initializer_list>
#include <optional>

#include "torch_utils.h"

namespace speedrun {
namespace {

using OptionalTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;

template <typename T>
T* optional_data(const OptionalTensor& tensor, ScalarType type, int64_t numel, int32_t device,
                 const char* op, const char* name) {
  return tensor ? static_cast<T*>(data_of(*tensor, type, numel, device, op, name)) : nullptr;
}

// What quantising x (M, N) or (B, M, N) takes, with or without a norm before it.
Fp8QuantizeParams quantize_params(const Tensor& x, const Tensor& scale, const Tensor& out,
                                  const OptionalTensor& out_t, const char* op) {
  check_cuda(x, op, "x");
  const int64_t dim = x.dim();
  STD_TORCH_CHECK((dim == 2 || dim == 3) && (x.stride(-1) == 1 || x.size(-1) <= 1), op,
                  ": x must be (M, N) or (B, M, N) with a contiguous last dimension");
  const int32_t device = x.get_device_index();
  const ScalarType type = out.scalar_type();
  Fp8QuantizeParams params{};
  params.x = x.const_data_ptr();
  params.scale =
      static_cast<const float*>(data_of(scale, ScalarType::Float, 1, device, op, "scale"));
  params.out = static_cast<uint8_t*>(data_of(out, type, x.numel(), device, op, "out"));
  params.out_t = optional_data<uint8_t>(out_t, type, x.numel(), device, op, "out_t");
  params.batch = dim == 3 ? x.size(0) : 1;
  params.rows = x.size(-2);
  params.cols = x.size(-1);
  params.x_batch_stride = dim == 3 ? x.stride(0) : 0;
  params.x_row_stride = x.stride(-2);
  params.x_dtype = dtype_of(x, op, "x");
  params.out_dtype = dtype_of(out, op, "out");
  return params;
}

void fp8_quantize_out(const Tensor& x, const Tensor& scale, Tensor out, OptionalTensor out_t,
                      OptionalTensor amax) {
  constexpr char kOp[] = "fp8_quantize_out";
  Fp8QuantizeParams params = quantize_params(x, scale, out, out_t, kOp);
  const int32_t device = x.get_device_index();
  params.amax = optional_data<float>(amax, ScalarType::Float, 1, device, kOp, "amax");
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_launch(launch_fp8_quantize(params, current_stream(device)), kOp);
}

void rms_norm_fp8_quantize_out(const Tensor& x, const Tensor& scale, double eps, OptionalTensor y,
                               Tensor out, OptionalTensor out_t) {
  constexpr char kOp[] = "rms_norm_fp8_quantize_out";
  Fp8QuantizeParams params = quantize_params(x, scale, out, out_t, kOp);
  const int32_t device = x.get_device_index();
  params.y = optional_data<void>(y, ScalarType::BFloat16, x.numel(), device, kOp, "y");
  params.eps = static_cast<float>(eps);
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_launch(launch_rms_norm_fp8_quantize(params, current_stream(device)), kOp);
}

void fp8_refresh_out(const Tensor& bank, const Tensor& down_amax, bool headroom, Tensor up,
                     OptionalTensor up_t, OptionalTensor down, Tensor down_t, Tensor scales,
                     Tensor amax, Tensor progress) {
  constexpr char kOp[] = "fp8_refresh_out";
  check_cuda(bank, kOp, "bank");
  STD_TORCH_CHECK(bank.dim() == 3 && bank.size(0) % 2 == 0, kOp, ": bank must be (2L, F, D)");
  const int32_t device = bank.get_device_index();
  const int64_t layers = bank.size(0) / 2, half = bank.numel() / 2;
  const auto floats = [&](const Tensor& tensor, int64_t numel, const char* name) {
    return static_cast<float*>(data_of(tensor, ScalarType::Float, numel, device, kOp, name));
  };
  const auto codes = [&](const OptionalTensor& tensor, const char* name) {
    return optional_data<uint8_t>(tensor, ScalarType::Float8_e4m3fn, half, device, kOp, name);
  };
  Fp8RefreshParams params;
  params.bank = data_of(bank, ScalarType::BFloat16, 2 * half, device, kOp, "bank");
  params.down_amax = floats(down_amax, layers, "down_amax");
  params.up = codes(up, "up");
  params.up_t = codes(up_t, "up_t");
  params.down = codes(down, "down");
  params.down_t = codes(down_t, "down_t");
  params.scales = floats(scales, 2 * layers, "scales");
  params.amax = reinterpret_cast<uint32_t*>(floats(amax, 2 * layers, "amax"));
  params.progress = static_cast<int32_t*>(
      data_of(progress, ScalarType::Int, 1 + 2 * layers, device, kOp, "progress"));
  params.layers = layers;
  params.rows = bank.size(1);
  params.cols = bank.size(2);
  params.headroom = headroom;
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_launch(launch_fp8_refresh(params, current_stream(device)), kOp);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(speedrun, CUDA, m) {
  m.impl("fp8_quantize_out", TORCH_BOX(&fp8_quantize_out));
  m.impl("rms_norm_fp8_quantize_out", TORCH_BOX(&rms_norm_fp8_quantize_out));
  m.impl("fp8_refresh_out", TORCH_BOX(&fp8_refresh_out));
}

}  // namespace speedrun
