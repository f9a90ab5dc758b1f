// The head's arithmetic, and its kernels for targets, without a GPU: each thread of a block is one
// of the host, and the few functions of the GPU that they call are at the beginning of this file.
#include <cuda_runtime.h>

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

struct Place {
  unsigned x, y;
};
thread_local Place threadIdx, blockIdx;
struct Block {
  std::barrier<> all;
  std::vector<std::unique_ptr<std::barrier<>>> warps;
  std::vector<float> exchanged;
};
Block* block = nullptr;

inline void __syncthreads() { block->all.arrive_and_wait(); }
inline float __shfl_xor_sync(unsigned, float value, int distance) {
  std::barrier<>& warp = *block->warps[threadIdx.x / 32];
  block->exchanged[threadIdx.x] = value;
  warp.arrive_and_wait();
  const float other = block->exchanged[threadIdx.x ^ static_cast<unsigned>(distance)];
  warp.arrive_and_wait();
  return other;
}
unsigned __reduce_max_sync(unsigned, unsigned);  // of common/reduce.cuh, which nobody calls here
Place blockDim;

#undef __global__
#undef __launch_bounds__
#undef __shared__
#define __global__ inline
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time

#include "kernels/head_logits.cuh"
#include "kernels/head_logits_targets.cuh"
#include "tests/check.h"

