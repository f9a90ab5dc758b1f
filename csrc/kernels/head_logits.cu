// head_logits: the head's product of FP8 with sums, factors and their transpose behind it.
//
// Clocks of an SM for a tile of 128 x 128 and a model dim of 768, counted, for H100 and H200:
//   tensor cores               3,072
//   loads from L2              3,690, at 40 bytes a clock; clusters of 2 share what they load of W
//   special functions          2,304, 2.25 a logit (kernels/head_logits.cuh)
//   instructions of the rest   about 2,000 a warp, four of which have a scheduler each
// So what follows the product hides behind it if both go on at once: pingpong, two warpgroups with
// a tile each. A tile of 128 x 256 that both share would load less, and hide nothing.
#include "common/sm90.cuh"
#include "kernels/head_logits.cuh"

namespace speedrun::head {

using E4M3 = sm90::Element<DType::kFloat8E4M3>;
using E5M2 = sm90::Element<DType::kFloat8E5M2>;

// ---- 1. Tile choice --------------------------------------------------------------------------
// Not yet measured on a GPU: the reasons are arithmetic.

constexpr int kTileRows = 128, kTileCols = kHeadColumns;
constexpr int kCluster = 2;  // thread blocks one below the other
constexpr int kStrip = 8;    // clusters, likewise, before the next columns: W is 39 MB

// ---- 2. Epilogue node ------------------------------------------------------------------------

// g of each product; at the end of a tile its rows' sums of powers go to memory.
struct Factors {
  struct SharedStorage {};
  struct Arguments {
    Exponents exponents;
    const float* x_scale;
    const float* w_scale;
    float* sums;
    float g_scale;
  };
  using Params = Arguments;

  template <class Problem>
  static Params to_underlying_arguments(const Problem&, const Arguments& arguments, void*) {
    return arguments;
  }
  template <class Problem>
  static bool can_implement(const Problem&, const Arguments&) {
    return true;
  }
  template <class Problem>
  static size_t get_workspace_size(const Problem&, const Arguments&) {
    return 0;
  }
  template <class Problem>
  static cutlass::Status initialize_workspace(const Problem&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  const Params& params;  // in constant memory: registers are scarce
  float slope;

  CUTLASS_DEVICE Factors(const Params& params, const SharedStorage&)
      : params(params), slope(params.exponents.slope * (*params.x_scale * *params.w_scale)) {}

  CUTLASS_DEVICE bool is_producer_load_needed() const { return false; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return false; }
  template <class... Args>
  CUTLASS_DEVICE auto get_producer_load_callbacks(
      const sm90::fusion::detail::ProducerLoadArgs<Args...>&) {
    return sm90::fusion::EmptyProducerLoadCallbacks{};
  }

  // Of one thread and tile: its elements' places (row, column) from its first one on, and what of
  // the matrix lies from there on.
  template <class Places, class Rest>
  struct Callbacks : sm90::fusion::EmptyConsumerStoreCallbacks {
    static constexpr int kRows = kTileRows / 32;  // a thread's: r and r + 8 of every 64
    const Factors& node;
    Places places;
    Rest rest;
    int num_rows, num_cols;
    float of_row[kRows] = {};

    CUTLASS_DEVICE Callbacks(const Factors& node, Places places, Rest rest, int num_rows,
                             int num_cols)
        : node(node), places(places), rest(rest), num_rows(num_rows), num_cols(num_cols) {}

    template <int kSize>
    CUTLASS_DEVICE auto visit(const cutlass::Array<float, kSize>& products, int vec, int epi_m,
                              int epi_n) {
      static_assert(kSize % 4 == 0);
      const auto of_tile = places(cute::_, cute::_, cute::_, epi_m, epi_n);
      constexpr int kAtOnce = 4;
      cutlass::Array<E5M2, kSize> g;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kSize; i += kAtOnce) {
        cutlass::Array<float, kAtOnce> x;
        float powers[kAtOnce];
        CUTLASS_PRAGMA_UNROLL
        for (int j = 0; j < kAtOnce; ++j) x[j] = products[i + j];
        node.params.exponents.factors(node.slope, x.data(), powers);
        const auto codes =
            cutlass::NumericArrayConverter<E5M2, float, kAtOnce, sm90::kNearestEven>{}(x);
        CUTLASS_PRAGMA_UNROLL
        for (int j = 0; j < kAtOnce; ++j) {
          const auto place = of_tile(vec * kSize + i + j);
          const int row = cute::get<0>(place), col = cute::get<1>(place);
          g[i + j] = codes[j];
          // Behind the last column products are 0, and their powers are not.
          if (col < cute::get<1>(rest)) of_row[row / 8 % 2 + row / 64 * 2] += powers[j];
        }
      }
      return g;
    }

    CUTLASS_DEVICE void end() {
      const int row = num_rows - cute::get<0>(rest), col = num_cols - cute::get<1>(rest);
      float* const sums = node.params.sums + int64_t{col / kHeadColumns} * num_rows;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kRows; ++i) {
        float sum = of_row[i];  // four neighbouring lanes have the same rows
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        const int own = row + i % 2 * 8 + i / 2 * 64;
        if (threadIdx.x % 4 == 0 && own < num_rows && col < num_cols) {
          sums[own] = sum * node.params.g_scale;
        }
      }
    }
  };

