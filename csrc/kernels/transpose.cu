#include <climits>

#include "common/int_math.h"
#include "common/vec.cuh"
#include "kernels/transpose.h"

namespace speedrun {
namespace {

// ---- 1. Tile choice --------------------------------------------------------------------------
// Not yet measured on a GPU: the reasons below are arithmetic, for H100 (14.5 B/clk/SM of HBM).

// A thread reads a square block: as many rows as elements fit in 16 bytes. So both its loads and,
// once transposed in registers, its stores to shared memory are 16 bytes wide.
template <typename T>
constexpr int kBlockEdge = Vec<T>::kSize;  // 16, 8 or 4

template <typename T>
struct Tile {
  // Blocks along each edge of a tile. Bytes and 2-byte types: 8, which makes a row of the tile one
  // 128-byte line on both sides. 4 bytes: 16, since 8 would give tiles of 4 KB, about one block
  // launch in 4 clocks on the whole GPU.
  static constexpr int kEdgeBlocks = sizeof(T) == 4 ? 16 : 8;
  // Side of a tile in elements: 128, 64, 64 (so 16, 8, 16 KB of shared memory, none of it padding).
  static constexpr int kEdge = kEdgeBlocks * kBlockEdge<T>;
  // One thread a block: 64 threads with 256 or 128 bytes in flight each, or 256 with 64. By
  // registers 8 or more such thread blocks share an SM: 64 KB or more in flight, and it takes
  // 14.5 B/clk x 700 clk = 10 KB to hide the latency of HBM.
  static constexpr int kThreads = kEdgeBlocks * kEdgeBlocks;
};

// ---- 2. Device helpers -----------------------------------------------------------------------

// Phase 1: thread `thread` reads its block and leaves it transposed in `tile`, whose rows are the
// output's rows. tile: (kEdge, kEdge), 16-byte vectors swizzled by block row.
template <typename T, bool kAligned>
HOST_DEVICE inline void read_block(const T* in, int64_t row_stride, int64_t rows_left,
                                   int64_t cols_left, int thread, Vec<T>* tile) {
  constexpr int kEdge = kBlockEdge<T>;
  constexpr int kPerWord = 4 / sizeof(T);
  constexpr int kRowVecs = Tile<T>::kEdgeBlocks;
  const int block_row = thread / kRowVecs, block_col = thread % kRowVecs;
  const int row = block_row * kEdge, col = block_col * kEdge;

  Vec<T> block[kEdge];
  in += row * row_stride + col;
#pragma unroll
  for (int i = 0; i < kEdge; ++i) {
    block[i] = load_vec<kAligned>(in + i * row_stride, row + i < rows_left ? cols_left - col : 0);
  }
#pragma unroll
  for (int w = 0; w < 4; ++w) {  // word w of each row holds kPerWord columns
    Vec<T> columns[kPerWord];
#pragma unroll
    for (int k = 0; k < 4; ++k) {  // word k of a column holds rows from k * kPerWord on
      uint32_t words[kPerWord];
#pragma unroll
      for (int i = 0; i < kPerWord; ++i) words[i] = block[k * kPerWord + i].words[w];
      transpose_words(words);
#pragma unroll
      for (int i = 0; i < kPerWord; ++i) columns[i].words[k] = words[i];
    }
#pragma unroll
    for (int i = 0; i < kPerWord; ++i) {
      const int out_row = col + w * kPerWord + i;
      store16(&tile[out_row * kRowVecs + swizzle(block_col, block_row)], columns[i]);
    }
  }
}

// Phase 2: thread `thread` moves, or adds, vectors of the tile to the output's rows.
template <typename T, bool kAligned, bool kAdd>
HOST_DEVICE inline void write_rows(const Vec<T>* tile, int thread, T* out, int64_t row_stride,
                                   int64_t rows_left, int64_t cols_left) {
  constexpr int kRowVecs = Tile<T>::kEdgeBlocks;
  const int vec_index = thread % kRowVecs;
  const int64_t count = cols_left - vec_index * Vec<T>::kSize;
  out += vec_index * Vec<T>::kSize;
#pragma unroll
  for (int i = 0; i < kBlockEdge<T>; ++i) {
    const int row = thread / kRowVecs + i * (Tile<T>::kThreads / kRowVecs);
    const int64_t row_count = row < rows_left ? count : 0;
    T* target = row_start<kAligned>(out, row, row_stride);
    Vec<T> vec = load16<T>(&tile[row * kRowVecs + swizzle(row / kBlockEdge<T>, vec_index)]);
    if constexpr (kAdd) {
      const Vec<T> old = load_vec<kAligned>(static_cast<const T*>(target), row_count);
      Vec<T> sum{};
#pragma unroll
      for (int j = 0; j < Vec<T>::kSize; ++j) {
        sum.fill(j, from_float<T>(to_float(old.get(j)) + to_float(vec.get(j))));
      }
      vec = sum;
    }
    store_vec<kAligned>(target, vec, row_count);
  }
}

// Where a tile lies in the input and in the output, and what is left of both from there on.
template <typename T>
struct Corner {
  const T* in;  // (rows, cols), stride p.in_row_stride
  T* out;       // (cols, rows), stride p.out_row_stride
  int64_t rows, cols;

