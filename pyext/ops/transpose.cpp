// speedrun::transpose_out on CUDA tensors. Schema: python/speedrun/ops/transpose.py.
#include "kernels/transpose.h"

#include "torch_utils.h"

namespace speedrun {
namespace {

constexpr char kOp[] = "transpose_out";

// x (..., M, N) and out (..., N, M) with at most one batch dimension, last dimensions contiguous.
void transpose_out(const Tensor& x, Tensor out, bool add) {
  check_cuda(x, kOp, "x");
  check_cuda(out, kOp, "out");
  const int64_t dim = x.dim();
  STD_TORCH_CHECK((dim == 2 || dim == 3) && out.dim() == dim, kOp,
                  ": x and out must both have 2 or 3 dimensions, got ", dim, " and ", out.dim());
  const bool batched = dim == 3;
  const int64_t batch = batched ? x.size(0) : 1, rows = x.size(-2), cols = x.size(-1);
  STD_TORCH_CHECK(
      out.size(-2) == cols && out.size(-1) == rows && (!batched || out.size(0) == batch), kOp,
      ": out must have the shape of x with the last two sizes swapped");
  STD_TORCH_CHECK((x.stride(-1) == 1 || cols <= 1) && (out.stride(-1) == 1 || rows <= 1), kOp,
                  ": the last dimensions of x and out must be contiguous");
  STD_TORCH_CHECK(x.scalar_type() == out.scalar_type(), kOp, ": x and out must have one type");
  STD_TORCH_CHECK(x.get_device_index() == out.get_device_index(), kOp,
                  ": x and out must be on one device");

  TransposeParams params;
  params.in = x.const_data_ptr();
  params.out = out.mutable_data_ptr();
  params.batch = batch;
  params.rows = rows;
  params.cols = cols;
  params.in_batch_stride = batched ? x.stride(0) : 0;
  params.in_row_stride = x.stride(-2);
  params.out_batch_stride = batched ? out.stride(0) : 0;
  params.out_row_stride = out.stride(-2);
  params.dtype = dtype_of(x, kOp, "x");
  params.add = add;

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_launch(launch_transpose(params, current_stream(x.get_device_index())), kOp);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(speedrun, CUDA, m) { m.impl("transpose_out", TORCH_BOX(&transpose_out)); }

}  // namespace speedrun
