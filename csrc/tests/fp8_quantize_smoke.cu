// Runs the casts to fp8 over sizes, alignments and types against plain loops: on the GPU if there
// is one (made for compute-sanitizer), and always on the host, where the kernels' phases run thread
// after thread, with a shared-memory tile that is full of garbage before.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "common/cuda_check.h"
#include "kernels/fp8_quantize.cu"
#include "kernels/fp8_quantize_refresh.cu"

namespace speedrun {
namespace {

struct Shape {
  int64_t batch, rows, cols;
  int64_t padding;  // elements between the end of a row of x and the next row
};

constexpr Shape kShapes[] = {
    {1, 128, 128, 0},  // one tile, aligned
    {2, 160, 272, 8},  // aligned, edge tiles on both sides, padded rows
    {3, 33, 65, 0},    // nothing aligned
    {1, 16, 24, 0},    // x aligned, out not
    {1, 1, 200, 0},   {1, 200, 1, 0}, {1, 1, 1, 0},
};

// The code nearest to `value` by search among all numbers of the type, not by rounding bits.
uint8_t nearest_code(float value, bool e4m3) {
  const int mantissa_bits = e4m3 ? 3 : 2, bias = e4m3 ? 7 : 15, largest = e4m3 ? 0x7e : 0x7b;
  if (std::isnan(value)) return 0x7f;
  const auto decode = [&](int code) {
    const int exponent = code >> mantissa_bits, mantissa = code & ((1 << mantissa_bits) - 1);
    const int whole = exponent ? mantissa + (1 << mantissa_bits) : mantissa;
    return std::ldexp(static_cast<double>(whole), std::max(exponent, 1) - bias - mantissa_bits);
  };
  const double magnitude = std::fabs(static_cast<double>(value));
  int best = 0;
  for (int code = 1; code <= largest; ++code) {
    const double now = std::fabs(decode(code) - magnitude),
                 old = std::fabs(decode(best) - magnitude);
    if (magnitude > decode(largest) || now < old || (now == old && code % 2 == 0)) best = code;
  }
  return static_cast<uint8_t>(best | (std::signbit(value) ? 0x80 : 0));
}

bool same_code(uint8_t a, uint8_t b, bool e4m3) {
  const int first_nan = e4m3 ? 0x7f : 0x7d;
  return a == b || ((a & 0x7f) >= first_nan && (b & 0x7f) >= first_nan);
}

// The kernels' bodies on the host.
template <typename T, bool kE4M3, bool kAligned>
void quantize_on_host(const Fp8QuantizeParams& p) {
  using S = QuantizeTile;
  const int64_t row_tiles = ceil_div(p.rows, S::kRows), col_tiles = ceil_div(p.cols, S::kCols);
  std::vector<Vec<uint8_t>> tile(S::kVecs);
  uint32_t greatest = 0;
  for (int64_t i = 0; i < p.batch * row_tiles * col_tiles; ++i) {
    std::memset(static_cast<void*>(tile.data()), 0xa5, tile.size() * sizeof(tile[0]));
    const TileIndex at = tile_index(i, row_tiles, col_tiles);
    const int64_t row = at.row_tile * S::kRows, col = at.col_tile * S::kCols;
    const Target target(p.out, p.out_t, at.batch, p.rows, p.cols, row, col);
    const T* x =
        static_cast<const T*>(p.x) + at.batch * p.x_batch_stride + row * p.x_row_stride + col;
    for (int thread = 0; thread < S::kThreads; ++thread) {
      const Rows<T> rows =
          load_rows<S, kAligned>(x, p.x_row_stride, target.rows_left, target.cols_left, thread);
      greatest = std::max(greatest, max_bits(rows));
      cast_rows<S, kE4M3, kAligned>(rows, Quotients<false>{*p.scale}, target, thread, tile.data());
    }
    for (int thread = 0; thread < S::kThreads; ++thread) {
      store_transposed<S, kAligned>(tile.data(), target, thread);
    }
  }
  *p.amax = std::bit_cast<float>(greatest);
}

template <typename T, bool kAligned>
void norm_on_host(const Fp8QuantizeParams& p) {
  using S = NormTile;
  const auto inverse_cols = static_cast<float>(1.0 / static_cast<double>(p.cols));
  std::vector<Vec<uint8_t>> tile(S::kVecs);
  for (int64_t i = 0; i < p.batch * ceil_div(p.rows, S::kRows); ++i) {
    const TileIndex at = tile_index(i, ceil_div(p.rows, S::kRows), 1);
    const int64_t row = at.row_tile * S::kRows, left = p.rows - row;
    const T* x = static_cast<const T*>(p.x) + at.batch * p.x_batch_stride + row * p.x_row_stride;
    std::vector<NormQuotients<S, kAligned>> quotients(S::kThreads);
    for (int thread = 0; thread < S::kThreads; ++thread) {
      auto& own = quotients[thread];
      own = {*p.scale, {}, nullptr, p.cols, left, 0, thread};
      for (int lane = 0; lane < S::kColVecs; ++lane) {  // all threads of this thread's rows
        const int other = thread / S::kColVecs * S::kColVecs + lane;
        for (int64_t col = 0; col < p.cols; col += S::kCols) {
          add_squares(load_rows<S, kAligned>(x + col, p.x_row_stride, left, p.cols - col, other),
                      own.factors);
        }
      }
      to_factors(own.factors, inverse_cols, p.eps);
    }
    for (int64_t col = 0; col < p.cols; col += S::kCols) {
      std::memset(static_cast<void*>(tile.data()), 0xa5, tile.size() * sizeof(tile[0]));
      const Target target(p.out, p.out_t, at.batch, p.rows, p.cols, row, col);
      for (int thread = 0; thread < S::kThreads; ++thread) {
        quotients[thread].y =
            static_cast<__nv_bfloat16*>(p.y) + (at.batch * p.rows + row) * p.cols + col;
        quotients[thread].cols_left = p.cols - col;
        const Rows<T> rows =
            load_rows<S, kAligned>(x + col, p.x_row_stride, left, p.cols - col, thread);
        cast_rows<S, true, kAligned>(rows, quotients[thread], target, thread, tile.data());
      }
      for (int thread = 0; thread < S::kThreads; ++thread) {
        store_transposed<S, kAligned>(tile.data(), target, thread);
      }
    }
  }
}

template <typename T>
void run_on_host(const Fp8QuantizeParams& p, bool norm) {
  const bool aligned = all_aligned(p), e4m3 = p.out_dtype == DType::kFloat8E4M3;
  if (norm) return aligned ? norm_on_host<T, true>(p) : norm_on_host<T, false>(p);
  if (e4m3 && aligned) quantize_on_host<T, true, true>(p);
  if (e4m3 && !aligned) quantize_on_host<T, true, false>(p);
  if (!e4m3 && aligned) quantize_on_host<T, false, true>(p);
  if (!e4m3 && !aligned) quantize_on_host<T, false, false>(p);
}

// A copy of `values` on the GPU, written back when it goes.
template <typename T>
class OnGpu {
 public:
  explicit OnGpu(std::vector<T>& values) : values_(values) {
    CUDA_CHECK(cudaMalloc(&data_, bytes()));
    CUDA_CHECK(cudaMemcpy(data_, values.data(), bytes(), cudaMemcpyHostToDevice));
  }
  ~OnGpu() {
    CUDA_CHECK(cudaMemcpy(values_.data(), data_, bytes(), cudaMemcpyDeviceToHost));
    CUDA_CHECK(cudaFree(data_));
  }
  OnGpu(const OnGpu&) = delete;
  T* get() const { return static_cast<T*>(data_); }

