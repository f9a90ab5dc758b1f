// Runs normuon_step over sizes, alignments and types against plain loops: on the GPU if there is
// one (made for compute-sanitizer), and always on the host, where the kernels' bodies run thread
// after thread.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <vector>

#include "common/cuda_check.h"
#include "kernels/normuon_step.cu"
#include "kernels/normuon_step_second.cu"

namespace speedrun {
namespace {

struct Shape {
  int64_t batch, rows, cols;
};

constexpr Shape kShapes[] = {
    {2, 128, 128},  // whole tiles
    {1, 160, 48},   // tall, cut tiles, aligned
    {3, 48, 272},   // wide, the same
    {2, 33, 25},    // nothing aligned
    {2, 25, 33},    // wide, the same
    {1, 8, 2064},   // more partial sums than a block has threads
    {1, 1, 200},   {1, 200, 1}, {1, 1, 1},
};

// What one call changes. Low bits of `nearest` weights are signed distances.
template <typename T, typename W>
struct Bank {
  std::vector<W> weight;
  std::vector<uint16_t> low;
  std::vector<T> o;
  std::vector<float> second;
  std::vector<float2> partials;
  std::vector<double> lr, decay_lr, wd = {0.5};
  std::vector<float> scale, amax;
  std::vector<uint8_t> out, out_t;

