// speedrun::relu2_up_out and drelu2_out on CUDA tensors. Schemas:
// python/speedrun/ops/_relu2_mlp_kernels.py.
#include "kernels/relu2_mlp.h"

#include "torch_utils.h"

namespace speedrun {
namespace {

// The stride of the rows of a bf16 matrix (rows, cols), which are contiguous.
int64_t stride_of(const Tensor& tensor, const char* op, const char* name, int64_t rows,
                  int64_t cols) {
  check_cuda(tensor, op, name);
  STD_TORCH_CHECK(tensor.scalar_type() == torch::headeronly::ScalarType::BFloat16, op, ": ", name,
                  " must be bfloat16");
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == cols, op, ": ",
                  name, " must be a matrix of ", rows, " x ", cols, " elements");
  STD_TORCH_CHECK(tensor.stride(1) == 1, op, ": the rows of ", name, " must be contiguous");
  return tensor.stride(0);
}

void check_tma_launch(cudaError_t error, const char* op) {
  STD_TORCH_CHECK(error != cudaErrorInvalidValue, op,
                  ": addresses and the bytes of rows must be multiples of 16, and D at least 1");
  check_launch(error, op);
}

// h (T, D), up (F, D) -> post (T, F)
void relu2_up_out(const Tensor& h, const Tensor& up, Tensor post) {
  constexpr char kOp[] = "relu2_up_out";
  STD_TORCH_CHECK(h.dim() == 2 && up.dim() == 2, kOp, ": h and up must be matrices");
  Relu2UpParams params;
  params.tokens = h.size(0);
  params.dim = h.size(1);
  params.hidden = up.size(0);
  params.h_stride = stride_of(h, kOp, "h", params.tokens, params.dim);
  params.up_stride = stride_of(up, kOp, "up", params.hidden, params.dim);
  params.post_stride = stride_of(post, kOp, "post", params.tokens, params.hidden);
  params.h = h.const_data_ptr();
  params.up = up.const_data_ptr();
  params.post = post.mutable_data_ptr();
  const torch::stable::accelerator::DeviceGuard guard(h.get_device_index());
  check_tma_launch(launch_relu2_up(params, current_stream(h.get_device_index())), kOp);
}

// grad (T, D), down (F, D), post (T, F) -> dpre (T, F)
void drelu2_out(const Tensor& grad, const Tensor& down, const Tensor& post, Tensor dpre) {
  constexpr char kOp[] = "drelu2_out";
  STD_TORCH_CHECK(grad.dim() == 2 && down.dim() == 2, kOp, ": grad and down must be matrices");
  Drelu2Params params;
  params.tokens = grad.size(0);
  params.dim = grad.size(1);
  params.hidden = down.size(0);
  params.grad_stride = stride_of(grad, kOp, "grad", params.tokens, params.dim);
  params.down_stride = stride_of(down, kOp, "down", params.hidden, params.dim);
  params.post_stride = stride_of(post, kOp, "post", params.tokens, params.hidden);
  params.dpre_stride = stride_of(dpre, kOp, "dpre", params.tokens, params.hidden);
  params.grad = grad.const_data_ptr();
  params.down = down.const_data_ptr();
  params.post = post.const_data_ptr();
  params.dpre = dpre.mutable_data_ptr();
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  check_tma_launch(launch_drelu2(params, current_stream(grad.get_device_index())), kOp);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(speedrun, CUDA, m) {
  m.impl("relu2_up_out", TORCH_BOX(&relu2_up_out));
  m.impl("drelu2_out", TORCH_BOX(&drelu2_out));
}

}  // namespace speedrun
