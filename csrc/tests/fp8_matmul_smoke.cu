// Runs every FP8 GEMM on small matrices against plain loops in double: made for compute-sanitizer.
// Needs a GPU of compute capability 9.0; elsewhere it only says so.
#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/fp8_matmul.h"
#include "tests/smoke.h"

namespace speedrun {
namespace {

constexpr float kScaleA = 0.5f, kScaleB = 0.03f, kPostScale = 0.25f, kOutScale = 0.125f;

__nv_fp8_interpretation_t kind(DType type) {
  return type == DType::kFloat8E4M3 ? __NV_E4M3 : __NV_E5M2;
}
uint8_t to_fp8(float x, DType type) { return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, kind(type)); }
float from_fp8(uint8_t byte, DType type) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(byte, kind(type))));
}

std::vector<uint8_t> random_fp8(int64_t count, DType type) {
  std::vector<uint8_t> bytes(count);
  for (auto& byte : bytes) byte = to_fp8(uniform(), type);
  return bytes;
}

// A product on the device, and on the host: the sums, and those of the absolute values.
struct Product {
  std::vector<uint8_t> host_a, host_b;
  Device<uint8_t> a, b;
  Device<float> scale_a{{kScaleA}}, scale_b{{kScaleB}};
  Fp8Operands in;
  std::vector<double> sums, magnitudes;  // (batch, m, n)

  Product(DType a_type, DType b_type, int64_t batch, int64_t m, int64_t n, int64_t k, bool fast)
      : host_a(random_fp8(batch * m * k, a_type)),
        host_b(random_fp8(batch * n * k, b_type)),
        a(host_a),
        b(host_b),
        in{a.get(), b.get(), scale_a.get(), scale_b.get(), batch, m, n, k, m * k, k,
           n * k,   k,       a_type,        b_type,        fast} {
    std::vector<float> x(host_a.size()), y(host_b.size());
    for (size_t i = 0; i < x.size(); ++i) x[i] = from_fp8(host_a[i], a_type);
    for (size_t i = 0; i < y.size(); ++i) y[i] = from_fp8(host_b[i], b_type);
    for (int64_t i = 0; i < batch * m; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        const float *row = &x[i * k], *column = &y[(i / m * n + j) * k];
        double sum = 0, magnitude = 0;
        for (int64_t l = 0; l < k; ++l) {
          sum += static_cast<double>(row[l]) * column[l];
          magnitude += std::abs(static_cast<double>(row[l]) * column[l]);
        }
        sums.push_back(sum * kScaleA * kScaleB);
        magnitudes.push_back(magnitude * kScaleA * kScaleB);
      }
    }
  }
  // How far a sum may be off: 14 bits, or what float32 loses.
  double slack(int64_t i) const { return magnitudes[i] * (in.fast_accum ? 0x1p-12 : 0x1p-16); }
};

void run_store(const char* what, DType a, DType b, DType out_type, int64_t batch, int64_t m,
               int64_t n, int64_t k, bool fast, bool scale_rows) {
  const Product product(a, b, batch, m, n, k, fast);
  std::vector<float> row_scale(m);
  for (auto& scale : row_scale) scale = scale_rows ? 1.5f + uniform() : 1.f;
  const Device<float> rows(row_scale), out_scale({kOutScale});
  const bool fp8 = out_type != DType::kBFloat16;
  const Device<uint8_t> out(std::vector<uint8_t>(batch * m * n * (fp8 ? 1 : 2), 0xa5));
  CUDA_CHECK(
      launch_fp8_matmul({product.in, scale_rows ? rows.get() : nullptr,
                         fp8 ? out_scale.get() : nullptr, out.get(), m * n, n, out_type, false},
                        nullptr));
  const std::vector<uint8_t> bytes = out.read();
  int64_t wrong = 0;
  for (int64_t i = 0; i < batch * m * n; ++i) {
    const double scale = row_scale[i / n % m], expected = product.sums[i] * scale;
    if (fp8) {
      const double limit = std::clamp(expected, -448. * kOutScale, 448. * kOutScale);
      wrong += !is_close(from_fp8(bytes[i], out_type) * kOutScale, limit, 0x1p-4 + 0x1p-8,
                         product.slack(i) * scale + 0x1p-10 * kOutScale);
    } else {
      __nv_bfloat16 value;
      std::memcpy(&value, &bytes[2 * i], 2);
      wrong += !is_close(__bfloat162float(value), expected, 0x1p-8, product.slack(i) * scale);
    }
  }
  report(what, m, n, k, wrong);
}

