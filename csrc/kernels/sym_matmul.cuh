// What the symmetric products in bf16 and fp16 share: scheduler, mirrored store, kernel, launch.
#pragma once

#include "common/sm90.cuh"
#include "kernels/sym_matmul.h"
#include "kernels/sym_matmul_tiles.h"

namespace speedrun::sm90 {

// ---- 2. Helpers ------------------------------------------------------------------------------

// A persistent scheduler whose clusters go through the squares of `square_at`, matrix by matrix.
// Tiles of a cluster lie one below the other, and make a square.
class TriangularScheduler
    : public cutlass::gemm::kernel::detail::StaticPersistentTileScheduler<TriangularScheduler> {
  using Base = cutlass::gemm::kernel::detail::StaticPersistentTileScheduler<TriangularScheduler>;

 public:
  using Base::Base;
  using Pipeline = cutlass::PipelineEmpty;
  using PipelineStorage = Pipeline::SharedStorage;
  using ThrottlePipeline = cutlass::PipelineEmpty;
  using ThrottlePipelineStorage = ThrottlePipeline::SharedStorage;
  struct CLCResponse {};
  struct SharedStorage {
    CUTLASS_DEVICE PipelineStorage pipeline() { return {}; }
    CUTLASS_DEVICE ThrottlePipelineStorage throttle_pipeline() { return {}; }
    CUTLASS_DEVICE CLCResponse* data() { return nullptr; }
  };

  // The base class's own schedule, of a problem that is as many clusters high as a triangle has
  // squares, and one wide.
  template <class ProblemShape, class ClusterShape>
  static dim3 column_of_squares(const ProblemShape& problem, ClusterShape) {
    const int64_t squares = triangle_size(squares_per_side(cute::get<0>(problem)));
    return dim3(static_cast<unsigned>(squares * cute::size<0>(ClusterShape{})), 1,
                static_cast<unsigned>(cute::get<3>(problem)));
  }

  template <class ProblemShape, class TileShape, class ClusterShape>
  static Params to_underlying_arguments(ProblemShape problem, TileShape, ClusterShape cluster,
                                        const cutlass::KernelHardwareInfo& hardware,
                                        const Arguments&, void* = nullptr, uint32_t = 1,
                                        uint32_t = 1) {
    static_assert(cute::size<0>(TileShape{}) * cute::size<0>(ClusterShape{}) == kSquare);
    static_assert(cute::size<1>(TileShape{}) == kSquare && cute::size<1>(ClusterShape{}) == 1);
    Params params;
    params.initialize(column_of_squares(problem, cluster), cutlass::gemm::to_gemm_coord(cluster),
                      hardware, 1, RasterOrderOptions::AlongN);
    return params;
  }

  template <class ProblemShape, class TileShape, class ClusterShape>
  static dim3 get_grid_shape(const Params&, ProblemShape problem, TileShape, ClusterShape cluster,
                             cutlass::KernelHardwareInfo hardware, Arguments = {}, bool = true) {
    return Params::get_grid_shape(column_of_squares(problem, cluster),
                                  cutlass::gemm::to_gemm_coord(cluster), hardware, 1,
                                  RasterOrderOptions::AlongN);
  }

  // Row and column of this thread block's tile in square `cluster` of its matrix.
  static CUTLASS_DEVICE cute::tuple<int32_t, int32_t> get_work_idx_m_and_n(
      uint64_t cluster, const cutlass::FastDivmodU64Pow2&,
      const cutlass::FastDivmodU64Pow2& tiles_per_square, const cutlass::FastDivmodU64&, int32_t,
      RasterOrder) {
    const Square square = square_at(static_cast<int64_t>(cluster));
    const auto in_square = static_cast<int32_t>(cute::block_id_in_cluster().x);
    return {square.row * static_cast<int32_t>(tiles_per_square.divisor) + in_square, square.col};
  }

  template <class ProblemShape, class Accumulator>
  static size_t get_workspace_size(const Arguments&, ProblemShape,
                                   const cutlass::KernelHardwareInfo&, uint32_t, uint32_t = 1,
                                   uint32_t = 1) {
    return 0;
  }
  template <class ProblemShape, class Accumulator>
  static cutlass::Status initialize_workspace(const Arguments&, void*, cudaStream_t, ProblemShape,
                                              const cutlass::KernelHardwareInfo&, uint32_t,
                                              uint32_t = 1, uint32_t = 1,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }
};

struct Triangular {};  // its tag

// Stores its input transposed too, but for squares on the diagonal, which hold both halves.
template <class Shape, class T, int kTilesPerSquare>
struct MirrorStore : Shape::template Store<T, ColumnMajor>::Node {
  using Base = typename Shape::template Store<T, ColumnMajor>::Node;
  using Base::Base;

  template <class Callbacks>
  struct OffDiagonal : Callbacks {
    bool off_diagonal;

    CUTLASS_DEVICE OffDiagonal(Callbacks&& callbacks, bool off_diagonal)
        : Callbacks(cute::move(callbacks)), off_diagonal(off_diagonal) {}