 private:
  size_t bytes() const { return values_.size() * sizeof(T); }
  std::vector<T>& values_;
  void* data_ = nullptr;
};

// Small integers, whose sums of squares are exact, and for casts also what has no nearest number.
template <typename T>
std::vector<T> numbers(int64_t count, bool special) {
  std::vector<T> values(count);
  uint32_t state = 1;
  for (T& value : values) {
    state = state * 1664525u + 1013904223u;
    value = from_float<T>(static_cast<float>(static_cast<int>(state >> 24) - 128));
    if (special && state % 97 == 0) value = from_float<T>(state & 256 ? INFINITY : -0.0f);
    if (special && state % 1009 == 0) value = from_float<T>(NAN);
  }
  return values;
}

template <typename T>
bool agrees(const Shape& s, DType dtype, bool e4m3, bool norm, bool gpu) {
  const int64_t row_stride = s.cols + s.padding, numel = s.batch * s.rows * s.cols;
  std::vector<T> x = numbers<T>(s.batch * s.rows * row_stride, !norm);
  std::vector<uint8_t> out(numel), out_t(numel);
  std::vector<__nv_bfloat16> y(numel);
  std::vector<float> scale = {norm ? 0.07f : e4m3 ? 0.3f : 0.003f}, amax = {0};
  Fp8QuantizeParams p{};
  p.batch = s.batch, p.rows = s.rows, p.cols = s.cols;
  p.x_batch_stride = s.rows * row_stride, p.x_row_stride = row_stride;
  p.eps = 0x1p-23f;
  p.x_dtype = dtype, p.out_dtype = e4m3 ? DType::kFloat8E4M3 : DType::kFloat8E5M2;
  if (gpu) {
    OnGpu<T> gpu_x(x);
    OnGpu<uint8_t> gpu_out(out), gpu_out_t(out_t);
    OnGpu<__nv_bfloat16> gpu_y(y);
    OnGpu<float> gpu_scale(scale), gpu_amax(amax);
    p.x = gpu_x.get(), p.scale = gpu_scale.get(), p.out = gpu_out.get(), p.out_t = gpu_out_t.get();
    p.amax = norm ? nullptr : gpu_amax.get();
    p.y = norm ? gpu_y.get() : nullptr;
    CUDA_CHECK(norm ? launch_rms_norm_fp8_quantize(p, nullptr) : launch_fp8_quantize(p, nullptr));
  } else {
    p.x = x.data(), p.scale = scale.data(), p.out = out.data(), p.out_t = out_t.data();
    p.amax = amax.data();
    p.y = norm ? y.data() : nullptr;
    run_on_host<T>(p, norm);
  }

  uint32_t greatest = 0;
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t m = 0; m < s.rows; ++m) {
      const T* row = x.data() + (b * s.rows + m) * row_stride;
      float factors[kPasses] = {};
      for (int64_t n = 0; n < s.cols; ++n) factors[0] += to_float(row[n]) * to_float(row[n]);
      to_factors(factors, static_cast<float>(1.0 / static_cast<double>(s.cols)), p.eps);
      for (int64_t n = 0; n < s.cols; ++n) {
        const float value = norm ? round_to_bf16(to_float(row[n]) * factors[0]) : to_float(row[n]);
        greatest = std::max(greatest, std::bit_cast<uint32_t>(value) & 0x7fffffff);
        const int64_t i = (b * s.rows + m) * s.cols + n, i_t = (b * s.cols + n) * s.rows + m;
        const uint8_t code = nearest_code(value / scale[0], e4m3);
        if (!same_code(out[i], code, e4m3) || !same_code(out_t[i_t], code, e4m3)) return false;
        if (norm && to_float(y[i]) != value) return false;
      }
    }
  }
  return norm || std::bit_cast<uint32_t>(amax[0]) == greatest || std::isnan(amax[0]);
}

