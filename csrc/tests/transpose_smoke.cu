// Runs the transpose over sizes, alignments and types against a plain loop: on the GPU if there is
// one (made for compute-sanitizer), and always on the host, where the kernel's two phases run
// thread after thread, with a shared-memory tile that is full of garbage before.
#include <cstdio>
#include <cstring>
#include <vector>

#include "common/cuda_check.h"
#include "kernels/transpose.cu"

namespace speedrun {
namespace {

struct Shape {
  int64_t batch, rows, cols;
  int64_t in_padding, out_padding;  // elements between the end of a row and the next row
};

constexpr Shape kShapes[] = {
    {1, 128, 128, 0, 0},  // one tile (bytes), four (others), aligned
    {2, 256, 64, 0, 16},  // aligned, with a padded output
    {1, 48, 272, 0, 0},   // aligned, edge tiles on both sides
    {3, 33, 65, 0, 0},    // nothing aligned
    {1, 64, 65, 0, 0},    // only the output aligned
    {1, 65, 64, 16, 0},   // only the input aligned
    {1, 1, 200, 0, 0},    // one row
    {1, 200, 1, 0, 0},    // one column
    {1, 1, 1, 0, 0},
};

// The kernel's body on the host.
template <typename T, bool kAlignedIn, bool kAlignedOut, bool kAdd>
void run_on_host(const TransposeParams& p) {
  constexpr int kEdge = Tile<T>::kEdge;
  const int64_t row_tiles = ceil_div(p.rows, kEdge), col_tiles = ceil_div(p.cols, kEdge);
  std::vector<Vec<T>> tile(kEdge * Tile<T>::kEdgeBlocks);
  for (int64_t i = 0; i < p.batch * row_tiles * col_tiles; ++i) {
    std::memset(static_cast<void*>(tile.data()), 0xa5, tile.size() * sizeof(Vec<T>));
    for (int phase = 0; phase < 2; ++phase) {
      for (int thread = 0; thread < Tile<T>::kThreads; ++thread) {
        const Corner<T> corner(p, i, row_tiles, col_tiles);
        if (phase == 0) {
          read_block<T, kAlignedIn>(corner.in, p.in_row_stride, corner.rows, corner.cols, thread,
                                    tile.data());
        } else {
          write_rows<T, kAlignedOut, kAdd>(tile.data(), thread, corner.out, p.out_row_stride,
                                           corner.cols, corner.rows);
        }
      }
    }
  }
}

template <typename T, bool kAdd>
void run_aligned_on_host(const TransposeParams& p) {
  const bool in = is_aligned(p.in, p.cols, p.in_row_stride, p.in_batch_stride, sizeof(T));
  const bool out = is_aligned(p.out, p.rows, p.out_row_stride, p.out_batch_stride, sizeof(T));
  if (in && out) run_on_host<T, true, true, kAdd>(p);
  if (in && !out) run_on_host<T, true, false, kAdd>(p);
  if (!in && out) run_on_host<T, false, true, kAdd>(p);
  if (!in && !out) run_on_host<T, false, false, kAdd>(p);
}

void run_on_gpu(TransposeParams p, size_t in_bytes, size_t out_bytes) {
  void *in, *out;
  CUDA_CHECK(cudaMalloc(&in, in_bytes));
  CUDA_CHECK(cudaMalloc(&out, out_bytes));
  CUDA_CHECK(cudaMemcpy(in, p.in, in_bytes, cudaMemcpyHostToDevice));
  CUDA_CHECK(cudaMemcpy(out, p.out, out_bytes, cudaMemcpyHostToDevice));
  void* result = p.out;
  p.in = in;
  p.out = out;
  CUDA_CHECK(launch_transpose(p, nullptr));
  CUDA_CHECK(cudaMemcpy(result, out, out_bytes, cudaMemcpyDeviceToHost));
  CUDA_CHECK(cudaFree(in));
  CUDA_CHECK(cudaFree(out));
}

// Whether a run gives exactly the plain loop's output, gaps between rows included.
template <typename T, bool kAdd>
bool agrees(const Shape& s, DType dtype, bool gpu) {
  const int64_t in_row = s.cols + s.in_padding, out_row = s.rows + s.out_padding;
  std::vector<T> in(s.batch * s.rows * in_row), out(s.batch * s.cols * out_row);
  uint32_t state = 1;
  const auto next = [&state] { return state = state * 1664525u + 1013904223u; };
  for (auto* values : {&in, &out}) {
    for (T& value : *values) {
      if constexpr (kAdd) {  // any finite numbers whose sum may need rounding
        value = from_float<T>(static_cast<float>(static_cast<int32_t>(next())) / (1 << 24));
      } else {
        value = static_cast<T>(next() >> 8);
      }
    }
  }
  std::vector<T> expected = out;
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t m = 0; m < s.rows; ++m) {
      for (int64_t n = 0; n < s.cols; ++n) {
        const T from = in[(b * s.rows + m) * in_row + n];
        T& to = expected[(b * s.cols + n) * out_row + m];
        if constexpr (kAdd) {
          to = from_float<T>(to_float(to) + to_float(from));
        } else {
          to = from;
        }
      }
    }
  }
  const TransposeParams p{in.data(), out.data(),       s.batch, s.rows, s.cols, s.rows * in_row,
                          in_row,    s.cols * out_row, out_row, dtype,  kAdd};
  if (gpu) {
    run_on_gpu(p, in.size() * sizeof(T), out.size() * sizeof(T));
  } else {
    run_aligned_on_host<T, kAdd>(p);
  }
  return std::memcmp(out.data(), expected.data(), out.size() * sizeof(T)) == 0;
}

int count_failures(bool gpu) {
  int failures = 0;
  for (const Shape& s : kShapes) {
    const bool results[] = {
        agrees<uint8_t, false>(s, DType::kFloat8E5M2, gpu),
        agrees<uint16_t, false>(s, DType::kBFloat16, gpu),
        agrees<uint32_t, false>(s, DType::kFloat32, gpu),
        agrees<__half, true>(s, DType::kFloat16, gpu),
        agrees<__nv_bfloat16, true>(s, DType::kBFloat16, gpu),
        agrees<float, true>(s, DType::kFloat32, gpu),
    };
    for (int i = 0; i < 6; ++i) {
      if (results[i]) continue;
      std::printf("%s: shape (%ld, %ld, %ld), type %d: wrong\n", gpu ? "GPU" : "host",
                  static_cast<long>(s.batch), static_cast<long>(s.rows), static_cast<long>(s.cols),
                  i);
      ++failures;
    }
  }
  return failures;
}

}  // namespace
}  // namespace speedrun

int main() {
  int failures = speedrun::count_failures(false);
  std::printf("transpose on the host: %d wrong\n", failures);
  int num_devices = 0;
  if (cudaGetDeviceCount(&num_devices) == cudaSuccess && num_devices > 0) {
    const int gpu_failures = speedrun::count_failures(true);
    std::printf("transpose on the GPU: %d wrong\n", gpu_failures);
    failures += gpu_failures;
  } else {
    std::puts("transpose on the GPU: not run, there is none");
  }
  return failures != 0;
}