void run_add(const char* what, DType a, DType b, int64_t m, int64_t n, int64_t k, bool add) {
  const Product product(a, b, 1, m, n, k, false);
  std::vector<float> before(m * n);
  for (auto& value : before) value = uniform();
  const Device<float> out(before);
  CUDA_CHECK(launch_fp8_matmul(
      {product.in, nullptr, nullptr, out.get(), m * n, n, DType::kFloat32, add}, nullptr));
  const std::vector<float> values = out.read();
  int64_t wrong = 0;
  for (int64_t i = 0; i < m * n; ++i) {
    const double expected = product.sums[i] + (add ? before[i] : 0);
    wrong += !is_close(values[i], expected, 0x1p-20, product.slack(i) + 0x1p-20);
  }
  report(what, m, n, k, wrong);
}

void run_relu2(int64_t m, int64_t n, int64_t k, bool keep, bool transposed) {
  constexpr DType kType = DType::kFloat8E4M3;
  const Product product(kType, kType, 1, m, n, k, true);
  const Device<float> scale({kPostScale}), amax({0.f});
  const Device<__nv_bfloat16> post(std::vector<__nv_bfloat16>(m * n));
  const Device<uint8_t> post_f8(std::vector<uint8_t>(m * n)), post_t(std::vector<uint8_t>(m * n));
  CUDA_CHECK(
      launch_fp8_matmul_relu2({product.in, scale.get(), keep ? post.get() : nullptr, post_f8.get(),
                               transposed ? post_t.get() : nullptr, amax.get()},
                              nullptr));
  const auto values = post.read();
  const auto bytes = post_f8.read(), bytes_t = post_t.read();
  int64_t wrong = 0;
  float largest = 0;
  for (int64_t i = 0; i < m * n; ++i) {
    const double pre = std::max(product.sums[i], 0.), slack = product.slack(i);
    const double expected = pre * pre, loose = 2 * pre * slack + slack * slack;
    if (keep) {
      const float value = __bfloat162float(values[i]);
      largest = std::max(largest, value);
      wrong += !is_close(value, expected, 0x1p-6, loose);
      wrong += bytes[i] != to_fp8(value * (1.f / kPostScale), kType);  // bit for bit
    } else {
      wrong +=
          !is_close(from_fp8(bytes[i], kType) * kPostScale, std::min(expected, 448. * kPostScale),
                    0x1p-4 + 0x1p-6, loose + 0x1p-10 * kPostScale);
    }
    if (transposed) wrong += bytes[i] != bytes_t[i % n * m + i / n];
  }
  if (keep) wrong += amax.read()[0] != largest;
  report(transposed ? "relu2 transposed" : "relu2", m, n, k, wrong);
}

