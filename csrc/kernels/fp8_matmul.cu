// fp8_matmul, outputs in bf16 and e4m3. Tile choice: kernels/fp8_matmul_tiles.h.
#include "kernels/fp8_matmul.cuh"

namespace speedrun {
namespace {

// ---- 3. Kernels ------------------------------------------------------------------------------

// row_scale · s, rounded to Out.
template <class Row, class Out>
using RowScaled = sm90::Apply<
    cutlass::multiplies, Out,
    sm90::fusion::Sm90ColBroadcast<0, typename Row::Shape::template Tile<typename Row::A>, float>,
    Fp8Scaled<float>>;

template <class Row, class Out>
auto row_scaled(const Fp8MatmulParams& p) {
  using Arguments = typename RowScaled<Row, Out>::Arguments;
  return Arguments{{p.row_scale, 1.f, {}}, fp8_scaled<float>(p.in), {}};
}

template <Fp8KernelId kId>
struct Store : Fp8Row<kId> {
  using Row = Fp8Row<kId>;
  using Kernel = typename Row::template GemmKernel<RowScaled<Row, typename Row::D>>;
  static auto fusion(const Fp8MatmulParams& p) { return row_scaled<Row, typename Row::D>(p); }
};

struct StoreFast : Store<kStoreFast> {};
struct StoreFastSmall : Store<kStoreFastSmall> {};
struct StoreSlow : Store<kStoreSlow> {};
struct StoreE5m2Fast : Store<kStoreE5m2Fast> {};
struct StoreE5m2Slow : Store<kStoreE5m2Slow> {};

struct StoreFp8 : Fp8Row<kStoreFp8> {
  using Row = Fp8Row<kStoreFp8>;
  using Kernel = Row::GemmKernel<
      sm90::Apply<cutlass::multiplies, Row::D, sm90::Reciprocal, RowScaled<Row, float>>>;
  static sm90::FusionArguments<Kernel> fusion(const Fp8MatmulParams& p) {
    return {sm90::reciprocal(p.out_scale), row_scaled<Row, float>(p), {}};
  }
};

// ---- 4. Launcher -----------------------------------------------------------------------------

template <class Spec>
cudaError_t launch(const Fp8MatmulParams& p, int num_sms, cudaStream_t stream) {
  const sm90::Matrix out{p.out, p.out_row_stride, p.out_batch_stride};
  return launch_fp8<Spec>(fp8_problem(p.in, out), Spec::fusion(p), num_sms, stream);
}

}  // namespace

cudaError_t launch_fp8_matmul(const Fp8MatmulParams& p, cudaStream_t stream) {
  cudaError_t error;
  if (is_done(p.in, &error)) return error;
  const bool fp32 = p.out_dtype == DType::kFloat32, fp8 = p.out_dtype == DType::kFloat8E4M3;
  if ((p.accumulate && !fp32) || (p.row_scale != nullptr && fp32)) return cudaErrorInvalidValue;
  if ((p.out_scale != nullptr) != fp8) return cudaErrorInvalidValue;
  int num_sms;
  error = sm90::count_sms(&num_sms);
  if (error != cudaSuccess) return error;

  const int id =
      choose_fp8_kernel(fp32 ? Fp8Epilogue::kAdd : Fp8Epilogue::kStore, p.in.a_dtype, p.in.b_dtype,
                        p.out_dtype, p.in.fast_accum, p.in.m, p.in.n, p.in.batch, num_sms);
  switch (id) {
    case kStoreFast:
      return launch<StoreFast>(p, num_sms, stream);
    case kStoreFastSmall:
      return launch<StoreFastSmall>(p, num_sms, stream);
    case kStoreSlow:
      return launch<StoreSlow>(p, num_sms, stream);
    case kStoreE5m2Fast:
      return launch<StoreE5m2Fast>(p, num_sms, stream);
    case kStoreE5m2Slow:
      return launch<StoreE5m2Slow>(p, num_sms, stream);
    case kStoreFp8:
      return launch<StoreFp8>(p, num_sms, stream);
    case kAddToE5m2:
    case kAddE5m2:
      return launch_fp8_matmul_add(id, p, num_sms, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace speedrun