    CUTLASS_DEVICE void tma_store(int epi_m, int epi_n, int iteration, bool issue) {
      // One thread: ptxas doesn't see that the whole warp agrees, and would let each of them store.
      if (issue && off_diagonal && cute::elect_one_sync()) {
        Callbacks::tma_store(epi_m, epi_n, iteration, true);
      }
    }
  };

  template <bool kReferenceSource, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      const fusion::detail::ConsumerStoreArgs<Args...>& args) {
    auto callbacks = Base::template get_consumer_store_callbacks<kReferenceSource>(args);
    const int row = cute::get<0>(args.tile_coord_mnkl), col = cute::get<1>(args.tile_coord_mnkl);
    return OffDiagonal<decltype(callbacks)>(cute::move(callbacks), row / kTilesPerSquare != col);
  }
};

}  // namespace speedrun::sm90

template <class TileShape, class ClusterShape, uint32_t kStageCount>
struct cutlass::gemm::kernel::detail::TileSchedulerSelector<
    speedrun::sm90::Triangular, cutlass::arch::Sm90, TileShape, ClusterShape, kStageCount> {
  using Scheduler = speedrun::sm90::TriangularScheduler;
};

namespace speedrun {

// ---- 3. Kernels ------------------------------------------------------------------------------

// T: of all matrices. kTileM: 128, or 64 for half squares (`choose_half_squares`). Two warpgroups
// with a tile each: the one's products hide the other's stores.
template <class T, bool kTransposed, int kTileM>
struct SymMatmul {
  static constexpr int kTilesPerSquare = kSquare / kTileM;
  using Shape = sm90::Shape<kTileM, kSquare, kTilesPerSquare, true, T, T>;
  using Mirror = sm90::MirrorStore<Shape, T, kTilesPerSquare>;
  using Fusion =
      sm90::fusion::Sm90EVT<Mirror, sm90::fusion::Sm90LinearCombination<T, float, T, float>>;
  using LayoutA = cute::conditional_t<kTransposed, sm90::ColumnMajor, sm90::RowMajor>;
  using LayoutB = cute::conditional_t<kTransposed, sm90::RowMajor, sm90::ColumnMajor>;
  using Kernel = typename sm90::Gemm<Shape, T, T, Fusion, false, false, LayoutA, LayoutB,
                                     sm90::Triangular>::Kernel;
};

// Spec::Kernel is what runs; the rest is for its name in profiles.
template <class Spec, int kTileM, int kTileN, int kStages, int kSharedBytes>
__global__ void __launch_bounds__(Spec::Kernel::MaxThreadsPerBlock, 1)
    sym_matmul_kernel(CUTLASS_GRID_CONSTANT typename Spec::Kernel::Params const params) {
  extern __shared__ char shared[];
  typename Spec::Kernel{}(params, shared);
}

// ---- 4. Launchers ----------------------------------------------------------------------------

template <class T, bool kTransposed, int kTileM>
cudaError_t launch(const SymMatmulParams& p, int num_sms, cudaStream_t stream) {
  using Spec = SymMatmul<T, kTransposed, kTileM>;
  using Kernel = typename Spec::Kernel;
  const sm90::Matrix out{p.out, p.out_row_stride, p.out_batch_stride};
  sm90::Problem problem;
  problem.m = problem.n = p.n;
  problem.k = p.k;
  problem.batch = p.batch;
  problem.a = {p.a, p.a_row_stride, p.a_batch_stride};
  problem.b = {p.b, p.b_row_stride, p.b_batch_stride};
  // Without C its tensor map must be one all the same; nothing is read through it.
  problem.c = p.beta == 0.f ? out : sm90::Matrix{p.c, p.c_row_stride, p.c_batch_stride};
  problem.d = out;
  problem.strip = 1;

  using Mirror = typename Spec::Mirror;
  const typename Mirror::Arguments mirror{static_cast<T*>(p.out),
                                          sm90::stride_of<decltype(Mirror::Arguments::dAux)>(out)};
  const sm90::FusionArguments<Kernel> fusion{
      {{{p.beta}, {nullptr}, {}}, {}, {{{p.alpha}, {nullptr}, {}}, {}, {}}, {}}, mirror};
  return sm90::launch<Kernel>(sym_matmul_kernel<Spec, sm90::kTileM<Kernel>, sm90::kTileN<Kernel>,
                                                sm90::kStages<Kernel>, sm90::kSharedBytes<Kernel>>,
                              problem, fusion, num_sms, stream);
}

template <class T>
cudaError_t launch_sym_matmul_of(const SymMatmulParams& p, int num_sms, cudaStream_t stream) {
  if (choose_half_squares(p.n, p.batch, num_sms)) {
    return p.transposed ? launch<T, true, 64>(p, num_sms, stream)
                        : launch<T, false, 64>(p, num_sms, stream);
  }
  return p.transposed ? launch<T, true, 128>(p, num_sms, stream)
                      : launch<T, false, 128>(p, num_sms, stream);
}

// In a file of its own, so that two compilers can share the work.
cudaError_t launch_sym_matmul_fp16(const SymMatmulParams& params, int num_sms, cudaStream_t stream);

}  // namespace speedrun
