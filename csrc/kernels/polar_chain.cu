// The chain of polar_chain.h: persistent thread blocks go through the squares of all its products,
// and wait for those squares of earlier products that they read. The schedule, and why it ends:
// kernels/polar_chain_schedule.h.
//
// Thread blocks pass matrices to each other through global memory, written with plain stores and
// read by TMA (A and B) and plain loads (C). Why each read sees the writes:
//
//   writer                                     reader
//   1 each thread: stores of its part          5 each lane of the loading warp: acquire load of a
//   2 each thread: fence.proxy.async             counter until it is complete
//   3 barrier of the consumers                 6 __syncwarp, each lane: fence.proxy.async
//   4 one thread: fence (gpu scope), add 1     7 one lane: TMA loads of A and B; arrives at the
//     to the counters of the square's panels     stage's mbarrier (release)
//                                              8 consumers wait at it (acquire); plain loads of C
//
// 1 to 5 is the usual release and acquire at gpu scope: the barrier puts all threads' stores before
// the one thread's fence, which is cumulative; a complete count has been added to by every writer,
// and each addition carries on the release of those before it. TMA reads through another proxy than
// plain stores write through: a proxy fence stands between them on either side (2 and 6). 7 and 8
// hand on to the consumers what the loading warp has acquired; C is loaded past L1, which may hold
// nothing older then. No matrix is written twice (polar_chain_test.cpp), so nothing is read too
// late; what a previous launch has left or a next one reads is the stream's order. A stage of
// shared memory is written by TMA only, and freed by CUTLASS's pipeline; the square's buffers are
// read and written by consumers only, with barriers between.
#include <cuda_fp16.h>

#include <climits>
#include <cuda/atomic>

#include "common/sm90.cuh"
#include "kernels/polar_chain.h"

namespace speedrun {
namespace {

// ---- 1. Tile choice --------------------------------------------------------------------------

// Not yet measured: the reasons are arithmetic, for H100. A product of three (768, 768) is 63
// squares for 132 multiprocessors. Halves of 64 x 128 would fill them, and would halve the time of
// the tensor cores (6,144 clocks a square), but read 37 MB from L2 instead of 25, which takes
// longer (about 7 µs at 5.5 TB/s). Four stages are 128 KB in flight: ten times what L2's latency
// needs, and leave room for the square's two buffers.
constexpr int kStages = 4;
constexpr int kConsumers = 256;             // two warpgroups, 64 rows of the square each
constexpr int kThreads = kConsumers + 128;  // the first warpgroup's first warp loads
constexpr int kVec = 8;                     // fp16 of 16 bytes
constexpr int kPitch = kSquare + kVec;      // rows 4 banks apart: no bank is asked twice
constexpr unsigned kPauseNs = 32;           // between looks at a counter
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

using Element = cutlass::half_t;
using Tile = cute::Shape<sm90::Int<kSquare>, sm90::Int<kSquare>, sm90::Int<64>>;
using Cluster = cute::Shape<sm90::_1, sm90::_1, sm90::_1>;
// B is symmetric: rows of it are columns, and both operands lie with K first.
using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, sm90::RowMajor, kVec, Element,
    sm90::ColumnMajor, kVec, float, Tile, Cluster, cutlass::gemm::collective::StageCount<kStages>,
    cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
using Pipeline = typename Mainloop::MainloopPipeline;

// ---- 2. Helpers ------------------------------------------------------------------------------

struct Params {
  typename Mainloop::Params mainloop;
  Chain chain;
  __half* work;
  uint32_t* counters;
  int n, side, batch, num_items, num_matrices;  // num_matrices: of all slots