// Every matrix once by amax and once quantised, and never quantised before its amax is found.
bool jobs_are_right(int64_t matrices) {
  std::vector<int> found(matrices), quantized(matrices);
  for (int64_t n = 0; n < 2 * matrices; ++n) {
    const RefreshJob job(n, matrices);
    if (job.matrix < 0 || job.matrix >= matrices) return false;
    if (!job.finds_amax && !found[job.matrix]) return false;
    ++(job.finds_amax ? found : quantized)[job.matrix];
  }
  const auto is_one = [](int count) { return count == 1; };
  return std::all_of(found.begin(), found.end(), is_one) &&
         std::all_of(quantized.begin(), quantized.end(), is_one);
}

bool refresh_agrees_on_gpu(int64_t layers, int64_t rows, int64_t cols, bool headroom) {
  const int64_t half = layers * rows * cols;
  std::vector<__nv_bfloat16> bank = numbers<__nv_bfloat16>(2 * half, false);
  for (int64_t i = 0; i < 2 * half; ++i) {  // a different amax in each matrix
    bank[i] = from_float<__nv_bfloat16>(to_float(bank[i]) * (1 + i / (rows * cols)));
  }
  std::vector<float> old_amax(layers, 1000.0f), scales(2 * layers);
  std::vector<uint32_t> amax(2 * layers);
  std::vector<int32_t> progress(1 + 2 * layers);
  std::vector<uint8_t> up(half), up_t(half), down(half), down_t(half);
  {
    OnGpu<__nv_bfloat16> gpu_bank(bank);
    OnGpu<float> gpu_old(old_amax), gpu_scales(scales);
    OnGpu<uint32_t> gpu_amax(amax);
    OnGpu<int32_t> gpu_progress(progress);
    OnGpu<uint8_t> gpu_up(up), gpu_up_t(up_t), gpu_down(down), gpu_down_t(down_t);
    const Fp8RefreshParams p{gpu_bank.get(),   gpu_old.get(),  gpu_up.get(),
                             gpu_up_t.get(),   gpu_down.get(), gpu_down_t.get(),
                             gpu_scales.get(), gpu_amax.get(), gpu_progress.get(),
                             layers,           rows,           cols,
                             headroom};
    CUDA_CHECK(launch_fp8_refresh(p, nullptr));
  }
  for (int64_t w = 0; w < 2 * layers; ++w) {
    const bool is_down = w % 2 == 1;
    const int64_t own = (is_down ? layers : 0) + w / 2;
    const __nv_bfloat16* matrix = bank.data() + w * rows * cols;
    float greatest = 0;
    for (int64_t i = 0; i < rows * cols; ++i) {
      greatest = std::max(greatest, std::fabs(to_float(matrix[i])));
    }
    const bool old = headroom && is_down;
    const float scale = weight_scale(old ? old_amax[w / 2] : greatest, old);
    if (std::bit_cast<float>(amax[own]) != greatest || scales[own] != scale) return false;
    for (int64_t i = 0; i < rows * cols; ++i) {
      const float quotient = to_float(matrix[i]) / scale;
      const uint8_t code = nearest_code(is_down ? quotient : round_to_bf16(quotient), true);
      const int64_t at = w / 2 * rows * cols, i_t = i % cols * rows + i / cols;
      if ((is_down ? down : up)[at + i] != code) return false;
      if ((is_down ? down_t : up_t)[at + i_t] != code) return false;
    }
  }
  return true;
}

