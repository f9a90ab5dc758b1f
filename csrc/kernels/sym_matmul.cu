// sym_matmul in bf16, and the launcher. Tile choice: kernels/sym_matmul_tiles.h; the kernel:
// kernels/sym_matmul.cuh.
#include "kernels/sym_matmul.cuh"

namespace speedrun {

cudaError_t launch_sym_matmul(const SymMatmulParams& p, cudaStream_t stream) {
  if (p.batch < 0 || p.n < 0 || p.k <= 0) return cudaErrorInvalidValue;
  if (p.transposed && (p.b != p.a || p.b_row_stride != p.a_row_stride)) {
    return cudaErrorInvalidValue;
  }
  if (p.beta != 0.f && p.c == nullptr) return cudaErrorInvalidValue;
  if (p.batch == 0 || p.n == 0) return cudaSuccess;
  int num_sms;
  const cudaError_t error = sm90::count_sms(&num_sms);
  if (error != cudaSuccess) return error;
  switch (p.dtype) {
    case DType::kBFloat16:
      return launch_sym_matmul_of<sm90::Element<DType::kBFloat16>>(p, num_sms, stream);
    case DType::kFloat16:
      return launch_sym_matmul_fp16(p, num_sms, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace speedrun