namespace speedrun::head {
namespace {

constexpr Softcapped kSoftcap{23, 5, 7.5};

template <class Params>
void run(void (*kernel)(Params), unsigned blocks_x, unsigned blocks_y, const Params& params) {
  for (unsigned i = 0; i < blocks_x * blocks_y; ++i) {
    Block here{std::barrier<>(kThreads), {}, std::vector<float>(kThreads)};
    for (int warp = 0; warp < kWarps; ++warp) {
      here.warps.push_back(std::make_unique<std::barrier<>>(32));
    }
    block = &here;
    std::vector<std::thread> threads;
    for (unsigned thread = 0; thread < kThreads; ++thread) {
      threads.emplace_back([&, thread] {
        threadIdx = {thread, 0};
        blockIdx = {i % blocks_x, i / blocks_x};
        kernel(params);
        here.all.arrive_and_drop();
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
}

uint32_t state = 1;
float uniform() {  // in [-1, 1)
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(static_cast<int32_t>(state)) / 2147483648.f;
}

bool is_close(double found, double expected, double relative, double absolute) {
  return std::abs(found - expected) <= relative * std::abs(expected) + absolute;  // not so for NaN
}

struct Exact {
  double sigma, e, g;
};
Exact exact(const Softcapped& softcap, double z) {
  const double sigma = 1 / (1 + std::exp(-(z + softcap.b) / softcap.c));
  const double e = std::exp(softcap.a * (sigma - 1));
  return {sigma, e, e * sigma * (1 - sigma)};
}

// ---- What the epilogue computes --------------------------------------------------------------

void test_factors() {
  for (const Softcapped& softcap :
       {kSoftcap, Softcapped{1.5, 0, 0.7}, Softcapped{kMaxHeadSoftcap, -3, 4}}) {
    const Exponents exponents = exponents_of(softcap);
    const double scale = factor_scale(softcap.a);
    double largest = 0;
    for (int i = 0; i < 40000; ++i) {
      float x[4], powers[4], z[4];
      for (float& of : z) of = (i % 7 ? 10 : 100) * uniform();
      const float factor = 0.25f;
      for (int j = 0; j < 4; ++j) x[j] = z[j] / factor;
      exponents.factors(exponents.slope * factor, x, powers);
      for (int j = 0; j < 4; ++j) {
        const auto [sigma, e, g] = exact(softcap, z[j]);
        CHECK(is_close(powers[j] * scale, e, 2e-5, 0));
        CHECK(is_close(x[j] * scale, g, 4e-5,
                       0x1p-21 * e));  // sigma is rounded: of 1 - sigma not much may be left
        largest = std::max(largest, g);
      }
    }
    CHECK(is_close(largest, scale * 57344, 0.001, 0));
  }
}

// What one of four is doesn't matter to the others, unless it is NaN.
void test_extremes() {
  const Exponents exponents = exponents_of(kSoftcap);
  const float scale = static_cast<float>(factor_scale(23));
  float x[4] = {1e30f, -1e30f, -1e6f, 1}, powers[4];
  exponents.factors(exponents.slope, x, powers);
  CHECK(is_close(powers[0] * scale, 1, 1e-5, 0) && std::abs(x[0] * scale) < 0x1p-21f);
  CHECK(is_close(powers[1] * scale, std::exp(-23.0), 1e-5, 0) && x[1] < 0x1p-17f);
  CHECK(powers[2] == powers[1] && is_close(powers[3] * scale, exact(kSoftcap, 1).e, 2e-5, 0));
  for (float& of : x) of = -INFINITY;
  exponents.factors(exponents.slope, x, powers);
  for (int i = 0; i < 4; ++i) CHECK(is_close(powers[i] * scale, std::exp(-23.0), 1e-5, 0));
  x[2] = NAN;
  exponents.factors(exponents.slope, x, powers);
  CHECK(std::isnan(powers[2]) && std::isnan(x[2]));
}

// ---- Kernels for targets ---------------------------------------------------------------------

struct Problem {
  int64_t rows, cols, dim, num_targets;
  std::vector<bf16> x, w;
  std::vector<uint8_t> x_f8, w_f8, g, g_t;
  std::vector<float> sums, weights, loss, factors, sides;
  std::vector<int64_t> targets;
  float x_scale = 0.02f, w_scale = 0.01f;

  Problem(int64_t rows, int64_t cols, int64_t dim, int64_t num_targets)
      : rows(rows), cols(cols), dim(dim), num_targets(num_targets) {
    for (int64_t i = 0; i < rows * dim; ++i) x.push_back(from_float<bf16>(uniform()));
    for (int64_t i = 0; i < cols * dim; ++i) w.push_back(from_float<bf16>(uniform() / 2));
    for (const bf16 of : x) x_f8.push_back(to_e4m3(to_float(of) / x_scale));
    for (const bf16 of : w) w_f8.push_back(to_e4m3(to_float(of) / w_scale));
    for (int64_t i = 0; i < ceil_div(cols, kHeadColumns) * rows; ++i) {
      sums.push_back(1 + uniform() / 2);
    }
    for (int64_t i = 0; i < num_targets; ++i) weights.push_back(1.f / static_cast<float>(i + 1));
    for (int64_t i = 0; i < rows * num_targets; ++i) {
      targets.push_back(static_cast<int64_t>((uniform() + 1) / 2 * static_cast<float>(cols - 1)));
    }
    for (int64_t row = 0; row < rows; ++row) {
      int64_t* const of = &targets[row * num_targets];
      of[0] = row % 3 ? 5 : cols - 1;  // columns with many entries
      if (row % 4 == 1) of[num_targets - 1] = of[0];
      if (row % 5 == 2) std::fill(of, of + num_targets, of[0]);
      if (row % 4 == 2) of[row % num_targets] = -1;
      if (row == 3) std::fill(of, of + num_targets, -1);
    }
    g.assign(rows * cols, 0x3c);
    g_t.assign(rows * cols, 0x3c);
    loss.assign(rows, -7);
    factors.assign(rows, -7);
    sides.assign(rows * num_targets, -7);
  }
  static uint8_t to_e4m3(float x) { return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3); }
  static double from_e4m3(uint8_t code) {
    return __half2float(__half(__nv_cvt_fp8_to_halfraw(code, __NV_E4M3)));
  }
  double product(int64_t row, int64_t column, bool fp8) const {
    double sum = 0;
    for (int64_t i = 0; i < dim; ++i) {
      sum += fp8 ? from_e4m3(x_f8[row * dim + i]) * from_e4m3(w_f8[column * dim + i]) *
                       (double{x_scale} * w_scale)
                 : double{to_float(x[row * dim + i])} * to_float(w[column * dim + i]);
    }
    return sum;
  }
  HeadTargetTermsParams terms() {
    return {sums.data(),    g.data(),    g_t.data(),     x.data(),     w.data(),
            x_f8.data(),    w_f8.data(), &x_scale,       &w_scale,     targets.data(),
            weights.data(), loss.data(), factors.data(), sides.data(), rows,
            cols,           dim,         num_targets,    kSoftcap};
  }
};

void run_terms(Problem& q) {
  run(target_terms_kernel, static_cast<unsigned>(ceil_div(q.rows, kWarps)), 1, q.terms());
}

void test_terms(int64_t rows, int64_t cols, int64_t dim, int64_t num_targets) {
  Problem q(rows, cols, dim, num_targets);
  run_terms(q);
  std::vector<uint8_t> expected(rows * cols, 0x3c);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t* const targets = &q.targets[row * num_targets];
    double sum = 0, weight = 0, loss = 0, of_loss = 0;
    for (int64_t i = 0; i < ceil_div(cols, kHeadColumns); ++i) sum += q.sums[i * rows + row];
    const auto is_first = [&](int64_t m) {
      return targets[m] >= 0 && std::find(targets, targets + m, targets[m]) == targets + m;
    };
    for (int64_t m = 0; m < num_targets; ++m) {
      if (targets[m] < 0) continue;
      const Exact found = exact(kSoftcap, q.product(row, targets[m], false));
      if (is_first(m)) sum += found.e - exact(kSoftcap, q.product(row, targets[m], true)).e;
      weight += q.weights[m];
      of_loss -= q.weights[m] * 23 * found.sigma;
    }
    loss = of_loss + weight * (23 + std::log(sum));
    const double factor = weight * (23 / 7.5) / sum;
    CHECK(is_close(q.loss[row], loss, 1e-5, 1e-5));
    CHECK(is_close(q.factors[row], factor, 1e-5, 0));
    for (int64_t m = 0; m < num_targets; ++m) {
      double side = 0;
      if (is_first(m)) {
        const Exact found = exact(kSoftcap, q.product(row, targets[m], false));
        double of_column = 0;
        for (int64_t n = 0; n < num_targets; ++n) {
          of_column += targets[n] == targets[m] ? q.weights[n] : 0;
        }
        side = factor * found.g - of_column * found.sigma * (1 - found.sigma) * (23 / 7.5);
        expected[row * cols + targets[m]] = 0;
      }
      CHECK(is_close(q.sides[row * num_targets + m], side, 1e-4, 1e-6));
    }
  }
  CHECK(q.g == expected);
  for (int64_t i = 0; i < rows * cols; ++i) CHECK(q.g_t[i % cols * rows + i / cols] == expected[i]);
}

void test_wrong_target() {
  Problem q(9, 16, 8, 2);
  q.targets[2] = 16;
  run_terms(q);
  CHECK(std::isnan(q.loss[1]) && !std::isnan(q.loss[0]) && q.sides[2] == 0);
}

void test_rows(int64_t rows, int64_t cols, int64_t dim, int64_t num_targets) {
  Problem q(rows, cols, dim, num_targets);
  for (float& side : q.sides) side = uniform();
  std::vector<bf16> dx(rows * dim);
  for (bf16& of : dx) of = from_float<bf16>(uniform());
  const std::vector<bf16> before = dx;
  run(add_target_rows_kernel, static_cast<unsigned>(ceil_div(rows, kWarps)), 1,
      HeadTargetRowsParams{q.w.data(), q.targets.data(), q.sides.data(), dx.data(), rows, cols, dim,
                           num_targets});
  for (int64_t i = 0; i < rows * dim; ++i) {
    double expected = to_float(before[i]);
    for (int64_t at = i / dim * num_targets; at < (i / dim + 1) * num_targets; ++at) {
      if (q.targets[at] < 0) continue;
      expected += double{q.sides[at]} * to_float(q.w[q.targets[at] * dim + i % dim]);
    }
    CHECK(is_close(to_float(dx[i]), expected, 0x1p-8, 1e-6));
  }
}

void test_columns(int64_t rows, int64_t cols, int64_t dim, int64_t num_targets) {
  Problem q(rows, cols, dim, num_targets);
  for (float& side : q.sides) side = uniform();
  q.targets.back() = cols;  // counts nothing
  std::vector<int64_t> order(rows * num_targets);
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t i, int64_t j) { return q.targets[i] < q.targets[j]; });
  std::vector<int32_t> keys;
  for (const int64_t i : order) keys.push_back(static_cast<int32_t>(q.targets[i]));
  std::vector<float> dw(dim * cols);
  for (float& of : dw) of = uniform();
  std::vector<double> expected(dw.begin(), dw.end());
  for (size_t at = 0; at < q.targets.size(); ++at) {
    if (q.targets[at] < 0 || q.targets[at] == cols) continue;
    const bf16* const x = &q.x[static_cast<int64_t>(at) / num_targets * dim];
    for (int64_t i = 0; i < dim; ++i) {
      expected[i * cols + q.targets[at]] += double{q.sides[at]} * to_float(x[i]);
    }
  }
  const std::vector<float> before = dw;
  for (int repetition = 0; repetition < 2; ++repetition) {
    dw = before;
    run(add_target_columns_kernel, static_cast<unsigned>(ceil_div(cols, kBlockColumns)), kDimParts,
        HeadTargetColumnsParams{q.x.data(), keys.data(), order.data(), q.sides.data(), dw.data(),
                                rows, cols, dim, num_targets});
    for (size_t i = 0; i < dw.size(); ++i) CHECK(is_close(dw[i], expected[i], 1e-5, 1e-4));
  }
}

}  // namespace
}  // namespace speedrun::head

int main() {
  using namespace speedrun::head;
  using speedrun::kMaxHeadTargets;
  test_factors();
  test_extremes();
  test_terms(19, 272, 264, 4);
  test_terms(1, 8, 8, 1);
  test_terms(9, 130, 520, kMaxHeadTargets);
  test_terms(9, 5008, 8, 2);  // more sums than a block has threads for a row
  test_wrong_target();
  test_rows(19, 272, 264, 4);
  test_rows(1, 8, 8, 1);
  test_columns(100, 70, 264, 4);  // a column's entries: 0, few, more than a warp takes
  test_columns(200, 33, 392, 1);
  test_columns(1, 8, 8, 1);
  return 0;
}
