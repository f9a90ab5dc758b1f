#include "common/sm90.cuh"
#include "kernels/relu2_mlp.h"

namespace speedrun {
namespace {

using BF16 = sm90::Element<DType::kBFloat16>;
using sm90::fusion::Sm90AccFetch;
using sm90::fusion::Sm90SrcFetch;

// ---- 1. Tile choice --------------------------------------------------------------------------
// Not yet measured: the reasons are arithmetic, for H100 and H200.

// 128 x 256: per clock the tensor cores then read 80 bytes of shared memory and TMA writes 48, just
// the 128 that it can do; 128 x 128 would need 160. 128 sums a thread, so nothing is spilled.
// Clusters of two along the tokens: each thread block loads half of the weights' tile, 32 bytes a
// clock from L2 instead of 48. C has D's type, so that they share their buffers: four steps of K.
template <class C>
using Shape = sm90::Shape<128, 256, 2, false, C, BF16>;

// ---- 3. Kernels ------------------------------------------------------------------------------

template <class C, class Fusion>
struct Bf16Gemm {
  using Kernel = typename sm90::Gemm<Shape<C>, BF16, BF16, Fusion, false>::Kernel;
};

struct Relu2Up
    : Bf16Gemm<void,
               sm90::Apply<sm90::ReluSquared, BF16,
                           sm90::Apply<cutlass::epilogue::thread::Identity, BF16, Sm90AccFetch>>> {
};
struct Drelu2
    : Bf16Gemm<BF16, sm90::Apply<sm90::TimesRelu2Slope, BF16, Sm90AccFetch, Sm90SrcFetch<BF16>>> {};

// Spec::Kernel is what runs; the rest is for its name in profiles.
template <class Spec, int kTileM, int kTileN, int kStages, int kSharedBytes>
__global__ void __launch_bounds__(Spec::Kernel::MaxThreadsPerBlock, 1)
    relu2_mlp_kernel(CUTLASS_GRID_CONSTANT typename Spec::Kernel::Params const params) {
  extern __shared__ char shared[];
  typename Spec::Kernel{}(params, shared);
}

// ---- 4. Launchers ----------------------------------------------------------------------------

template <class Spec>
cudaError_t launch(int64_t tokens, int64_t hidden, int64_t dim, sm90::Matrix a, sm90::Matrix b,
                   sm90::Matrix c, sm90::Matrix d, cudaStream_t stream) {
  if (tokens < 0 || hidden < 0 || dim <= 0) return cudaErrorInvalidValue;
  if (tokens == 0 || hidden == 0) return cudaSuccess;
  int num_sms;
  const cudaError_t error = sm90::count_sms(&num_sms);
  if (error != cudaSuccess) return error;
  // Strips of one tile: the weights (4.7 MB) stay in L2.
  const sm90::Problem problem{tokens, hidden, dim, 1, a, b, c, d, 1};
  using Kernel = typename Spec::Kernel;
  return sm90::launch<Kernel>(relu2_mlp_kernel<Spec, sm90::kTileM<Kernel>, sm90::kTileN<Kernel>,
                                               sm90::kStages<Kernel>, sm90::kSharedBytes<Kernel>>,
                              problem, {}, num_sms, stream);
}

}  // namespace

cudaError_t launch_relu2_up(const Relu2UpParams& p, cudaStream_t stream) {
  return launch<Relu2Up>(p.tokens, p.hidden, p.dim, {p.h, p.h_stride, 0}, {p.up, p.up_stride, 0},
                         {}, {p.post, p.post_stride, 0}, stream);
}

cudaError_t launch_drelu2(const Drelu2Params& p, cudaStream_t stream) {
  return launch<Drelu2>(p.tokens, p.hidden, p.dim, {p.grad, p.grad_stride, 0},
                        {p.down, p.down_stride, 0}, {p.post, p.post_stride, 0},
                        {p.dpre, p.dpre_stride, 0}, stream);
}

}  // namespace speedrun
