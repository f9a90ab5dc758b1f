// head_logits on small problems against double, made for compute-sanitizer; the kernels for targets
// run behind it on what it left, and csrc/tests/head_logits_test.cpp looks at their numbers. Needs
// a GPU of compute capability 9.0; elsewhere it only says so.
#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <cmath>
#include <vector>

#include "kernels/head_logits.cuh"
#include "tests/smoke.h"

namespace speedrun {
namespace {

constexpr Softcapped kSoftcap{23, 5, 7.5};
constexpr float kScales[] = {0.25f, 0.002f};

struct Matrix {
  std::vector<uint8_t> codes;
  std::vector<double> values;
  std::vector<__nv_bfloat16> plain;

  Matrix(int64_t size, float scale) {
    for (int64_t i = 0; i < size; ++i) {
      const auto code = __nv_cvt_float_to_fp8(scale * uniform(), __NV_SATFINITE, __NV_E4M3);
      codes.push_back(code);
      values.push_back(__half2float(__half(__nv_cvt_fp8_to_halfraw(code, __NV_E4M3))));
      plain.push_back(__float2bfloat16(static_cast<float>(values.back())));
    }
  }
};

double e5m2(uint8_t code) { return __half2float(__half(__nv_cvt_fp8_to_halfraw(code, __NV_E5M2))); }

void run(int64_t rows, int64_t cols, int64_t dim) {
  const Matrix x(rows * dim, 40), w(cols * dim, 100);
  const int64_t blocks = ceil_div(cols, kHeadColumns);
  const Device<uint8_t> device_x(x.codes), device_w(w.codes);
  const Device<uint8_t> g(std::vector<uint8_t>(rows * cols, 0x7f)), g_t(g.read());
  const Device<float> sums(std::vector<float>(blocks * rows, NAN));
  const Device<float> x_scale({kScales[0]}), w_scale({kScales[1]});
  const HeadLogitsParams params{
      device_x.get(), device_w.get(), x_scale.get(), w_scale.get(), sums.get(), g.get(),
      g_t.get(),      rows,           cols,          dim,           kSoftcap};
  CUDA_CHECK(launch_head_logits(params, nullptr));
  const auto found = g.read(), transposed = g_t.read();
  const auto found_sums = sums.read();
  const double scale = head::factor_scale(kSoftcap.a);
  std::vector<double> expected(blocks * rows), spread(blocks * rows);
  int64_t wrong = 0;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t col = 0; col < cols; ++col) {
      double z = 0, size = 0;
      for (int64_t i = 0; i < dim; ++i) {
        const double product = x.values[row * dim + i] * w.values[col * dim + i];
        z += product * kScales[0] * kScales[1];
        size += std::abs(product) * kScales[0] * kScales[1];
      }
      // Fast sums are off by 2^-10 of the sum of sizes at most; a/(4 c) is the steepest slope.
      const double sigma = 1 / (1 + std::exp(-(z + kSoftcap.b) / kSoftcap.c));
      const double e = std::exp(kSoftcap.a * (sigma - 1)), g = e * sigma * (1 - sigma) / scale;
      const double off = std::expm1(size * 0x1p-10 * (kSoftcap.a / 4 + 1) / kSoftcap.c);
      expected[col / kHeadColumns * rows + row] += e;
      spread[col / kHeadColumns * rows + row] += e * (off + 1e-5);
      wrong += !is_close(e5m2(found[row * cols + col]), g, 0x1p-3 + off, 0x1p-17 + 57344 * off * e);
      wrong += transposed[col * rows + row] != found[row * cols + col];
    }
  }
  for (size_t i = 0; i < expected.size(); ++i) {
    wrong += !is_close(found_sums[i], expected[i], 0, spread[i]);
  }
  report("head_logits", rows, cols, dim, wrong);

  constexpr int64_t kTargets = 4;
  std::vector<int64_t> targets, order(rows * kTargets);
  std::vector<int32_t> keys;
  for (int64_t i = 0; i < rows * kTargets; ++i) targets.push_back(i % 7 ? i * i % cols : -1);
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t i, int64_t j) { return targets[i] < targets[j]; });
  for (const int64_t i : order) keys.push_back(static_cast<int32_t>(targets[i]));
  const Device<int64_t> device_targets(targets), device_order(order);
  const Device<int32_t> device_keys(keys);
  const Device<__nv_bfloat16> plain_x(x.plain), plain_w(w.plain), dx(x.plain);
  const Device<float> weights(std::vector<float>(kTargets, 0.5f));
  const Device<float> loss(std::vector<float>(rows, NAN)), factors(loss.read());
  const Device<float> sides(std::vector<float>(rows * kTargets, NAN));
  const Device<float> dw(std::vector<float>(dim * cols, 0.f));
  CUDA_CHECK(launch_head_target_terms(
      {sums.get(), g.get(), g_t.get(), plain_x.get(), plain_w.get(), device_x.get(), device_w.get(),
       x_scale.get(), w_scale.get(), device_targets.get(), weights.get(), loss.get(), factors.get(),
       sides.get(), rows, cols, dim, kTargets, kSoftcap},
      nullptr));
  CUDA_CHECK(launch_head_add_target_rows(
      {plain_w.get(), device_targets.get(), sides.get(), dx.get(), rows, cols, dim, kTargets},
      nullptr));
  CUDA_CHECK(launch_head_add_target_columns({plain_x.get(), device_keys.get(), device_order.get(),
                                             sides.get(), dw.get(), rows, cols, dim, kTargets},
                                            nullptr));
  wrong = 0;
  for (const float of : loss.read()) wrong += !std::isfinite(of);
  for (const float of : sides.read()) wrong += !std::isfinite(of);
  for (const float of : dw.read()) wrong += !std::isfinite(of);
  report("head_targets", rows, cols, dim, wrong);
}

void run_all() {
  run(16, 16, 16);
  run(144, 272, 64);  // edges of tiles on both sides
  run(256, 1024, 768);
  run(2048, 5072, 128);  // more tiles than multiprocessors, a strip and a part of one
}

}  // namespace
}  // namespace speedrun

int main() { return speedrun::run_on_hopper("head_logits", speedrun::run_all); }
