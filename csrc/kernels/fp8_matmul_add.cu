// fp8_matmul, outputs in fp32: gradients of weights, K cut in parts that are added on their own.
// Tile choice and number of parts: kernels/fp8_matmul_tiles.h.
#include "kernels/fp8_matmul.cuh"

namespace speedrun {
namespace {

// ---- 3. Kernels ------------------------------------------------------------------------------

template <Fp8KernelId kId>
struct Add : Fp8Row<kId> {
  using Kernel = typename Fp8Row<kId>::template GemmKernel<Fp8Scaled<float>>;
};
struct AddToE5m2 : Add<kAddToE5m2> {};
struct AddE5m2 : Add<kAddE5m2> {};

// ---- 4. Launcher -----------------------------------------------------------------------------

template <class Spec>
cudaError_t launch(const Fp8MatmulParams& p, int num_sms, cudaStream_t stream) {
  sm90::Problem problem = fp8_problem(p.in, {p.out, p.out_row_stride, 0});
  const int splits = choose_fp8_splits(Spec::kRow, p.in.m, p.in.n, p.in.k, num_sms);
  problem.k = p.in.k / splits;
  problem.batch = splits;
  problem.a.batch_stride = problem.b.batch_stride = splits > 1 ? problem.k : 0;
  return launch_fp8<Spec>(problem, fp8_scaled<float>(p.in), num_sms, stream);
}

}  // namespace

cudaError_t launch_fp8_matmul_add(int id, const Fp8MatmulParams& p, int num_sms,
                                  cudaStream_t stream) {
  if (p.in.batch != 1) return cudaErrorInvalidValue;
  if (!p.accumulate) {
    const cudaError_t error = cudaMemset2DAsync(p.out, p.out_row_stride * sizeof(float), 0,
                                                p.in.n * sizeof(float), p.in.m, stream);
    if (error != cudaSuccess) return error;
  }
  return id == kAddToE5m2 ? launch<AddToE5m2>(p, num_sms, stream)
                          : launch<AddE5m2>(p, num_sms, stream);
}

}  // namespace speedrun
