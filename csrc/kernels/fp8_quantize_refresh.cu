#include <cuda/atomic>

#include "common/reduce.cuh"
#include "kernels/fp8_quantize.cuh"
#include "kernels/fp8_quantize.h"

namespace speedrun {
namespace {

using namespace fp8_cast;

// ---- 1. Tile choice --------------------------------------------------------------------------

// Matrices whose amax is found ahead of those being quantised: 3 of 4.7 MB are still in L2 then.
constexpr int64_t kLookahead = 3;

// ---- 2. Device helpers -----------------------------------------------------------------------

constexpr float kMinAmax = 1e-12f, kOwnFactor = 1 / 448.0, kOldFactor = 1.12 / 448;

// What the n-th group of tiles of a refresh does: finds the amax of the first kLookahead matrices;
// then by turns quantises one and finds the amax of another; then quantises those that are left.
struct RefreshJob {
  bool finds_amax;
  int64_t matrix;

  HOST_DEVICE RefreshJob(int64_t n, int64_t matrices) {
    const int64_t ahead = matrices < kLookahead ? matrices : kLookahead;
    const int64_t turn = n - ahead, by_turns = 2 * (matrices - ahead);
    finds_amax = turn < 0 || (turn < by_turns && turn % 2 == 1);
    if (finds_amax) {
      matrix = turn < 0 ? n : turn / 2 + ahead;
    } else {
      matrix = turn < by_turns ? turn / 2 : turn - by_turns / 2;
    }
  }
};

// Scale for weights with this amax; a NaN stays one.
HOST_DEVICE inline float weight_scale(float amax, bool headroom) {
  amax = amax < kMinAmax ? kMinAmax : amax;
  return headroom ? amax * kOldFactor : round_to_bf16(amax * kOwnFactor);
}

// ---- 3. Kernel -------------------------------------------------------------------------------

// Each block draws a ticket, which says what it does (RefreshJob), and tickets that quantise a
// matrix come after all that find its amax. So a block that waits for those waits for blocks that
// run already. progress[0] counts tickets, progress[1 + w] the tiles of matrix w whose amax is in.
template <bool kAligned>
__global__ void __launch_bounds__(QuantizeTile::kThreads)
    refresh_kernel(Fp8RefreshParams p, int64_t row_tiles, int64_t col_tiles) {
  using S = QuantizeTile;
  using T = __nv_bfloat16;
  __shared__ Vec<uint8_t> tile[S::kVecs];
  __shared__ int drawn;
  if (threadIdx.x == 0) drawn = atomicAdd(p.progress, 1);
  __syncthreads();
  const int64_t tiles = row_tiles * col_tiles;
  const RefreshJob job(drawn / tiles, 2 * p.layers);
  const TileIndex at = tile_index(drawn % tiles, row_tiles, col_tiles);
  const bool is_down = job.matrix % 2 == 1;
  const int64_t layer = job.matrix / 2, own = (is_down ? p.layers : 0) + layer;
  const int64_t row = at.row_tile * S::kRows, col = at.col_tile * S::kCols;
  const T* x = static_cast<const T*>(p.bank) + (job.matrix * p.rows + row) * p.cols + col;
  const Rows<T> rows = load_rows<S, kAligned>(x, p.cols, p.rows - row, p.cols - col, threadIdx.x);
  cuda::atomic_ref<int32_t, cuda::thread_scope_device> done(p.progress[1 + job.matrix]);

  if (job.finds_amax) {
    const uint32_t greatest = block_max(max_bits(rows));
    if (threadIdx.x == 0) {
      atomicMax(p.amax + own, greatest);
      done.fetch_add(1, cuda::memory_order_release);
    }
    return;
  }
  const bool use_old = is_down && p.headroom;
  if (!use_old) {
    if (threadIdx.x == 0) {
      while (done.load(cuda::memory_order_acquire) < tiles) __nanosleep(100);
    }
    __syncthreads();
  }
  // Not from L1, which may hold an older value.
  const float amax = use_old ? p.down_amax[layer] : __uint_as_float(__ldcg(p.amax + own));
  const float scale = weight_scale(amax, use_old);
  if (drawn % tiles == 0 && threadIdx.x == 0) p.scales[own] = scale;
  const Target target(is_down ? p.down : p.up, is_down ? p.down_t : p.up_t, layer, p.rows, p.cols,
                      row, col);
  if (is_down) {
    cast_rows<S, true, kAligned>(rows, Quotients<false>{scale}, target, threadIdx.x, tile);
  } else {
    cast_rows<S, true, kAligned>(rows, Quotients<true>{scale}, target, threadIdx.x, tile);
  }
  if (target.out_t == nullptr) return;
  __syncthreads();
  store_transposed<S, kAligned>(tile, target, threadIdx.x);
}

// ---- 4. Launcher -----------------------------------------------------------------------------

}  // namespace

cudaError_t launch_fp8_refresh(const Fp8RefreshParams& p, cudaStream_t stream) {
  using S = QuantizeTile;
  if (p.layers < 0 || p.rows < 0 || p.cols < 0) return cudaErrorInvalidValue;
  if (p.layers == 0 || p.rows == 0 || p.cols == 0) return cudaSuccess;
  const int64_t row_tiles = ceil_div(p.rows, S::kRows), col_tiles = ceil_div(p.cols, S::kCols);
  const unsigned blocks = grid_size(4 * p.layers, row_tiles, col_tiles);
  if (blocks == 0) return cudaErrorInvalidValue;
  const bool aligned = outputs_are_aligned(p.up, p.up_t, p.rows, p.cols) &&
                       outputs_are_aligned(p.down, p.down_t, p.rows, p.cols) &&
                       is_aligned(p.bank, p.cols, p.cols, 0, 2);
  const auto kernel = aligned ? refresh_kernel<true> : refresh_kernel<false>;
  kernel<<<blocks, S::kThreads, 0, stream>>>(p, row_tiles, col_tiles);
  return cudaGetLastError();
}

}  // namespace speedrun