void run_drelu2(int64_t m, int64_t n, int64_t k, bool fp8, bool transposed) {
  constexpr DType kIn = DType::kFloat8E4M3, kOut = DType::kFloat8E5M2;
  const Product product(kOut, kIn, 1, m, n, k, false);
  std::vector<__nv_bfloat16> post(m * n);
  std::vector<uint8_t> post_f8(m * n);
  for (int64_t i = 0; i < m * n; ++i) {
    const float value = std::max(uniform(), 0.f);
    post[i] = __float2bfloat16_rn(value);
    post_f8[i] = to_fp8(value / kPostScale, kIn);
  }
  const Device<__nv_bfloat16> device_post(post);
  const Device<uint8_t> device_post_f8(post_f8);
  const Device<float> post_scale({kPostScale}), out_scale({kOutScale}), amax({0.f});
  const Device<uint8_t> dpre(std::vector<uint8_t>(m * n * 2)), dpre_t(std::vector<uint8_t>(m * n));
  Fp8MatmulDrelu2Params params{product.in, device_post.get(), nullptr, nullptr,
                               dpre.get(), nullptr,           nullptr};
  if (fp8) {
    params.post = device_post_f8.get();
    params.post_scale = post_scale.get();
    params.out_scale = out_scale.get();
    params.dpre_t = transposed ? dpre_t.get() : nullptr;
    params.amax = amax.get();
  }
  CUDA_CHECK(launch_fp8_matmul_drelu2(params, nullptr));
  const auto bytes = dpre.read(), bytes_t = dpre_t.read();
  int64_t wrong = 0;
  double largest = 0;
  for (int64_t i = 0; i < m * n; ++i) {
    const double value = fp8 ? from_fp8(post_f8[i], kIn) * kPostScale : __bfloat162float(post[i]);
    const double root = 2 * std::sqrt(value), expected = product.sums[i] * root;
    largest = std::max(largest, std::abs(expected));
    if (fp8) {
      wrong += !is_close(from_fp8(bytes[i], kOut) * kOutScale, expected, 0x1p-3 + 0x1p-8,
                         product.slack(i) * root + 0x1p-17 * kOutScale);
      if (transposed) wrong += bytes[i] != bytes_t[i % n * m + i / n];
    } else {
      __nv_bfloat16 result;
      std::memcpy(&result, &bytes[2 * i], 2);
      wrong += !is_close(__bfloat162float(result), expected, 0x1p-8, product.slack(i) * root);
    }
  }
  if (fp8) wrong += !is_close(amax.read()[0], largest, 0x1p-10, 0);
  report(fp8 ? "drelu2 fp8" : "drelu2", m, n, k, wrong);
}

void run_all() {
  constexpr DType kE4M3 = DType::kFloat8E4M3, kE5M2 = DType::kFloat8E5M2;
  constexpr DType kBF16 = DType::kBFloat16;
  // Large enough for 128 x 256 tiles, with edges of tiles on both sides and in K.
  run_store("store fast", kE4M3, kE4M3, kBF16, 1, 2000, 1040, 144, true, false);
  run_store("store e5m2 fast", kE5M2, kE4M3, kBF16, 1, 300, 272, 784, true, true);
  for (const bool scale_rows : {false, true}) {
    run_store("store fast small", kE4M3, kE4M3, kBF16, 1, 200, 272, 784, true, scale_rows);
    run_store("store slow", kE4M3, kE4M3, kBF16, 1, 200, 272, 784, false, scale_rows);
    run_store("store e5m2 slow", kE5M2, kE4M3, kBF16, 3, 200, 208, 144, false, scale_rows);
    run_store("store fp8", kE4M3, kE4M3, kE4M3, 2, 200, 208, 784, false, scale_rows);
  }
  run_store("store slow, one row", kE4M3, kE4M3, kBF16, 1, 1, 16, 16, false, false);
  for (const bool add : {false, true}) {  // 4096: cut in 16 parts
    run_add("add to e5m2", kE4M3, kE5M2, 208, 224, 4096, add);
    run_add("add e5m2", kE5M2, kE4M3, 208, 224, 4112, add);
  }
  for (const bool transposed : {false, true}) {
    run_relu2(272, 528, 784, true, transposed);
    run_relu2(16, 16, 16, false, transposed);
    run_drelu2(272, 400, 784, true, transposed);
  }
  run_drelu2(272, 400, 784, false, false);
}

}  // namespace
}  // namespace speedrun

int main() { return speedrun::run_on_hopper("fp8_matmul", speedrun::run_all); }
