// speedrun::attention_epilogue_out and speedrun::attention_epilogue_bwd_out on CUDA tensors.
// Schemas: python/speedrun/ops/attention_epilogue.py, which also says what the tensors are.
#include "kernels/attention_epilogue.h"

#include <optional>

#include "torch_utils.h"

namespace speedrun {
namespace {

using OptionalTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;

// What both operators take. Pointers to tensors of y's type.
struct Call {
  const char* op;
  ScalarType type;
  int32_t device;
  AttentionEpilogueInputs in{};

  Call(const Tensor& y, const OptionalTensor& v, const OptionalTensor& alpha,
       const OptionalTensor& gate, const char* op)
      : op(op), type(y.scalar_type()), device(y.get_device_index()) {
    check_cuda(y, op, "y");
    STD_TORCH_CHECK(y.dim() == 3, op, ": y must be (T, H, E)");
    in.tokens = y.size(0), in.heads = y.size(1), in.dim = y.size(2);
    in.dtype = dtype_of(y, op, "y");
    in.y = data(y, in.dim, "y");
    in.v = optional_data(v, in.dim, "v");
    in.alpha = by_token(alpha, in.alpha_token_stride, in.alpha_head_stride, "xsa");
    in.gate = by_token(gate, in.gate_token_stride, in.gate_head_stride, "gate");
    STD_TORCH_CHECK(in.v || !in.alpha, op, ": xsa needs v");
  }

  void* data(const Tensor& tensor, int64_t width, const char* name) const {
    return data_of(tensor, type, in.tokens * in.heads * width, device, op, name);
  }
  void* optional_data(const OptionalTensor& tensor, int64_t width, const char* name) const {
    return tensor ? data(*tensor, width, name) : nullptr;
  }
  const void* by_token(const OptionalTensor& tensor, int64_t& token_stride, int64_t& head_stride,
                       const char* name) const {
    if (!tensor) return nullptr;
    check_cuda(*tensor, op, name);
    STD_TORCH_CHECK(tensor->dim() == 2 && tensor->size(0) == in.tokens &&
                        tensor->size(1) == in.heads && tensor->scalar_type() == type &&
                        tensor->get_device_index() == device,
                    op, ": ", name, " must be (T, H), of y's type and device");
    token_stride = tensor->stride(0), head_stride = tensor->stride(1);
    return tensor->const_data_ptr();
  }
};

void attention_epilogue_out(const Tensor& y, OptionalTensor v, OptionalTensor xsa,
                            OptionalTensor gate, OptionalTensor scale, Tensor out,
                            OptionalTensor out_f8, OptionalTensor amax) {
  const Call call(y, v, xsa, gate, "attention_epilogue_out");
  AttentionEpilogueParams params{call.in, call.data(out, call.in.dim, "out"), nullptr, nullptr,
                                 nullptr};
  STD_TORCH_CHECK(out_f8.has_value() == scale.has_value() && scale.has_value() == amax.has_value(),
                  call.op, ": scale, out_f8 and amax come together");
  if (out_f8) {
    const auto number = [&](const Tensor& tensor, const char* name) {
      return static_cast<float*>(data_of(tensor, ScalarType::Float, 1, call.device, call.op, name));
    };
    params.scale = number(*scale, "scale");
    params.amax = number(*amax, "amax");
    params.out_f8 = static_cast<uint8_t*>(
        data_of(*out_f8, ScalarType::Float8_e4m3fn, y.numel(), call.device, call.op, "out_f8"));
  }
  const torch::stable::accelerator::DeviceGuard guard(call.device);
  check_launch(launch_attention_epilogue(params, current_stream(call.device)), call.op);
}

void attention_epilogue_bwd_out(const Tensor& y, OptionalTensor v, OptionalTensor xsa,
                                OptionalTensor gate, const Tensor& grad, Tensor dy,
                                OptionalTensor dv, OptionalTensor dxsa, OptionalTensor dgate) {
  const Call call(y, v, xsa, gate, "attention_epilogue_bwd_out");
  const int64_t dim = call.in.dim;
  const AttentionEpilogueBwdParams params{call.in,
                                          call.data(grad, dim, "grad"),
                                          call.data(dy, dim, "dy"),
                                          call.optional_data(dv, dim, "dv"),
                                          call.optional_data(dxsa, 1, "dxsa"),
                                          call.optional_data(dgate, 1, "dgate")};
  // Tensors without elements have no addresses, their gradients neither.
  STD_TORCH_CHECK(
      (!call.in.alpha || (params.dv && params.dalpha)) && (!call.in.gate || params.dgate), call.op,
      ": dv and dxsa are needed with xsa, dgate with gate");
  const torch::stable::accelerator::DeviceGuard guard(call.device);
  check_launch(launch_attention_epilogue_bwd(params, current_stream(call.device)), call.op);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(speedrun, CUDA, m) {
  m.impl("attention_epilogue_out", TORCH_BOX(&attention_epilogue_out));
  m.impl("attention_epilogue_bwd_out", TORCH_BOX(&attention_epilogue_bwd_out));
}

}  // namespace speedrun
