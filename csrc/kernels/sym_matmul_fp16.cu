// sym_matmul in fp16.
#include "kernels/sym_matmul.cuh"

namespace speedrun {

cudaError_t launch_sym_matmul_fp16(const SymMatmulParams& params, int num_sms,
                                   cudaStream_t stream) {
  return launch_sym_matmul_of<sm90::Element<DType::kFloat16>>(params, num_sms, stream);
}

}  // namespace speedrun
