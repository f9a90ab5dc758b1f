#include "common/reduce.cuh"
#include "kernels/fp8_quantize.cuh"
#include "kernels/normuon_step.cuh"

namespace speedrun {
namespace {

using namespace fp8_cast;

// ---- 1. Tile choice --------------------------------------------------------------------------
// Not yet measured on a GPU: the reasons below are arithmetic, for H100.

// 64 x 128: 216 blocks for a share of 3 matrices of 768 x 768. A thread has all of its 64 elements
// in flight: 384 bytes of bf16 O, W and low bits.
using UpdateTile = Tile<4, 8>;

// ---- 2. Device helpers -----------------------------------------------------------------------

HOST_DEVICE inline float norm_ratio(float2 squares) {
  return divide(square_root(squares.x), at_least(square_root(squares.y), kNormuonMin));
}

// A matrix's numbers, and one element's update.
struct Update {
  float lr, decay_lr, wd;
  bool cautious;

  HOST_DEVICE Update(const NormuonParams& p, int64_t matrix)
      : lr(static_cast<float>(p.lr[matrix])),
        decay_lr(static_cast<float>(p.decay_lr[matrix])),
        wd(static_cast<float>(*p.wd)),
        cautious(p.cautious) {}

  HOST_DEVICE float operator()(float w, float o) const {
    const float shrinks = !cautious || multiply(o, w) >= 0 ? w : 0;
    const float decay = multiply(multiply(shrinks, wd), decay_lr);
    return add(add(w, -decay), -multiply(o, lr));
  }
};

HOST_DEVICE inline uint32_t join_bits(uint16_t upper, uint16_t low, bool nearest) {
  const uint32_t wide = nearest ? static_cast<int16_t>(low) : low;
  return (uint32_t{upper} << 16) + wide;
}

HOST_DEVICE inline uint16_t upper_bits(uint32_t exact, bool nearest) {
  return (nearest ? exact + 0x8000 : exact) >> 16;
}

// 16 elements of O in each of a thread's passes, W and the low bits of what is exact.
template <typename T, typename W, bool kLow, bool kAligned>
struct Elements {
  using S = UpdateTile;
  static constexpr int kSize = Vec<W>::kSize;  // where there are low bits, theirs too
  int64_t row, col;
  Rows<T> o;
  Rows<W> weights;
  Rows<uint16_t> low;

  HOST_DEVICE Elements(const NormuonParams& p, const TileIndex& at, int thread)
      : row(at.row_tile * S::kRows), col(at.col_tile * S::kCols) {
    const auto load = [&](const auto* tensor) {
      return load_rows<S, kAligned>(tensor + (at.batch * p.rows + row) * p.cols + col, p.cols,
                                    p.rows - row, p.cols - col, thread);
    };
    o = load(static_cast<const T*>(p.o));
    weights = load(static_cast<const W*>(p.weight));
    if constexpr (kLow) low = load(static_cast<const uint16_t*>(p.low));
    row += row_of<S>(thread, 0);
    col += thread % S::kColVecs * 16;
  }

  // New weights, in registers and in memory.
  HOST_DEVICE void update(const NormuonParams& p, int64_t matrix, float ratio) {
    const Update update(p, matrix);
    const bool by_row = p.rows >= p.cols;
    const float* second = p.second ? p.second + matrix * (by_row ? p.rows : p.cols) : nullptr;
    float factors[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const bool own = second && !by_row && col + i < p.cols;
      factors[i] = own ? multiply(line_factor(second[col + i]), ratio) : 1;
    }
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      int64_t at_row = row + pass * S::kRowsPerPass;
#ifdef __CUDA_ARCH__
      // The addresses of unaligned rows are not kept for all passes, which would spill registers.
      if constexpr (!kAligned) asm volatile("" : "+l"(at_row));
#endif
      if (second && by_row && at_row < p.rows) {
        const float factor = multiply(line_factor(second[at_row]), ratio);
#pragma unroll
        for (float& each : factors) each = factor;
      }
      update_row(p, update, pass, factors);
      const auto start = [&](auto* tensor) {
        return row_start<kAligned>(tensor, matrix * p.rows + at_row, p.cols) + col;
      };
      const int64_t count = at_row < p.rows ? p.cols - col : 0;
      store(start(static_cast<W*>(p.weight)), weights.vecs[pass], count);
      if constexpr (kLow) store(start(p.low), low.vecs[pass], count);
    }
  }

 private:
  HOST_DEVICE void update_row(const NormuonParams& p, const Update& update, int pass,
                              const float (&factors)[16]) {
    float values[16];
    o.get(pass, values);
    Vec<W> new_weights[Rows<W>::kVecs] = {};
    Vec<uint16_t> new_low[Rows<uint16_t>::kVecs] = {};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float direction = to_float(from_float<T>(multiply(values[i], factors[i])));
      const W old = weights.vecs[pass][i / kSize].get(i % kSize);
      W updated;
      if constexpr (kLow) {
        const uint16_t old_low = low.vecs[pass][i / kSize].get(i % kSize);
        const uint32_t bits = join_bits(std::bit_cast<uint16_t>(old), old_low, p.nearest);
        const float exact = update(std::bit_cast<float>(bits), direction);
        const auto new_bits = std::bit_cast<uint32_t>(exact);
        updated = std::bit_cast<W>(upper_bits(new_bits, p.nearest));
        new_low[i / kSize].fill(i % kSize, static_cast<uint16_t>(new_bits));
      } else {
        updated = from_float<W>(update(to_float(old), direction));
      }
      new_weights[i / kSize].fill(i % kSize, updated);
    }
#pragma unroll
    for (int i = 0; i < Rows<W>::kVecs; ++i) weights.vecs[pass][i] = new_weights[i];
#pragma unroll
    for (int i = 0; i < Rows<uint16_t>::kVecs; ++i) low.vecs[pass][i] = new_low[i];
  }

