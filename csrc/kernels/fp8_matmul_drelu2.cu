// fp8_matmul_drelu2. Tile choice: kernels/fp8_matmul_tiles.h.
#include "kernels/fp8_matmul.cuh"

namespace speedrun {
namespace {

using BF16 = sm90::Element<DType::kBFloat16>;
using E4M3 = sm90::Element<DType::kFloat8E4M3>;
using E5M2 = sm90::Element<DType::kFloat8E5M2>;
using sm90::fusion::Sm90EVT;
using sm90::fusion::Sm90SrcFetch;

// ---- 3. Kernels ------------------------------------------------------------------------------

struct Drelu2 : Fp8Row<kDrelu2, BF16> {
  using Kernel =
      GemmKernel<sm90::Apply<sm90::TimesRelu2Slope, BF16, Fp8Scaled<float>, Sm90SrcFetch<BF16>>>;
  static sm90::FusionArguments<Kernel> fusion(const Fp8MatmulDrelu2Params& p) {
    return {fp8_scaled<float>(p.in), {}, {}};
  }
};

struct Drelu2Fp8 : Fp8Row<kDrelu2Fp8, E4M3> {
  using Post = sm90::Apply<cutlass::multiplies, float, sm90::Scalar, Sm90SrcFetch<E4M3>>;
  using Dpre = sm90::Apply<sm90::TimesRelu2Slope, float, Fp8Scaled<float>, Post>;
  using Quantised =
      sm90::Apply<cutlass::multiplies, E5M2, sm90::Reciprocal, Sm90EVT<sm90::AbsMax, Dpre>>;
  using Kernel = GemmKernel<Shape::AlsoStore<E5M2, sm90::ColumnMajor, Quantised>>;
  static sm90::FusionArguments<Kernel> fusion(const Fp8MatmulDrelu2Params& p) {
    typename Dpre::Arguments dpre{
        fp8_scaled<float>(p.in), {sm90::scalar(p.post_scale), {}, {}}, {}};
    return {{sm90::reciprocal(p.out_scale), {dpre, {p.amax}}, {}},
            {static_cast<E5M2*>(p.dpre_t), cute::make_stride(sm90::_1{}, p.in.m, int64_t{0})}};
  }
};

// ---- 4. Launcher -----------------------------------------------------------------------------

template <class Spec>
cudaError_t launch(const Fp8MatmulDrelu2Params& p, int num_sms, cudaStream_t stream) {
  const sm90::Problem problem = fp8_problem(p.in, {p.dpre, p.in.n, 0}, {p.post, p.in.n, 0});
  return launch_fp8<Spec>(problem, Spec::fusion(p), num_sms, stream);
}

}  // namespace

cudaError_t launch_fp8_matmul_drelu2(const Fp8MatmulDrelu2Params& p, cudaStream_t stream) {
  cudaError_t error;
  if (is_done(p.in, &error)) return error;
  const bool fp8 = p.out_scale != nullptr;
  if (p.in.batch != 1 || (p.post_scale != nullptr) != fp8 ||
      (!fp8 && (p.dpre_t != nullptr || p.amax != nullptr)) ||
      (p.dpre_t != nullptr && !sm90::is_aligned({p.dpre_t, p.in.m, 0}, 1))) {
    return cudaErrorInvalidValue;
  }
  int num_sms;
  error = sm90::count_sms(&num_sms);
  if (error != cudaSuccess) return error;
  switch (choose_fp8_kernel(Fp8Epilogue::kDrelu2, p.in.a_dtype, p.in.b_dtype,
                            fp8 ? DType::kFloat8E5M2 : DType::kBFloat16, p.in.fast_accum, p.in.m,
                            p.in.n, 1, num_sms)) {
    case kDrelu2:
      return launch<Drelu2>(p, num_sms, stream);
    case kDrelu2Fp8:
      return launch<Drelu2Fp8>(p, num_sms, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace speedrun
