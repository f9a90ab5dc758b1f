// What the FP8 GEMMs share: types of a row of the table, scaled sums, the kernel, its launch.
#pragma once

#include "common/sm90.cuh"
#include "kernels/fp8_matmul.h"
#include "kernels/fp8_matmul_tiles.h"

namespace speedrun {

// Types of row `kId` of the table; C: of the matrix that its epilogue reads, or void.
template <Fp8KernelId kId, class C = void>
struct Fp8Row {
  static constexpr Fp8Kernel kRow = fp8_kernel(kId);
  using A = sm90::Element<kRow.a>;
  using B = sm90::Element<kRow.b>;
  using D = sm90::Element<kRow.out>;
  using Shape = sm90::Shape<kRow.tile_m, kRow.tile_n, kRow.cluster_m, kRow.pingpong, C, D>;
  template <class Fusion>
  using GemmKernel = typename sm90::Gemm<Shape, A, B, Fusion, kRow.fast_accum,
                                         kRow.epilogue == Fp8Epilogue::kAdd>::Kernel;
};

// s of kernels/fp8_matmul.h, rounded to Out.
template <class Out>
using Fp8Scaled =
    sm90::Apply<cutlass::multiplies, Out, sm90::ScalarProduct, sm90::fusion::Sm90AccFetch>;

template <class Out>
typename Fp8Scaled<Out>::Arguments fp8_scaled(const Fp8Operands& in) {
  return {sm90::scalar_product(in.scale_a, in.scale_b), {}, {}};
}

// Spec::Kernel is what runs; the rest is for its name in profiles.
template <class Spec, int kTileM, int kTileN, int kStages, int kSharedBytes>
__global__ void __launch_bounds__(Spec::Kernel::MaxThreadsPerBlock, 1)
    fp8_matmul_kernel(CUTLASS_GRID_CONSTANT typename Spec::Kernel::Params const params) {
  extern __shared__ char shared[];
  typename Spec::Kernel{}(params, shared);
}

// The matrices of a product: `out` and what the epilogue reads (`c`), if it does, are (m, n).
inline sm90::Problem fp8_problem(const Fp8Operands& in, sm90::Matrix out, sm90::Matrix c = {}) {
  sm90::Problem problem;
  problem.m = in.m;
  problem.n = in.n;
  problem.k = in.k;
  problem.batch = in.batch;
  problem.a = {in.a, in.a_row_stride, in.a_batch_stride};
  problem.b = {in.b, in.b_row_stride, in.b_batch_stride};
  problem.c = c;
  problem.d = out;
  problem.strip = choose_strip(in.m, in.n);
  return problem;
}

template <class Spec>
cudaError_t launch_fp8(const sm90::Problem& problem,
                       const sm90::FusionArguments<typename Spec::Kernel>& fusion, int num_sms,
                       cudaStream_t stream) {
  using Kernel = typename Spec::Kernel;
  return sm90::launch<Kernel>(fp8_matmul_kernel<Spec, sm90::kTileM<Kernel>, sm90::kTileN<Kernel>,
                                                sm90::kStages<Kernel>, sm90::kSharedBytes<Kernel>>,
                              problem, fusion, num_sms, stream);
}

// Whether there is nothing to do, or (error) nothing that could be done.
inline bool is_done(const Fp8Operands& in, cudaError_t* error) {
  const bool valid = in.batch >= 0 && in.m >= 0 && in.n >= 0 && in.k > 0;
  *error = valid ? cudaSuccess : cudaErrorInvalidValue;
  return !valid || in.batch == 0 || in.m == 0 || in.n == 0;
}

// launch_fp8_matmul for fp32 outputs; `id` is the row that serves it.
cudaError_t launch_fp8_matmul_add(int id, const Fp8MatmulParams& params, int num_sms,
                                  cudaStream_t stream);

}  // namespace speedrun