  __device__ int k_tiles() const { return n / cute::size<2>(Tile{}); }
  __device__ __half* square_of(int slot, int matrix, int row, int col) const {
    const int64_t at = int64_t{slot} * batch + matrix;
    return work + (at * n + row * kSquare) * n + col * kSquare;
  }
};

struct Shared {
  typename Mainloop::TensorStorage stages;
  typename Mainloop::PipelineStorage pipeline;
  alignas(16) __half square[kSquare][kPitch], mirror[kSquare][kPitch];
};

using Counter = cuda::atomic_ref<uint32_t, cuda::thread_scope_device>;

// Orders this thread's accesses to global memory through the generic proxy and TMA's.
__device__ inline void fence_proxies() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

__device__ inline void wait_for_consumers() {
  cutlass::arch::NamedBarrier::sync(kConsumers, uint32_t{0});
}

// By a whole warp: even lanes wait for A's panel, odd ones for B's.
__device__ inline void wait_for_operands(const Params& p, const ChainItem& item, int lane) {
  __syncwarp();  // no lane may look at counters while the one that loads has an item to finish
  const ChainProduct& product = p.chain.products[item.product];
  const ChainPanel panel = operand_panel(product, item.square, lane % 2);
  if (panel.slot != 0) {
    const Counter count(p.counters[panel_counter(panel, item.matrix, p.batch, p.side)]);
    while (count.load(cuda::memory_order_acquire) < static_cast<uint32_t>(p.side)) {
      __nanosleep(kPauseNs);
    }
  }
  __syncwarp();
  fence_proxies();
}

__device__ inline void load_items(const Params& p, Shared& shared, Pipeline& pipeline, int lane) {
  Mainloop mainloop;
  const auto inputs =
      mainloop.load_init(cute::make_shape(p.n, p.n, p.n, p.num_matrices), p.mainloop);
  auto state = cutlass::make_producer_start_state<Pipeline>();
  for (int index = blockIdx.x; index < p.num_items; index += gridDim.x) {
    const ChainItem item = chain_item(index, p.batch, p.side);
    const ChainProduct& product = p.chain.products[item.product];
    wait_for_operands(p, item, lane);
    // The collective takes one matrix number for both: B's tensor is moved to its slot.
    const auto b =
        cute::domain_offset(cute::make_coord(sm90::_0{}, sm90::_0{}, sm90::_0{}, sm90::_0{},
                                             (product.b - product.a) * p.batch),
                            cute::get<1>(inputs));
    mainloop.load(p.mainloop, pipeline, state, cute::make_tuple(cute::get<0>(inputs), b),
                  cute::make_coord(item.square.row, item.square.col, cute::_,
                                   product.a * p.batch + item.matrix),
                  cute::make_coord_iterator(p.k_tiles()), p.k_tiles(), lane, 0, shared.stages);
    state.advance(p.k_tiles());
  }
  mainloop.load_tail(pipeline, state);
}

// alpha · sums + beta · C, rounded, to shared.square and its mirror image to shared.mirror; of a
// square on the diagonal the lower half, mirrored, to shared.square.
template <class Sums, class Places>
__device__ inline void round_square(const Params& p, const ChainItem& item, const Sums& sums,
                                    const Places& places, Shared& shared) {
  const ChainProduct& product = p.chain.products[item.product];
  const __half* const c = p.square_of(product.c, item.matrix, item.square.row, item.square.col);
  const bool on_diagonal = item.square.row == item.square.col;
#pragma unroll
  for (int i = 0; i < cute::size(sums); i += 2) {  // two neighbours in a row
    const int row = cute::get<0>(places(i)), col = cute::get<1>(places(i));
    const float2 added =
        __half22float2(__ldcg(reinterpret_cast<const __half2*>(c + int64_t{row} * p.n + col)));
    const __half first = __float2half_rn(fmaf(product.beta, added.x, product.alpha * sums(i)));
    const __half second = __float2half_rn(fmaf(product.beta, added.y, product.alpha * sums(i + 1)));
    if (!on_diagonal) {
      *reinterpret_cast<__half2*>(&shared.square[row][col]) = __halves2half2(first, second);
      shared.mirror[col][row] = first;
      shared.mirror[col + 1][row] = second;
      continue;
    }
    if (row >= col) shared.square[row][col] = shared.square[col][row] = first;
    if (row >= col + 1) shared.square[row][col + 1] = shared.square[col + 1][row] = second;
  }
}

__device__ inline void copy_square(const __half (&from)[kSquare][kPitch], __half* to, int n,
                                   int thread) {
  constexpr int kVecs = kSquare / kVec;
#pragma unroll
  for (int i = thread; i < kSquare * kVecs; i += kConsumers) {
    const int row = i / kVecs, col = i % kVecs * kVec;
    *reinterpret_cast<uint4*>(to + int64_t{row} * n + col) =
        *reinterpret_cast<const uint4*>(&from[row][col]);
  }
}

// The square in shared memory, and its mirror image, to a slot.
__device__ inline void store_square(const Params& p, const ChainItem& item, int slot,
                                    const Shared& shared, int thread) {
  const auto [row, col] = item.square;
  copy_square(shared.square, p.square_of(slot, item.matrix, row, col), p.n, thread);
  if (row != col) {
    copy_square(shared.mirror, p.square_of(slot, item.matrix, col, row), p.n, thread);
  }
}

// By one thread, after all consumers have stored and fenced.
__device__ inline void count_square(const Params& p, const ChainItem& item, int slot) {
  const auto [row, col] = item.square;
  const auto add = [&](int panel) {
    Counter(p.counters[panel_counter({slot, panel}, item.matrix, p.batch, p.side)])
        .fetch_add(1, cuda::memory_order_relaxed);
  };
  add(row);
  if (row != col) add(col);
}

__device__ inline void compute_items(const Params& p, Shared& shared, Pipeline& pipeline,
                                     int thread) {
  Mainloop mainloop;
  typename Mainloop::TiledMma tiled_mma;
  const auto places =
      tiled_mma.get_slice(thread).partition_C(cute::make_identity_tensor(cute::take<0, 2>(Tile{})));
  typename Mainloop::PipelineState state;
  for (int index = blockIdx.x; index < p.num_items; index += gridDim.x) {
    const ChainItem item = chain_item(index, p.batch, p.side);
    const ChainProduct& product = p.chain.products[item.product];
    auto sums = cute::partition_fragment_C(tiled_mma, cute::take<0, 2>(Tile{}));
    mainloop.mma(pipeline, state, sums, p.k_tiles(), thread, shared.stages, p.mainloop);
    mainloop.mma_tail(pipeline, state, p.k_tiles());
    state.advance(p.k_tiles());

    round_square(p, item, sums, places, shared);
    wait_for_consumers();
    store_square(p, item, product.out, shared, thread);
    if (product.shifted >= 0) {
      if (item.square.row == item.square.col) {
        wait_for_consumers();  // what is changed now has been stored
        if (thread < kSquare) {
          __half& diagonal = shared.square[thread][thread];
          diagonal = __float2half_rn(__half2float(diagonal) + product.shift);
        }
        wait_for_consumers();
      }
      store_square(p, item, product.shifted, shared, thread);
    }
    fence_proxies();
    wait_for_consumers();  // also before the buffers' next use
    if (thread == 0) {
      cuda::atomic_thread_fence(cuda::memory_order_release, cuda::thread_scope_device);
      count_square(p, item, product.out);
      if (product.shifted >= 0) count_square(p, item, product.shifted);
    }
  }
}

// ---- 3. Kernel -------------------------------------------------------------------------------

// The arguments are for its name in profiles.
template <class, int kTileM, int kTileN, int kStageCount, int kSharedBytes>
__global__ void __launch_bounds__(kThreads, 1)
    polar_chain_kernel(CUTLASS_GRID_CONSTANT Params const params) {
  extern __shared__ char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int thread = threadIdx.x, warp = cutlass::canonical_warp_idx_sync();
  const bool loads = cutlass::canonical_warp_group_idx() == 0;
  typename Pipeline::Params roles;
  roles.transaction_bytes = params.mainloop.tma_transaction_bytes;
  roles.is_leader = thread % 128 == 0;
  roles.num_consumers = kConsumers;
  if (!loads) {
    roles.role = Pipeline::ThreadCategory::Consumer;
  } else if (warp == 0) {
    roles.role = Pipeline::ThreadCategory::Producer;
  }
  Pipeline pipeline(shared.pipeline, roles, Cluster{});
  __syncthreads();

  if (loads) {
    cutlass::arch::warpgroup_reg_dealloc<kProducerRegisters>();
    if (warp == 0) load_items(params, shared, pipeline, thread);
  } else {
    cutlass::arch::warpgroup_reg_alloc<kConsumerRegisters>();
    compute_items(params, shared, pipeline, thread - 128);
  }
}

// ---- 4. Launcher -----------------------------------------------------------------------------

struct PolarChain {};
constexpr int kSharedBytes = sizeof(Shared);
constexpr auto kKernel = polar_chain_kernel<PolarChain, kSquare, kSquare, kStages, kSharedBytes>;

// Thread blocks that can run at once on this device.
cudaError_t count_blocks(int* count) {
  int num_sms, per_sm;
  cudaError_t error = sm90::count_sms(&num_sms);
  if (error == cudaSuccess) {
    error =
        cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  }
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kKernel, kThreads, kSharedBytes);
  }
  if (error != cudaSuccess) return error;
  *count = num_sms * per_sm;
  return *count > 0 ? cudaSuccess : cudaErrorCooperativeLaunchTooLarge;
}

