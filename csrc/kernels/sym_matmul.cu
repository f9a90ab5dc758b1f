// sym_matmul in bf16, and the launcher. Tile choice: kernels/sym_matmul_tiles.h; the kernel:
// kernels/sym_matmul.cuh.
#include "kernels/sym_matmul.cuh"

namespace speedrun {
namespace {

// Parts of a square, each copied by one thread block of kPart x kRows threads.
constexpr int kPart = 32, kRows = 8, kPartsPerSide = kSquare / kPart;
constexpr int kPartsPerSquare = kPartsPerSide * (kPartsPerSide + 1) / 2;

// Copies what is below the diagonal to above it, in the squares on the diagonal: block (x, y) takes
// part y % kPartsPerSquare of square y / kPartsPerSquare of matrix x.
__global__ void __launch_bounds__(kPart* kRows)
    sym_matmul_mirror_kernel(uint16_t* out, int64_t n, int64_t row_stride, int64_t batch_stride) {
  __shared__ uint16_t part[kPart][kPart + 2];  // columns 17 words apart: no bank is asked twice
  const Square place = square_at(blockIdx.y % kPartsPerSquare);
  const int64_t start = int64_t{blockIdx.y / kPartsPerSquare} * kSquare;
  const int64_t top = start + place.row * kPart, left = start + place.col * kPart;
  out += blockIdx.x * batch_stride;
  for (int i = threadIdx.y; i < kPart; i += kRows) {
    const int64_t row = top + i, col = left + threadIdx.x;
    if (row < n && col < n) part[i][threadIdx.x] = out[row * row_stride + col];
  }
  __syncthreads();
  for (int i = threadIdx.y; i < kPart; i += kRows) {
    const int64_t row = left + i, col = top + threadIdx.x;
    if (row < col && row < n && col < n) out[row * row_stride + col] = part[threadIdx.x][i];
  }
}

cudaError_t launch_mirror(const SymMatmulParams& p, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(p.batch),
                        static_cast<unsigned>(squares_per_side(p.n) * kPartsPerSquare));
  config.blockDim = dim3(kPart, kRows);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, sym_matmul_mirror_kernel, static_cast<uint16_t*>(p.out), p.n,
                            p.out_row_stride, p.out_batch_stride);
}

cudaError_t launch_triangle(const SymMatmulParams& p, int num_sms, cudaStream_t stream) {
  switch (p.dtype) {
    case DType::kBFloat16:
      return launch_sym_matmul_of<sm90::Element<DType::kBFloat16>>(p, num_sms, stream);
    case DType::kFloat16:
      return launch_sym_matmul_fp16(p, num_sms, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch_sym_matmul(const SymMatmulParams& p, cudaStream_t stream) {
  if (p.batch < 0 || p.n < 0 || p.k <= 0) return cudaErrorInvalidValue;
  if (p.transposed && (p.b != p.a || p.b_row_stride != p.a_row_stride)) {
    return cudaErrorInvalidValue;
  }
  if (p.beta != 0.f && p.c == nullptr) return cudaErrorInvalidValue;
  if (p.batch == 0 || p.n == 0) return cudaSuccess;
  int num_sms;
  cudaError_t error = sm90::count_sms(&num_sms);
  if (error != cudaSuccess) return error;
  error = launch_triangle(p, num_sms, stream);
  // A matrix times itself: of both halves every product and the order of the sums are the same.
  return error != cudaSuccess || p.b == p.a ? error : launch_mirror(p, stream);
}

}  // namespace speedrun
