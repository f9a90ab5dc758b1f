#include "common/reduce.cuh"
#include "kernels/fp8_quantize.cuh"
#include "kernels/fp8_quantize.h"

namespace speedrun {
namespace {

using namespace fp8_cast;

// ---- 1. Tile choice --------------------------------------------------------------------------
// Not yet measured on a GPU: the reasons below are arithmetic, for H100.

// A block owns whole rows and walks along them, 64 x 256 at a time: 3 steps for a width of 768, and
// 256 blocks for 16,384 tokens, where 128 rows would make fewer blocks than there are SMs.
using NormTile = Tile<4, 16>;

// ---- 2. Device helpers -----------------------------------------------------------------------

// Sum of squares that this thread sees of each of its rows.
template <typename T>
HOST_DEVICE inline void add_squares(const Rows<T>& rows, float (&sums)[kPasses]) {
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    float values[16];
    rows.get(pass, values);
#pragma unroll
    for (float value : values) sums[pass] += value * value;
  }
}

// Turns the rows' sums of squares into what to multiply the rows by.
HOST_DEVICE inline void to_factors(float (&sums)[kPasses], float inverse_cols, float eps) {
#pragma unroll
  for (float& sum : sums) {
    sum = divide(1.0f, square_root(add(multiply(sum, inverse_cols), eps)));
  }
}

// What cast_rows casts after a norm: bf16(x * factor) / scale; stores that bf16 if y isn't null.
template <typename S, bool kAligned>
struct NormQuotients {
  float scale;
  float factors[kPasses];
  __nv_bfloat16* y;  // at the tile's corner, or null
  int64_t row_stride, rows_left, cols_left;
  int thread;

  HOST_DEVICE void operator()(int pass, float (&values)[16]) const {
    Vec<__nv_bfloat16> norm[2] = {};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const auto rounded = from_float<__nv_bfloat16>(values[i] * factors[pass]);
      norm[i / 8].fill(i % 8, rounded);
      values[i] = divide(to_float(rounded), scale);
    }
    if (y == nullptr) return;
    const int row = row_of<S>(thread, pass), col = thread % S::kColVecs * 16;
    const int64_t count = row < rows_left ? cols_left - col : 0;
    __nv_bfloat16* target = row_start<kAligned>(y, row, row_stride) + col;
    store_vec<kAligned>(target, norm[0], count);
    store_vec<kAligned>(target + 8, norm[1], count - 8);
  }
};

// ---- 3. Kernels ------------------------------------------------------------------------------

template <typename T, bool kE4M3, bool kAligned>
__global__ void __launch_bounds__(QuantizeTile::kThreads)
    quantize_kernel(Fp8QuantizeParams p, int64_t row_tiles, int64_t col_tiles) {
  using S = QuantizeTile;
  __shared__ Vec<uint8_t> tile[S::kVecs];
  const TileIndex at = tile_index(blockIdx.x, row_tiles, col_tiles);
  const int64_t row = at.row_tile * S::kRows, col = at.col_tile * S::kCols;
  const Target target(p.out, p.out_t, at.batch, p.rows, p.cols, row, col);
  const T* x =
      static_cast<const T*>(p.x) + at.batch * p.x_batch_stride + row * p.x_row_stride + col;
  const Rows<T> rows =
      load_rows<S, kAligned>(x, p.x_row_stride, target.rows_left, target.cols_left, threadIdx.x);
  const Quotients<false> quotients{*p.scale};
  cast_rows<S, kE4M3, kAligned>(rows, quotients, target, threadIdx.x, tile);
  if (p.amax != nullptr) {
    const uint32_t greatest = block_max(max_bits(rows));
    if (threadIdx.x == 0) atomicMax(reinterpret_cast<uint32_t*>(p.amax), greatest);
  }
  if (p.out_t == nullptr) return;
  __syncthreads();
  store_transposed<S, kAligned>(tile, target, threadIdx.x);
}

