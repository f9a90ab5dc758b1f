// speedrun::qk_norm_rope_out and speedrun::qk_norm_rope_bwd_out on CUDA tensors. Schemas:
// python/speedrun/ops/qk_norm_rope.py, which also says what the tensors are.
#include "kernels/qk_norm_rope.h"

#include <optional>

#include "torch_utils.h"

namespace speedrun {
namespace {

using OptionalTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;

// What both operators take. Pointers to tensors of qkv's type.
struct Call {
  const char* op;
  ScalarType type;
  int32_t device;
  QkNormRopeInputs in{};

  Call(const Tensor& qkv, const Tensor& cos, const Tensor& sin, int64_t num_heads, bool offset_keys,
       const OptionalTensor& first, const OptionalTensor& ve, const OptionalTensor& gate,
       const char* op)
      : op(op), type(qkv.scalar_type()), device(qkv.get_device_index()) {
    check_cuda(qkv, op, "qkv");
    STD_TORCH_CHECK(qkv.dim() == 3 && cos.dim() == 3 && num_heads > 0, op,
                    ": qkv must be (P, T, N) and cos (T, 1 or H, K/4)");
    in.part_tokens = qkv.size(1);
    in.tokens = qkv.size(0) * in.part_tokens;
    in.heads = num_heads;
    in.head_dim = 4 * cos.size(2);
    in.value_dim = qkv.size(2) / num_heads - 2 * in.head_dim;
    in.table_heads = cos.size(1);
    in.eps = 0x1p-23f;  // reference/qk_norm_rope.py
    in.offset_keys = offset_keys;
    in.dtype = dtype_of(qkv, op, "qkv");
    in.qkv = data(qkv, in.heads * (2 * in.head_dim + in.value_dim), "qkv");
    const int64_t table = in.part_tokens * in.table_heads * cos.size(2);
    in.cos = data_of(cos, type, table, device, op, "cos");
    in.sin = data_of(sin, type, table, device, op, "sin");
    if (first) {
      in.first = static_cast<const bool*>(
          data_of(*first, ScalarType::Bool, in.tokens, device, op, "first"));
    }
    in.ve = optional_data(ve, in.heads * in.value_dim, "ve");
    in.gate = optional_data(gate, in.heads, "ve_gate");
    STD_TORCH_CHECK(in.ve || !in.gate, op, ": a gate needs ve");
  }

  void* data(const Tensor& tensor, int64_t width, const char* name) const {
    return data_of(tensor, type, in.tokens * width, device, op, name);
  }
  void* optional_data(const OptionalTensor& tensor, int64_t width, const char* name) const {
    return tensor ? data(*tensor, width, name) : nullptr;
  }
};

void qk_norm_rope_out(const Tensor& qkv, const Tensor& cos, const Tensor& sin, int64_t num_heads,
                      bool offset_keys, OptionalTensor first, OptionalTensor ve,
                      OptionalTensor gate, Tensor q, Tensor k, Tensor v) {
  const Call call(qkv, cos, sin, num_heads, offset_keys, first, ve, gate, "qk_norm_rope_out");
  const int64_t width = call.in.heads * call.in.head_dim,
                v_width = call.in.heads * call.in.value_dim;
  const QkNormRopeParams params{call.in, call.data(q, width, "q"), call.data(k, width, "k"),
                                call.data(v, v_width, "v")};
  const torch::stable::accelerator::DeviceGuard guard(call.device);
  check_launch(launch_qk_norm_rope(params, current_stream(call.device)), call.op);
}

void qk_norm_rope_bwd_out(const Tensor& qkv, const Tensor& cos, const Tensor& sin,
                          int64_t num_heads, bool offset_keys, OptionalTensor first,
                          OptionalTensor ve, OptionalTensor gate, const Tensor& dq,
                          const Tensor& dk, const Tensor& dv, Tensor dqkv, OptionalTensor dve,
                          OptionalTensor dgate) {
  const Call call(qkv, cos, sin, num_heads, offset_keys, first, ve, gate, "qk_norm_rope_bwd_out");
  const int64_t width = call.in.heads * call.in.head_dim,
                v_width = call.in.heads * call.in.value_dim;
  QkNormRopeBwdParams params{call.in,
                             call.data(dq, width, "dq"),
                             call.data(dk, width, "dk"),
                             call.data(dv, v_width, "dv"),
                             call.data(dqkv, 2 * width + v_width, "dqkv"),
                             call.optional_data(dve, v_width, "dve"),
                             call.optional_data(dgate, call.in.heads, "dve_gate")};
  STD_TORCH_CHECK(!params.in.gate || (params.dve && params.dgate), call.op,
                  ": with a gate dve and dve_gate are needed");
  const torch::stable::accelerator::DeviceGuard guard(call.device);
  check_launch(launch_qk_norm_rope_bwd(params, current_stream(call.device)), call.op);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(speedrun, CUDA, m) {
  m.impl("qk_norm_rope_out", TORCH_BOX(&qk_norm_rope_out));
  m.impl("qk_norm_rope_bwd_out", TORCH_BOX(&qk_norm_rope_bwd_out));
}

}  // namespace speedrun