int count_failures(bool gpu) {
  int failures = 0;
  const auto expect = [&](bool good, const char* what, int index) {
    if (good) return;
    std::printf("%s: %s %d: wrong\n", gpu ? "GPU" : "host", what, index);
    ++failures;
  };
  int index = 0;
  for (const Shape& s : kShapes) {
    for (int norm = 0; norm < 2; ++norm) {
      for (int e4m3 = norm; e4m3 < 2; ++e4m3) {
        const char* what = norm ? "norm, shape" : e4m3 ? "e4m3, shape" : "e5m2, shape";
        expect(agrees<__half>(s, DType::kFloat16, e4m3, norm, gpu), what, index);
        expect(agrees<__nv_bfloat16>(s, DType::kBFloat16, e4m3, norm, gpu), what, index);
        expect(agrees<float>(s, DType::kFloat32, e4m3, norm, gpu), what, index);
      }
    }
    ++index;
  }
  for (int matrices = 2; matrices <= 26; matrices += 2) {
    expect(jobs_are_right(matrices), "jobs, matrices", matrices);
  }
  if (gpu) {
    for (int layers : {1, 2, 12}) {
      expect(refresh_agrees_on_gpu(layers, 160, 272, false), "refresh, layers", layers);
      expect(refresh_agrees_on_gpu(layers, 33, 65, true), "refresh with headroom, layers", layers);
    }
  }
  return failures;
}

}  // namespace
}  // namespace speedrun

int main() {
  int failures = speedrun::count_failures(false);
  std::printf("fp8_quantize on the host: %d wrong\n", failures);
  int num_devices = 0;
  if (cudaGetDeviceCount(&num_devices) == cudaSuccess && num_devices > 0) {
    const int gpu_failures = speedrun::count_failures(true);
    std::printf("fp8_quantize on the GPU: %d wrong\n", gpu_failures);
    failures += gpu_failures;
  } else {
    std::puts("fp8_quantize on the GPU: not run, there is none");
  }
  return failures != 0;
}