  template <bool kReferenceSource, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      const sm90::fusion::detail::ConsumerStoreArgs<Args...>& args) {
    return Callbacks<decltype(args.tCcD), decltype(args.residue_tCcD)>(
        *this, args.tCcD, args.residue_tCcD, cute::get<0>(args.problem_shape_mnkl),
        cute::get<1>(args.problem_shape_mnkl));
  }
};

// ---- 3. Kernel -------------------------------------------------------------------------------

// As sm90::Gemm, but for outputs without a batch dimension: TMA would take its coordinate, 0, from
// a register, which ptxas can't see to be the same in all threads of a warp here, and loops over
// them.
struct HeadProduct {
  using Shape = sm90::Shape<kTileRows, kTileCols, kCluster, true, void, E5M2>;
  using RowMajor = cute::Stride<int64_t, sm90::_1, sm90::_0>;
  using ColumnMajor = cute::Stride<sm90::_1, int64_t, sm90::_0>;
  using Fusion = Shape::AlsoStore<E5M2, ColumnMajor, Factors>;
  using Tile = Shape::Tile<E4M3>;
  using Epilogue =
      sm90::collective::CollectiveBuilder<cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile,
                                          Shape::Cluster, sm90::collective::EpilogueTileAuto, float,
                                          float, void, RowMajor, 16, E5M2, RowMajor, 16,
                                          Shape::Schedule, Fusion>::CollectiveOp;
  using Stages = cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
      sizeof(Epilogue::SharedStorage))>;
  using Mainloop = cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, E4M3, sm90::RowMajor, 16, E4M3,
      sm90::ColumnMajor, 16, float, Tile, Shape::Cluster, Stages,
      cutlass::gemm::KernelTmaWarpSpecializedPingpongFP8FastAccum>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop,
                                                      Epilogue, cutlass::gemm::PersistentScheduler>;
};

// Spec::Kernel is what runs; the rest is for its name in profiles.
template <class Spec, int kTileM, int kTileN, int kStages, int kSharedBytes>
__global__ void __launch_bounds__(Spec::Kernel::MaxThreadsPerBlock, 1)
    head_logits_kernel(CUTLASS_GRID_CONSTANT typename Spec::Kernel::Params const params) {
  extern __shared__ char shared[];
  typename Spec::Kernel{}(params, shared);
}

}  // namespace speedrun::head

// ---- 4. Launcher -----------------------------------------------------------------------------

namespace speedrun {

cudaError_t launch_head_logits(const HeadLogitsParams& p, cudaStream_t stream) {
  using Kernel = head::HeadProduct::Kernel;
  if (p.rows < 0 || p.cols < 0 || p.dim <= 0 || !head::is_valid(p.softcap) ||
      !sm90::is_aligned({p.g_t, p.rows, 0}, 1)) {
    return cudaErrorInvalidValue;
  }
  if (p.rows == 0 || p.cols == 0) return cudaSuccess;
  int num_sms;
  const cudaError_t error = sm90::count_sms(&num_sms);
  if (error != cudaSuccess) return error;
  sm90::Problem problem{};
  problem.m = p.rows;
  problem.n = p.cols;
  problem.k = p.dim;
  problem.batch = 1;
  problem.a = {p.x, p.dim, 0};
  problem.b = {p.w, p.dim, 0};
  problem.d = {p.g, p.cols, 0};
  problem.strip = head::kStrip;
  const sm90::FusionArguments<Kernel> fusion{
      {head::exponents_of(p.softcap), p.x_scale, p.w_scale, p.sums,
       static_cast<float>(head::factor_scale(p.softcap.a))},
      {static_cast<head::E5M2*>(p.g_t), cute::make_stride(sm90::_1{}, p.rows, sm90::_0{})}};
  return sm90::launch<Kernel>(
      head::head_logits_kernel<head::HeadProduct, sm90::kTileM<Kernel>, sm90::kTileN<Kernel>,
                               sm90::kStages<Kernel>, sm90::kSharedBytes<Kernel>>,
      problem, fusion, num_sms, stream);
}

}  // namespace speedrun
