#include <climits>

#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "kernels/normuon_step.cuh"

namespace speedrun {
namespace {

// ---- 1. Tile choice --------------------------------------------------------------------------
// Not yet measured on a GPU: the reasons below are arithmetic, for H100.

// A block has 16 whole lines: 8 warps of two rows each, or a strip of 16 columns, which is a sector
// of 32 bytes of bf16 and comes from L2, where the last product left it. So one of 8 GPUs has 144
// blocks or more of each bank of the record, for 132 multiprocessors.
constexpr int kLines = kNormuonLines;
constexpr int kThreads = 256, kWarps = kThreads / 32, kLinesPerWarp = kLines / kWarps;

// ---- 2. Device helpers -----------------------------------------------------------------------

// Sums of squares that a thread sees of its lines of strip `strip` of a matrix. By rows: lines
// thread / 32 + i * kWarps; by columns: lines of its vector of columns, thread % (kLines / kSize).
template <typename T, bool kAligned, bool kByRow>
struct LineSums {
  static constexpr int kSize = Vec<T>::kSize, kVecs = kLines / kSize;
  static constexpr int kCount = kByRow ? kLinesPerWarp : kSize;
  float sums[kCount];

  HOST_DEVICE static int line(int thread, int i) {
    return kByRow ? thread / 32 + i * kWarps : thread % kVecs * kSize + i;
  }

  HOST_DEVICE LineSums(const T* matrix, int64_t rows, int64_t cols, int64_t strip, int thread)
      : sums{} {
    const int64_t first = strip * kLines;
    if constexpr (kByRow) {
      for (int64_t col = thread % 32 * kSize; col < cols; col += 32 * kSize) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const int64_t row = first + line(thread, i);
          add_squares(load_vec<kAligned>(matrix + row * cols + col, row < rows ? cols - col : 0),
                      i);
        }
      }
    } else {
      const int64_t col = first + line(thread, 0);
#pragma unroll 4
      for (int64_t row = thread / kVecs; row < rows; row += kThreads / kVecs) {
        add_squares(load_vec<kAligned>(matrix + row * cols + col, cols - col), 0);
      }
    }
  }

 private:
  HOST_DEVICE void add_squares(const Vec<T>& vec, int row) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float value = to_float(vec.get(i));
      sums[kByRow ? row : i] += value * value;
    }
  }
};

// S of a line from its sum of squares. What it adds to |O|^2 and |O * f|^2.
HOST_DEVICE inline float2 update_line(float& second, float sum, int64_t size, double beta2) {
  const auto weight = static_cast<float>(1 - beta2);
  const float mean = divide(sum, static_cast<float>(size)), difference = mean - second;
  second = weight < 0.5f ? second + weight * difference : mean - difference * (1 - weight);
  const float factor = line_factor(second);
  return make_float2(sum, sum * factor * factor);
}

// ---- 3. Kernel -------------------------------------------------------------------------------

// S of kLines lines, and their share of the matrix's squares.
template <typename T, bool kAligned, bool kByRow>
__global__ void __launch_bounds__(kThreads) second_kernel(NormuonParams p, int64_t strips) {
  using Sums = LineSums<T, kAligned, kByRow>;
  __shared__ float of_warp[kByRow ? 1 : kWarps][kLines];
  const int64_t matrix = blockIdx.x / strips, strip = blockIdx.x % strips;
  Sums sums(static_cast<const T*>(p.o) + matrix * p.rows * p.cols, p.rows, p.cols, strip,
            threadIdx.x);
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < Sums::kCount; ++i) {
    // By columns, the lanes that are a multiple of kVecs apart have the same ones.
    const float sum = kByRow ? group_sum<32>(sums.sums[i]) : strided_sum<Sums::kVecs>(sums.sums[i]);
    if (lane < (kByRow ? 1 : Sums::kVecs)) {
      of_warp[kByRow ? 0 : threadIdx.x / 32][Sums::line(threadIdx.x, i)] = sum;
    }
  }
  __syncthreads();
  if (threadIdx.x >= 32) return;
  const int64_t lines = kByRow ? p.rows : p.cols, line = strip * kLines + lane;
  float2 squares = make_float2(0, 0);
  if (lane < kLines && line < lines) {
    float sum = 0;
#pragma unroll
    for (const auto& sums_of_warp : of_warp) sum += sums_of_warp[lane];
    squares = update_line(p.second[matrix * lines + line], sum, kByRow ? p.cols : p.rows, p.beta2);
  }
  squares = make_float2(group_sum<32>(squares.x), group_sum<32>(squares.y));
  if (lane == 0) p.partials[blockIdx.x] = squares;
}

// ---- 4. Launcher -----------------------------------------------------------------------------

template <typename T, bool kAligned>
cudaError_t launch_lines(const NormuonParams& p, cudaStream_t stream) {
  const int64_t strips = normuon_partials(p.rows, p.cols);
  if (p.batch > INT_MAX / strips) return cudaErrorInvalidValue;
  const auto blocks = static_cast<unsigned>(p.batch * strips);
  const auto kernel =
      p.rows >= p.cols ? second_kernel<T, kAligned, true> : second_kernel<T, kAligned, false>;
  kernel<<<blocks, kThreads, 0, stream>>>(p, strips);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_lines(const NormuonParams& p, bool aligned, cudaStream_t stream) {
  return aligned ? launch_lines<T, true>(p, stream) : launch_lines<T, false>(p, stream);
}

}  // namespace

cudaError_t launch_normuon_second(const NormuonParams& p, bool aligned, cudaStream_t stream) {
  switch (p.o_dtype) {
    case DType::kFloat16:
      return launch_lines<__half>(p, aligned, stream);
    case DType::kBFloat16:
      return launch_lines<__nv_bfloat16>(p, aligned, stream);
    case DType::kFloat32:
      return launch_lines<float>(p, aligned, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace speedrun