  Bank(const Shape& s) {
    const int64_t numel = s.batch * s.rows * s.cols;
    uint32_t state = 1;
    const auto next = [&state] { return (state = state * 1664525u + 1013904223u) >> 8; };
    const auto random = [&next](float size) {  // of either sign
      return size * (static_cast<float>(next()) / (1 << 23) - 1);
    };
    for (int64_t i = 0; i < numel; ++i) {
      weight.push_back(from_float<W>(random(2)));
      low.push_back(static_cast<uint16_t>(next()));
      o.push_back(from_float<T>(random(0.1f)));
    }
    for (int64_t i = 0; i < s.batch * std::max(s.rows, s.cols); ++i) {
      second.push_back(random(0.01f) + 0.02f);
    }
    partials.resize(s.batch * normuon_partials(s.rows, s.cols));
    for (int64_t b = 0; b < s.batch; ++b) {
      lr.push_back(0.1 * (b + 1)), decay_lr.push_back(0.3 * (b + 1));
      scale.push_back(0.01f * (b + 1)), amax.push_back(0);
    }
    out.resize(numel), out_t.resize(numel);
  }
};

struct Options {
  bool low, second, cautious, nearest, fp8;
};

// Calls `visit` with each of a bank's vectors and the field of the parameters that points to it.
template <typename T, typename W, typename F>
void each_tensor(Bank<T, W>& bank, NormuonParams& p, const Options& options, const F& visit) {
  visit(bank.weight, p.weight), visit(bank.o, p.o), visit(bank.lr, p.lr);
  visit(bank.decay_lr, p.decay_lr), visit(bank.wd, p.wd);
  if (options.low) visit(bank.low, p.low);
  if (options.second) visit(bank.second, p.second), visit(bank.partials, p.partials);
  if (!options.fp8) return;
  visit(bank.scale, p.scale), visit(bank.amax, p.amax);
  visit(bank.out, p.out), visit(bank.out_t, p.out_t);
}

// The two kernels' bodies on the host; sums over threads in the order of the threads.
template <typename T, bool kAligned, bool kByRow>
void second_on_host(const NormuonParams& p) {
  const int64_t strips = normuon_partials(p.rows, p.cols), lines = kByRow ? p.rows : p.cols;
  for (int64_t block = 0; block < p.batch * strips; ++block) {
    const int64_t matrix = block / strips, strip = block % strips;
    float sums[kLines] = {};
    for (int thread = 0; thread < kThreads; ++thread) {
      using Sums = LineSums<T, kAligned, kByRow>;
      const Sums own(static_cast<const T*>(p.o) + matrix * p.rows * p.cols, p.rows, p.cols, strip,
                     thread);
      for (int i = 0; i < Sums::kCount; ++i) sums[Sums::line(thread, i)] += own.sums[i];
    }
    float2& partial = p.partials[block] = make_float2(0, 0);
    for (int64_t i = 0; i < kLines && strip * kLines + i < lines; ++i) {
      float& second = p.second[matrix * lines + strip * kLines + i];
      const float2 more = update_line(second, sums[i], kByRow ? p.cols : p.rows, p.beta2);
      partial.x += more.x, partial.y += more.y;
    }
  }
}

template <typename T, typename W, bool kLow, bool kAligned>
void run_on_host(const NormuonParams& p) {
  using S = UpdateTile;
  const int64_t strips = normuon_partials(p.rows, p.cols);
  if (p.second) {
    p.rows >= p.cols ? second_on_host<T, kAligned, true>(p) : second_on_host<T, kAligned, false>(p);
  }
  const int64_t row_tiles = ceil_div(p.rows, S::kRows), col_tiles = ceil_div(p.cols, S::kCols);
  std::vector<Vec<uint8_t>> tile(S::kVecs);
  for (int64_t i = 0; i < p.batch * row_tiles * col_tiles; ++i) {
    std::memset(static_cast<void*>(tile.data()), 0xa5, tile.size() * sizeof(tile[0]));
    const TileIndex at = tile_index(i, row_tiles, col_tiles);
    float2 squares = make_float2(0, 0);
    for (int64_t j = 0; p.second && j < strips; ++j) {
      squares.x += p.partials[at.batch * strips + j].x;
      squares.y += p.partials[at.batch * strips + j].y;
    }
    const Target target(p.out, p.out_t, at.batch, p.rows, p.cols, at.row_tile * S::kRows,
                        at.col_tile * S::kCols);
    for (int thread = 0; thread < S::kThreads; ++thread) {
      Elements<T, W, kLow, kAligned> elements(p, at, thread);
      elements.update(p, at.batch, p.second ? norm_ratio(squares) : 1);
      if (!p.scale) continue;
      auto& amax = reinterpret_cast<uint32_t&>(p.amax[at.batch]);
      amax = std::max(amax, max_bits(elements.weights));
      cast_rows<S, true, kAligned>(elements.weights, Quotients<false>{p.scale[at.batch]}, target,
                                   thread, tile.data());
    }
    for (int thread = 0; p.out_t && thread < S::kThreads; ++thread) {
      store_transposed<S, kAligned>(tile.data(), target, thread);
    }
  }
}

template <typename T, typename W>
void run(Bank<T, W>& bank, NormuonParams p, const Options& options, bool gpu) {
  if (!gpu) {
    each_tensor(bank, p, options, [](auto& values, auto& field) { field = values.data(); });
    constexpr bool kBF16 = sizeof(W) == 2;
    if (options.low) {
      all_aligned(p) ? run_on_host<T, W, kBF16, true>(p) : run_on_host<T, W, kBF16, false>(p);
    } else {
      all_aligned(p) ? run_on_host<T, W, false, true>(p) : run_on_host<T, W, false, false>(p);
    }
    return;
  }
  const auto bytes = [](const auto& values) { return values.size() * sizeof(values[0]); };
  each_tensor(bank, p, options, [&](auto& values, auto& field) {
    void* data;
    CUDA_CHECK(cudaMalloc(&data, bytes(values)));
    CUDA_CHECK(cudaMemcpy(data, values.data(), bytes(values), cudaMemcpyHostToDevice));
    field = static_cast<std::remove_reference_t<decltype(field)>>(data);
  });
  CUDA_CHECK(launch_normuon_step(p, nullptr));
  each_tensor(bank, p, options, [&](auto& values, auto& field) {
    void* data = const_cast<void*>(static_cast<const void*>(field));
    CUDA_CHECK(cudaMemcpy(values.data(), data, bytes(values), cudaMemcpyDeviceToHost));
    CUDA_CHECK(cudaFree(data));
  });
}

bool near(double found, double expected, double margin) {
  return std::fabs(found - expected) <= margin;
}

// Against the formulas in double. Margins: O's rounding, weights' own rounding, and 2^-20 of each
// number for all roundings of fp32.
template <typename T, typename W>
bool agrees(const Shape& s, DType o_dtype, const Options& options, bool gpu) {
  const Bank<T, W> before(s);
  Bank<T, W> after = before;
  NormuonParams p{};
  p.batch = s.batch, p.rows = s.rows, p.cols = s.cols, p.beta2 = 0.9;
  p.cautious = options.cautious, p.nearest = options.nearest, p.o_dtype = o_dtype;
  p.weight_dtype = sizeof(W) == 4 ? DType::kFloat32 : DType::kBFloat16;
  run(after, p, options, gpu);

  const bool by_row = s.rows >= s.cols;
  const int64_t lines = by_row ? s.rows : s.cols, size = by_row ? s.cols : s.rows;
  const double w_eps = sizeof(W) == 4 ? 0 : 0x1p-8;  // half an ulp of 1
  const double o_eps = sizeof(T) == 4 ? 0 : o_dtype == DType::kFloat16 ? 0x1p-11 : 0x1p-8;
  const auto weight_of = [&](const Bank<T, W>& bank, int64_t i) -> double {
    if (!options.low) return to_float(bank.weight[i]);
    if constexpr (sizeof(W) == 2) {
      return std::bit_cast<float>(
          join_bits(std::bit_cast<uint16_t>(bank.weight[i]), bank.low[i], options.nearest));
    }
    return 0;
  };
  for (int64_t b = 0; b < s.batch; ++b) {
    std::vector<double> sums(lines), factors(lines, 1);
    double norm = 0, new_norm = 0, amax = 0;
    const auto at = [&](int64_t m, int64_t n) { return (b * s.rows + m) * s.cols + n; };
    for (int64_t m = 0; m < s.rows; ++m) {
      for (int64_t n = 0; n < s.cols; ++n) {
        const double o = to_float(before.o[at(m, n)]);
        sums[by_row ? m : n] += o * o;
      }
    }
    for (int64_t l = 0; options.second && l < lines; ++l) {
      const double second = 0.9 * before.second[b * lines + l] + 0.1 * sums[l] / size;
      if (!near(after.second[b * lines + l], second, 0x1p-20 * second)) return false;
      factors[l] = 1 / std::sqrt(second);
      norm += sums[l], new_norm += sums[l] / second;
    }
    const double ratio = options.second ? std::sqrt(norm / new_norm) : 1;
    for (int64_t m = 0; m < s.rows; ++m) {
      for (int64_t n = 0; n < s.cols; ++n) {
        const int64_t i = at(m, n);
        const double o = to_float(before.o[i]) * factors[by_row ? m : n] * ratio;
        const double w = weight_of(before, i);
        const double decay = !options.cautious || o * w >= 0 ? w * 0.5 * before.decay_lr[b] : 0;
        const double step = o * before.lr[b], expected = w - decay - step;
        const double margin = (0x1p-20 + o_eps) * std::fabs(step) + 0x1p-20 * std::fabs(w) +
                              (options.low ? 0 : w_eps * std::fabs(expected));
        if (!near(weight_of(after, i), expected, margin)) return false;
        const double stored = to_float(after.weight[i]);
        amax = std::max(amax, std::fabs(stored));
        if (!options.fp8) continue;
        __nv_fp8_e4m3 code, code_t;
        code.__x = after.out[i], code_t.__x = after.out_t[(b * s.cols + n) * s.rows + m];
        if (code.__x != __nv_fp8_e4m3(static_cast<float>(stored) / before.scale[b]).__x ||
            code_t.__x != code.__x) {
          return false;
        }
      }
    }
    if (options.fp8 && after.amax[b] != amax) return false;
  }
  return true;
}

int count_failures(bool gpu) {
  int failures = 0;
  const auto expect = [&](bool good, int shape, int options, const char* types) {
    if (good) return;
    std::printf("%s: shape %d, options %d, %s: wrong\n", gpu ? "GPU" : "host", shape, options,
                types);
    ++failures;
  };
  int index = 0;
  for (const Shape& s : kShapes) {
    for (int bits = 0; bits < 16; ++bits) {
      Options options{true, (bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0};
      using BF16 = __nv_bfloat16;
      expect(agrees<BF16, BF16>(s, DType::kBFloat16, options, gpu), index, bits, "exact");
      options.low = false;
      expect(agrees<BF16, BF16>(s, DType::kBFloat16, options, gpu), index, bits, "bf16");
      expect(agrees<__half, BF16>(s, DType::kFloat16, options, gpu), index, bits, "bf16 of fp16");
      expect(agrees<float, float>(s, DType::kFloat32, options, gpu), index, bits, "fp32");
    }
    ++index;
  }
  return failures;
}

}  // namespace
}  // namespace speedrun

int main() {
  int failures = speedrun::count_failures(false);
  std::printf("normuon_step on the host: %d wrong\n", failures);
  int num_devices = 0;
  if (cudaGetDeviceCount(&num_devices) == cudaSuccess && num_devices > 0) {
    const int gpu_failures = speedrun::count_failures(true);
    std::printf("normuon_step on the GPU: %d wrong\n", gpu_failures);
    failures += gpu_failures;
  } else {
    std::puts("normuon_step on the GPU: not run, there is none");
  }
  return failures != 0;
}