// The 1: on sm_80, ptxas would rather spill a little to fit two blocks into a multiprocessor.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(NormTile::kThreads, 1)
    rms_norm_quantize_kernel(Fp8QuantizeParams p, int64_t row_tiles, float inverse_cols) {
  using S = NormTile;
  __shared__ Vec<uint8_t> tile[S::kVecs];
  const TileIndex at = tile_index(blockIdx.x, row_tiles, 1);
  const int64_t row = at.row_tile * S::kRows;
  const T* x = static_cast<const T*>(p.x) + at.batch * p.x_batch_stride + row * p.x_row_stride;

  NormQuotients<S, kAligned> quotients{};
  for (int64_t col = 0; col < p.cols; col += S::kCols) {
    add_squares(
        load_rows<S, kAligned>(x + col, p.x_row_stride, p.rows - row, p.cols - col, threadIdx.x),
        quotients.factors);
  }
#pragma unroll
  for (float& sum : quotients.factors) sum = group_sum<S::kColVecs>(sum);
  to_factors(quotients.factors, inverse_cols, p.eps);
  quotients.scale = *p.scale;
  quotients.row_stride = p.cols;
  quotients.rows_left = p.rows - row;
  quotients.thread = threadIdx.x;

  for (int64_t col = 0; col < p.cols; col += S::kCols) {
    const Target target(p.out, p.out_t, at.batch, p.rows, p.cols, row, col);
    const int64_t y_offset = (at.batch * p.rows + row) * p.cols + col;
    quotients.y = p.y ? static_cast<__nv_bfloat16*>(p.y) + y_offset : nullptr;
    quotients.cols_left = p.cols - col;
    const Rows<T> rows =
        load_rows<S, kAligned>(x + col, p.x_row_stride, p.rows - row, p.cols - col, threadIdx.x);
    cast_rows<S, true, kAligned>(rows, quotients, target, threadIdx.x, tile);
    if (p.out_t == nullptr) continue;
    __syncthreads();
    store_transposed<S, kAligned>(tile, target, threadIdx.x);
    __syncthreads();
  }
}

// ---- 4. Launchers ----------------------------------------------------------------------------

bool all_aligned(const Fp8QuantizeParams& p) {
  return outputs_are_aligned(p.out, p.out_t, p.rows, p.cols) && is_aligned(p.y, p.cols, 0, 0, 2) &&
         is_aligned(p.x, p.cols, p.x_row_stride, p.x_batch_stride, element_bytes(p.x_dtype));
}

template <typename T, bool kE4M3>
cudaError_t launch_quantize(const Fp8QuantizeParams& p, cudaStream_t stream) {
  using S = QuantizeTile;
  const int64_t row_tiles = ceil_div(p.rows, S::kRows), col_tiles = ceil_div(p.cols, S::kCols);
  const unsigned blocks = grid_size(p.batch, row_tiles, col_tiles);
  if (blocks == 0) return cudaErrorInvalidValue;
  const auto kernel =
      all_aligned(p) ? quantize_kernel<T, kE4M3, true> : quantize_kernel<T, kE4M3, false>;
  kernel<<<blocks, S::kThreads, 0, stream>>>(p, row_tiles, col_tiles);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_norm(const Fp8QuantizeParams& p, cudaStream_t stream) {
  using S = NormTile;
  const int64_t row_tiles = ceil_div(p.rows, S::kRows);
  const unsigned blocks = grid_size(p.batch, row_tiles, 1);
  if (blocks == 0) return cudaErrorInvalidValue;
  const auto kernel =
      all_aligned(p) ? rms_norm_quantize_kernel<T, true> : rms_norm_quantize_kernel<T, false>;
  const auto inverse_cols = static_cast<float>(1.0 / static_cast<double>(p.cols));
  kernel<<<blocks, S::kThreads, 0, stream>>>(p, row_tiles, inverse_cols);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch(const Fp8QuantizeParams& p, bool norm, cudaStream_t stream) {
  if (p.out_dtype == DType::kFloat8E5M2 && !norm) return launch_quantize<T, false>(p, stream);
  if (p.out_dtype != DType::kFloat8E4M3) return cudaErrorInvalidValue;
  return norm ? launch_norm<T>(p, stream) : launch_quantize<T, true>(p, stream);
}

cudaError_t launch_any(const Fp8QuantizeParams& p, bool norm, cudaStream_t stream) {
  if (p.batch < 0 || p.rows < 0 || p.cols < 0) return cudaErrorInvalidValue;
  if (p.batch == 0 || p.rows == 0 || p.cols == 0) return cudaSuccess;
  switch (p.x_dtype) {
    case DType::kFloat16:
      return launch<__half>(p, norm, stream);
    case DType::kBFloat16:
      return launch<__nv_bfloat16>(p, norm, stream);
    case DType::kFloat32:
      return launch<float>(p, norm, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch_fp8_quantize(const Fp8QuantizeParams& p, cudaStream_t stream) {
  return launch_any(p, false, stream);
}

cudaError_t launch_rms_norm_fp8_quantize(const Fp8QuantizeParams& p, cudaStream_t stream) {
  return launch_any(p, true, stream);
}

}  // namespace speedrun
