// speedrun::sym_matmul_out on CUDA tensors. Schema: python/speedrun/ops/sym_matmul.py.
#include "kernels/sym_matmul.h"

#include <optional>

#include "torch_utils.h"

namespace speedrun {
namespace {

constexpr char kOp[] = "sym_matmul_out";

void check_like(const Tensor& tensor, const char* name, const Tensor& a, int64_t rows,
                int64_t cols) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == a.get_device_index() &&
                      tensor.scalar_type() == a.scalar_type(),
                  kOp, ": ", name, " must be of a's type and on its device");
  STD_TORCH_CHECK(tensor.dim() == 3 && tensor.size(0) == a.size(0) && tensor.size(1) == rows &&
                      tensor.size(2) == cols && (cols <= 1 || tensor.stride(2) == 1),
                  kOp, ": ", name, " must be a batch of ", a.size(0), " matrices of ", rows, " x ",
                  cols, " elements, contiguous in the last dimension");
}

// a and b (B, N, K), or a (B, K, N) and b = a if transposed; c and out (B, N, N)
void sym_matmul_out(const Tensor& a, const Tensor& b, const std::optional<Tensor>& c, Tensor out,
                    bool transposed, double alpha, double beta) {
  check_cuda(a, kOp, "a");
  STD_TORCH_CHECK(a.dim() == 3, kOp, ": a must have three dimensions");
  SymMatmulParams params{};
  params.batch = a.size(0);
  params.n = a.size(transposed ? 2 : 1);
  params.k = a.size(transposed ? 1 : 2);
  check_like(a, "a", a, a.size(1), a.size(2));
  check_like(b, "b", a, a.size(1), a.size(2));
  check_like(out, "out", a, params.n, params.n);
  params.a = a.const_data_ptr();
  params.b = b.const_data_ptr();
  params.out = out.mutable_data_ptr();
  params.a_batch_stride = a.stride(0);
  params.a_row_stride = a.stride(1);
  params.b_batch_stride = b.stride(0);
  params.b_row_stride = b.stride(1);
  params.out_batch_stride = out.stride(0);
  params.out_row_stride = out.stride(1);
  if (c) {
    check_like(*c, "c", a, params.n, params.n);
    params.c = c->const_data_ptr();
    params.c_batch_stride = c->stride(0);
    params.c_row_stride = c->stride(1);
  }
  params.dtype = dtype_of(a, kOp, "a");
  params.transposed = transposed;
  params.alpha = static_cast<float>(alpha);
  params.beta = static_cast<float>(beta);
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  const cudaError_t error = launch_sym_matmul(params, current_stream(a.get_device_index()));
  STD_TORCH_CHECK(error != cudaErrorInvalidValue, kOp,
                  ": float16 and bfloat16 only, K at least 1, c where beta is not 0, and addresses "
                  "and the bytes of strides multiples of 16");
  check_launch(error, kOp);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(speedrun, CUDA, m) {
  m.impl("sym_matmul_out", TORCH_BOX(&sym_matmul_out));
}

}  // namespace speedrun