  HOST_DEVICE Corner(const TransposeParams& p, int64_t tile, int64_t row_tiles, int64_t col_tiles) {
    const TileIndex at = tile_index(tile, row_tiles, col_tiles);
    const int64_t row = at.row_tile * Tile<T>::kEdge, col = at.col_tile * Tile<T>::kEdge;
    in = static_cast<const T*>(p.in) + at.batch * p.in_batch_stride + row * p.in_row_stride + col;
    out = static_cast<T*>(p.out) + at.batch * p.out_batch_stride + col * p.out_row_stride + row;
    rows = p.rows - row;
    cols = p.cols - col;
  }
};

// ---- 3. Kernel -------------------------------------------------------------------------------

template <typename T, bool kAlignedIn, bool kAlignedOut, bool kAdd>
__global__ void __launch_bounds__(Tile<T>::kThreads)
    transpose_kernel(TransposeParams p, int64_t row_tiles, int64_t col_tiles) {
  __shared__ Vec<T> tile[Tile<T>::kEdge * Tile<T>::kEdgeBlocks];
  const Corner<T> corner(p, blockIdx.x, row_tiles, col_tiles);
  read_block<T, kAlignedIn>(corner.in, p.in_row_stride, corner.rows, corner.cols, threadIdx.x,
                            tile);
  __syncthreads();
  write_rows<T, kAlignedOut, kAdd>(tile, threadIdx.x, corner.out, p.out_row_stride, corner.cols,
                                   corner.rows);
}

// ---- 4. Launcher -----------------------------------------------------------------------------

template <typename T, bool kAdd>
cudaError_t launch(const TransposeParams& p, cudaStream_t stream) {
  const int64_t row_tiles = ceil_div(p.rows, Tile<T>::kEdge);
  const int64_t col_tiles = ceil_div(p.cols, Tile<T>::kEdge);
  if (row_tiles > INT_MAX / col_tiles || row_tiles * col_tiles > INT_MAX / p.batch) {
    return cudaErrorInvalidValue;
  }
  const bool in = is_aligned(p.in, p.cols, p.in_row_stride, p.in_batch_stride, sizeof(T));
  const bool out = is_aligned(p.out, p.rows, p.out_row_stride, p.out_batch_stride, sizeof(T));
  const auto kernel =
      in ? (out ? transpose_kernel<T, true, true, kAdd> : transpose_kernel<T, true, false, kAdd>)
         : (out ? transpose_kernel<T, false, true, kAdd> : transpose_kernel<T, false, false, kAdd>);
  const auto num_blocks = static_cast<unsigned>(row_tiles * col_tiles * p.batch);
  kernel<<<num_blocks, Tile<T>::kThreads, 0, stream>>>(p, row_tiles, col_tiles);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_transpose(const TransposeParams& p, cudaStream_t stream) {
  if (p.batch < 0 || p.rows < 0 || p.cols < 0) return cudaErrorInvalidValue;
  const bool empty = p.batch == 0 || p.rows == 0 || p.cols == 0;
  if (p.add) {
    switch (p.dtype) {
      case DType::kFloat16:
        return empty ? cudaSuccess : launch<__half, true>(p, stream);
      case DType::kBFloat16:
        return empty ? cudaSuccess : launch<__nv_bfloat16, true>(p, stream);
      case DType::kFloat32:
        return empty ? cudaSuccess : launch<float, true>(p, stream);
      default:
        return cudaErrorInvalidValue;
    }
  }
  if (empty) return cudaSuccess;
  switch (element_bytes(p.dtype)) {  // to be moved, only the size of an element matters
    case 1:
      return launch<uint8_t, false>(p, stream);
    case 2:
      return launch<uint16_t, false>(p, stream);
    case 4:
      return launch<uint32_t, false>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace speedrun