typename Mainloop::Params mainloop_params(const PolarChainParams& p, int num_matrices) {
  const int n = static_cast<int>(p.n);
  typename Mainloop::Arguments arguments{};
  const sm90::Matrix matrices{p.work, p.n, p.n * p.n};
  arguments.ptr_A = arguments.ptr_B = static_cast<const Element*>(p.work);
  arguments.dA = sm90::stride_of<decltype(arguments.dA)>(matrices);
  arguments.dB = sm90::stride_of<decltype(arguments.dB)>(matrices);
  return Mainloop::to_underlying_arguments(cute::make_shape(n, n, n, num_matrices), arguments,
                                           nullptr);
}

}  // namespace

cudaError_t launch_polar_chain(const PolarChainParams& p, cudaStream_t stream) {
  if (p.num_steps < 1 || p.num_steps > kMaxChainSteps) return cudaErrorInvalidValue;
  if (p.n < 0 || p.n > kMaxChainN || p.n % kSquare != 0 || p.batch < 0)
    return cudaErrorInvalidValue;
  if (p.batch == 0 || p.n == 0) return cudaSuccess;
  const int64_t side = squares_per_side(p.n), num_slots = chain_slots(p.num_steps);
  // Of products there are fewer than slots, and of squares in a triangle fewer than side².
  if (p.batch > INT_MAX / (num_slots * side * side)) return cudaErrorInvalidValue;
  if (!sm90::is_aligned({p.work, p.n, p.n * p.n}, sizeof(Element))) return cudaErrorInvalidValue;
  int num_blocks;
  cudaError_t error = count_blocks(&num_blocks);
  if (error != cudaSuccess) return error;

  const int64_t num_matrices = num_slots * p.batch;
  const int64_t num_items = chain_products(p.num_steps) * p.batch * triangle_size(side);
  const Params params{mainloop_params(p, static_cast<int>(num_matrices)),
                      make_chain(p.num_steps, p.coefficients),
                      static_cast<__half*>(p.work),
                      p.counters,
                      static_cast<int>(p.n),
                      static_cast<int>(side),
                      static_cast<int>(p.batch),
                      static_cast<int>(num_items),
                      static_cast<int>(num_matrices)};
  error = cudaMemsetAsync(p.counters, 0, sizeof(uint32_t) * num_matrices * side, stream);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(num_items < num_blocks ? num_items : num_blocks);
  config.blockDim = kThreads;
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  config.attrs = &cooperative;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kKernel, params);
}

}  // namespace speedrun