  template <typename E, int kVecs>
  HOST_DEVICE static void store(E* target, const Vec<E> (&vecs)[kVecs], int64_t count) {
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int start = i * Vec<E>::kSize;
      store_vec<kAligned>(target + start, vecs[i], count - start);
    }
  }
};

// ---- 3. Kernels ------------------------------------------------------------------------------

// |O|^2 and |O * f|^2, the same in each thread and each block.
__device__ inline float2 sum_partials(const float2* partials, int64_t count) {
  __shared__ float2 of_warp[UpdateTile::kThreads / 32];
  float2 sum = make_float2(0, 0);
  for (int64_t i = threadIdx.x; i < count; i += UpdateTile::kThreads) {
    sum.x += partials[i].x;
    sum.y += partials[i].y;
  }
  sum = make_float2(group_sum<32>(sum.x), group_sum<32>(sum.y));
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = make_float2(0, 0);
#pragma unroll
  for (const float2& each : of_warp) {
    sum.x += each.x;
    sum.y += each.y;
  }
  return sum;
}

template <typename T, typename W, bool kLow, bool kAligned>
__global__ void __launch_bounds__(UpdateTile::kThreads)
    update_kernel(NormuonParams p, int64_t row_tiles, int64_t col_tiles) {
  using S = UpdateTile;
  __shared__ Vec<uint8_t> tile[S::kVecs];
  const TileIndex at = tile_index(blockIdx.x, row_tiles, col_tiles);
  Elements<T, W, kLow, kAligned> elements(p, at, threadIdx.x);
  float ratio = 1;
  if (p.second != nullptr) {
    const int64_t count = normuon_partials(p.rows, p.cols);
    ratio = norm_ratio(sum_partials(p.partials + at.batch * count, count));
  }
  elements.update(p, at.batch, ratio);
  if (p.scale == nullptr) return;
  const uint32_t greatest = block_max(max_bits(elements.weights));
  if (threadIdx.x == 0) atomicMax(reinterpret_cast<uint32_t*>(p.amax + at.batch), greatest);
  const Target target(p.out, p.out_t, at.batch, p.rows, p.cols, at.row_tile * S::kRows,
                      at.col_tile * S::kCols);
  const Quotients<false> quotients{p.scale[at.batch]};
  cast_rows<S, true, kAligned>(elements.weights, quotients, target, threadIdx.x, tile);
  if (p.out_t == nullptr) return;
  __syncthreads();
  store_transposed<S, kAligned>(tile, target, threadIdx.x);
}

// ---- 4. Launcher -----------------------------------------------------------------------------

bool all_aligned(const NormuonParams& p) {
  const auto rows_are = [&](const void* tensor, int bytes) {
    return is_aligned(tensor, p.cols, p.cols, 0, bytes);
  };
  return rows_are(p.weight, element_bytes(p.weight_dtype)) && rows_are(p.low, 2) &&
         rows_are(p.o, element_bytes(p.o_dtype)) &&
         (!p.out || outputs_are_aligned(p.out, nullptr, p.rows, p.cols)) &&
         (!p.out_t || is_aligned(p.out_t, p.rows, p.rows, 0, 1));
}

template <typename T, bool kAligned>
cudaError_t launch(const NormuonParams& p, cudaStream_t stream) {
  using S = UpdateTile;
  const int64_t row_tiles = ceil_div(p.rows, S::kRows), col_tiles = ceil_div(p.cols, S::kCols);
  const unsigned blocks = grid_size(p.batch, row_tiles, col_tiles);
  if (blocks == 0) return cudaErrorInvalidValue;
  if (p.second != nullptr) {
    const cudaError_t error = launch_normuon_second(p, kAligned, stream);
    if (error != cudaSuccess) return error;
  }
  const auto kernel = p.weight_dtype == DType::kFloat32 ? update_kernel<T, float, false, kAligned>
                      : p.low ? update_kernel<T, __nv_bfloat16, true, kAligned>
                              : update_kernel<T, __nv_bfloat16, false, kAligned>;
  kernel<<<blocks, S::kThreads, 0, stream>>>(p, row_tiles, col_tiles);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch(const NormuonParams& p, cudaStream_t stream) {
  return all_aligned(p) ? launch<T, true>(p, stream) : launch<T, false>(p, stream);
}

}  // namespace

cudaError_t launch_normuon_step(const NormuonParams& p, cudaStream_t stream) {
  const bool wide = p.weight_dtype == DType::kFloat32;
  if (!wide && p.weight_dtype != DType::kBFloat16) return cudaErrorInvalidValue;
  if (p.batch < 0 || p.rows < 0 || p.cols < 0 || (wide && p.low)) return cudaErrorInvalidValue;
  if (p.batch == 0 || p.rows == 0 || p.cols == 0) return cudaSuccess;
  switch (p.o_dtype) {
    case DType::kFloat16:
      return launch<__half>(p, stream);
    case DType::kBFloat16:
      return launch<__nv_bfloat16>(p, stream);
    case DType::kFloat32:
      return launch<float>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace speedrun
