// speedrun::fp8_matmul_out, _relu2_out and _drelu2_out on CUDA tensors. Schemas and what is
// compiled for which types: python/speedrun/ops/fp8_matmul.py.
#include "kernels/fp8_matmul.h"

#include <optional>

#include "torch_utils.h"

namespace speedrun {
namespace {

using torch::headeronly::ScalarType;
using Optional = std::optional<Tensor>;

const float* scale_pointer(const Tensor& scale, const char* op, const char* name) {
  check_cuda(scale, op, name);
  STD_TORCH_CHECK(scale.numel() == 1 && scale.scalar_type() == ScalarType::Float, op, ": ", name,
                  " must be a float32 tensor of one element");
  return static_cast<const float*>(scale.const_data_ptr());
}

const float* scale_pointer(const Optional& scale, const char* op, const char* name) {
  return scale ? scale_pointer(*scale, op, name) : nullptr;
}

// Without a tensor there is nothing to check.
void check_matrix(const Optional& tensor, const char* op, const char* name, ScalarType type,
                  int64_t rows, int64_t cols) {
  if (!tensor) return;
  check_cuda(*tensor, op, name);
  STD_TORCH_CHECK(tensor->dim() == 2 && tensor->size(0) == rows && tensor->size(1) == cols &&
                      tensor->scalar_type() == type && tensor->is_contiguous(),
                  op, ": ", name, " must be contiguous, of ", rows, " x ", cols,
                  " elements of the type in the operator's description");
}

void* data_of(const Optional& output) { return output ? output->mutable_data_ptr() : nullptr; }

float* amax_pointer(const Optional& amax, const char* op) {
  return const_cast<float*>(scale_pointer(amax, op, "amax"));
}

// a (.., M, K) and b (.., N, K), with at most `max_dim` dimensions.
Fp8Operands operands(const Tensor& a, const Tensor& b, const Tensor& scale_a, const Tensor& scale_b,
                     bool fast_accum, const char* op, int64_t max_dim) {
  check_cuda(a, op, "a");
  check_cuda(b, op, "b");
  const int64_t dim = a.dim();
  STD_TORCH_CHECK(dim >= 2 && dim <= max_dim && b.dim() == dim, op,
                  ": a and b must be matrices, or batches where the operator takes them, got ", dim,
                  " and ", b.dim(), " dimensions");
  STD_TORCH_CHECK(a.size(-1) == b.size(-1) && (dim == 2 || a.size(0) == b.size(0)), op,
                  ": a (.., M, K) and b (.., N, K) must agree in K and in the batch");
  STD_TORCH_CHECK(a.stride(-1) == 1 && b.stride(-1) == 1, op, ": a and b must be contiguous in K");
  STD_TORCH_CHECK(a.get_device_index() == b.get_device_index(), op, ": a and b on one device");
  Fp8Operands in;
  in.a = a.const_data_ptr();
  in.b = b.const_data_ptr();
  in.scale_a = scale_pointer(scale_a, op, "scale_a");
  in.scale_b = scale_pointer(scale_b, op, "scale_b");
  in.batch = dim == 3 ? a.size(0) : 1;
  in.m = a.size(-2);
  in.n = b.size(-2);
  in.k = a.size(-1);
  in.a_batch_stride = dim == 3 ? a.stride(0) : 0;
  in.a_row_stride = a.stride(-2);
  in.b_batch_stride = dim == 3 ? b.stride(0) : 0;
  in.b_row_stride = b.stride(-2);
  in.a_dtype = dtype_of(a, op, "a");
  in.b_dtype = dtype_of(b, op, "b");
  in.fast_accum = fast_accum;
  return in;
}

void check_fp8_launch(cudaError_t error, const char* op) {
  STD_TORCH_CHECK(error != cudaErrorInvalidValue, op,
                  ": no kernel for these types and options, or an address or a row's bytes that "
                  "are not multiples of 16");
  check_launch(error, op);
}

void fp8_matmul_out(const Tensor& a, const Tensor& b, const Tensor& scale_a, const Tensor& scale_b,
                    const Optional& row_scale, const Optional& out_scale, Tensor out,
                    bool fast_accum, bool accumulate) {
  constexpr char kOp[] = "fp8_matmul_out";
  Fp8MatmulParams params;
  params.in = operands(a, b, scale_a, scale_b, fast_accum, kOp, 3);
  check_cuda(out, kOp, "out");
  const int64_t dim = a.dim();
  STD_TORCH_CHECK(out.dim() == dim && out.size(-2) == params.in.m && out.size(-1) == params.in.n &&
                      (dim == 2 || out.size(0) == params.in.batch) && out.stride(-1) == 1,
                  kOp, ": out must be (.., M, N), its last dimension contiguous");
  if (row_scale) {
    check_cuda(*row_scale, kOp, "row_scale");
    STD_TORCH_CHECK(row_scale->dim() == 1 && row_scale->size(0) == params.in.m &&
                        row_scale->is_contiguous() && row_scale->scalar_type() == ScalarType::Float,
                    kOp, ": row_scale must be (M,) of float32, contiguous");
  }
  params.row_scale = row_scale ? static_cast<const float*>(row_scale->const_data_ptr()) : nullptr;
  params.out_scale = scale_pointer(out_scale, kOp, "out_scale");
  params.out = out.mutable_data_ptr();
  params.out_batch_stride = dim == 3 ? out.stride(0) : 0;
  params.out_row_stride = out.stride(-2);
  params.out_dtype = dtype_of(out, kOp, "out");
  params.accumulate = accumulate;
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  check_fp8_launch(launch_fp8_matmul(params, current_stream(a.get_device_index())), kOp);
}

void fp8_matmul_relu2_out(const Tensor& a, const Tensor& b, const Tensor& scale_a,
                          const Tensor& scale_b, const Tensor& post_scale, Optional post,
                          Tensor post_f8, Optional post_f8_t, Tensor amax, bool fast_accum) {
  constexpr char kOp[] = "fp8_matmul_relu2_out";
  Fp8MatmulRelu2Params params;
  params.in = operands(a, b, scale_a, scale_b, fast_accum, kOp, 2);
  const int64_t m = params.in.m, n = params.in.n;
  params.post_scale = scale_pointer(post_scale, kOp, "post_scale");
  check_matrix(post, kOp, "post", ScalarType::BFloat16, m, n);
  check_matrix(post_f8, kOp, "post_f8", ScalarType::Float8_e4m3fn, m, n);
  check_matrix(post_f8_t, kOp, "post_f8_t", ScalarType::Float8_e4m3fn, n, m);
  params.post = data_of(post);
  params.post_f8 = data_of(post_f8);
  params.post_f8_t = data_of(post_f8_t);
  params.amax = amax_pointer(amax, kOp);
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  check_fp8_launch(launch_fp8_matmul_relu2(params, current_stream(a.get_device_index())), kOp);
}

void fp8_matmul_drelu2_out(const Tensor& a, const Tensor& b, const Tensor& scale_a,
                           const Tensor& scale_b, const Tensor& post, const Optional& post_scale,
                           const Optional& out_scale, Tensor dpre, Optional dpre_t, Optional amax,
                           bool fast_accum) {
  constexpr char kOp[] = "fp8_matmul_drelu2_out";
  Fp8MatmulDrelu2Params params;
  params.in = operands(a, b, scale_a, scale_b, fast_accum, kOp, 2);
  const int64_t m = params.in.m, n = params.in.n;
  const auto post_type = post_scale ? ScalarType::Float8_e4m3fn : ScalarType::BFloat16;
  const auto out_type = out_scale ? ScalarType::Float8_e5m2 : ScalarType::BFloat16;
  check_matrix(post, kOp, "post", post_type, m, n);
  check_matrix(dpre, kOp, "dpre", out_type, m, n);
  check_matrix(dpre_t, kOp, "dpre_t", ScalarType::Float8_e5m2, n, m);
  params.post = post.const_data_ptr();
  params.post_scale = scale_pointer(post_scale, kOp, "post_scale");
  params.out_scale = scale_pointer(out_scale, kOp, "out_scale");
  params.dpre = data_of(dpre);
  params.dpre_t = data_of(dpre_t);
  params.amax = amax_pointer(amax, kOp);
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  check_fp8_launch(launch_fp8_matmul_drelu2(params, current_stream(a.get_device_index())), kOp);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(speedrun, CUDA, m) {
  m.impl("fp8_matmul_out", TORCH_BOX(&fp8_matmul_out));
  m.impl("fp8_matmul_relu2_out", TORCH_BOX(&fp8_matmul_relu2_out));
  m.impl("fp8_matmul_drelu2_out", TORCH_BOX(&fp8_matmul_drelu2_out));
}

}  // namespace speedrun
