// fp8_matmul_relu2. Tile choice: kernels/fp8_matmul_tiles.h.
#include "kernels/fp8_matmul.cuh"

namespace speedrun {
namespace {

using BF16 = sm90::Element<DType::kBFloat16>;
using E4M3 = sm90::Element<DType::kFloat8E4M3>;

// ---- 3. Kernels ------------------------------------------------------------------------------

// post: the sums rounded to bf16, their relu² too, and stored; then measured and quantised.
template <class Shape>
using Post =
    typename Shape::template AlsoStore<BF16, sm90::RowMajor,
                                       sm90::Apply<sm90::ReluSquared, BF16, Fp8Scaled<BF16>>>;
template <class Shape>
using QuantisedPost = sm90::Apply<cutlass::multiplies, E4M3, sm90::Reciprocal,
                                  sm90::fusion::Sm90EVT<sm90::AbsMax, Post<Shape>>>;

template <class Shape>
typename QuantisedPost<Shape>::Arguments quantised_post(const Fp8MatmulRelu2Params& p) {
  typename Post<Shape>::Arguments post{
      {fp8_scaled<BF16>(p.in), {}},
      {static_cast<BF16*>(p.post), cute::make_stride(p.in.n, sm90::_1{}, int64_t{0})}};
  return {sm90::reciprocal(p.post_scale), {post, {p.amax}}, {}};
}

struct Relu2 : Fp8Row<kRelu2> {
  using Kernel = GemmKernel<QuantisedPost<Shape>>;
  static auto fusion(const Fp8MatmulRelu2Params& p) { return quantised_post<Shape>(p); }
};

struct Relu2Transposed : Fp8Row<kRelu2Transposed> {
  using Kernel = GemmKernel<Shape::AlsoStore<E4M3, sm90::ColumnMajor, QuantisedPost<Shape>>>;
  static sm90::FusionArguments<Kernel> fusion(const Fp8MatmulRelu2Params& p) {
    return {quantised_post<Shape>(p),
            {static_cast<E4M3*>(p.post_f8_t), cute::make_stride(sm90::_1{}, p.in.m, int64_t{0})}};
  }
};

// ---- 4. Launcher -----------------------------------------------------------------------------

template <class Spec>
cudaError_t launch(const Fp8MatmulRelu2Params& p, int num_sms, cudaStream_t stream) {
  return launch_fp8<Spec>(fp8_problem(p.in, {p.post_f8, p.in.n, 0}), Spec::fusion(p), num_sms,
                          stream);
}

}  // namespace

cudaError_t launch_fp8_matmul_relu2(const Fp8MatmulRelu2Params& p, cudaStream_t stream) {
  cudaError_t error;
  if (is_done(p.in, &error)) return error;
  if (p.in.batch != 1 || !sm90::is_aligned({p.post, p.in.n, 0}, 2) ||
      (p.post_f8_t != nullptr && !sm90::is_aligned({p.post_f8_t, p.in.m, 0}, 1))) {
    return cudaErrorInvalidValue;
  }
  int num_sms;
  error = sm90::count_sms(&num_sms);
  if (error != cudaSuccess) return error;
  const bool transposed = p.post_f8_t != nullptr;
  switch (choose_fp8_kernel(transposed ? Fp8Epilogue::kRelu2Transposed : Fp8Epilogue::kRelu2,
                            p.in.a_dtype, p.in.b_dtype, DType::kFloat8E4M3, p.in.fast_accum, p.in.m,
                            p.in.n, 1, num_sms)) {
    case kRelu2:
      return launch<Relu2>(p, num_sms, stream);
    case kRelu2Transposed:
      return launch<Relu2Transposed>(p, num_sms, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace speedrun
