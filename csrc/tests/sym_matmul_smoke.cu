// Runs symmetric products of small matrices against plain loops in double: made for
// compute-sanitizer. Needs a GPU of compute capability 9.0; elsewhere it only says so.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <vector>

#include "kernels/sym_matmul.h"
#include "tests/smoke.h"

namespace speedrun {
namespace {

constexpr float kAlpha = 0.5f, kBeta = -2.f;

template <class T>
std::vector<T> random_values(int64_t count) {
  std::vector<T> values(count);
  for (T& value : values) value = static_cast<T>(uniform());
  return values;
}

// What the kernel may leave out is NaN at first, and seen.
template <class T>
void run(DType dtype, double relative, int64_t batch, int64_t n, int64_t k, bool transposed,
         bool with_c) {
  const std::vector<T> a = random_values<T>(batch * n * k);
  std::vector<T> c = random_values<T>(batch * n * n);
  for (int64_t l = 0; l < batch; ++l) {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < i; ++j) c[(l * n + j) * n + i] = c[(l * n + i) * n + j];
    }
  }
  const std::vector<T> nothing(batch * n * n, static_cast<T>(NAN));
  const Device<T> device_a(a), device_c(c), out(nothing);
  const int64_t row_stride = transposed ? n : k;
  SymMatmulParams params{};
  params.a = params.b = device_a.get();
  params.c = with_c ? device_c.get() : nullptr;
  params.out = out.get();
  params.batch = batch;
  params.n = n;
  params.k = k;
  params.a_batch_stride = params.b_batch_stride = n * k;
  params.a_row_stride = params.b_row_stride = row_stride;
  params.c_batch_stride = params.out_batch_stride = n * n;
  params.c_row_stride = params.out_row_stride = n;
  params.dtype = dtype;
  params.transposed = transposed;
  params.alpha = kAlpha;
  params.beta = with_c ? kBeta : 0.f;
  CUDA_CHECK(launch_sym_matmul(params, nullptr));
  const std::vector<T> values = out.read();

  int64_t wrong = 0;
  for (int64_t l = 0; l < batch; ++l) {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        double sum = 0, magnitude = 0;
        for (int64_t step = 0; step < k; ++step) {
          const auto at = [&](int64_t row) {
            const int64_t place = transposed ? step * n + row : row * k + step;
            return static_cast<double>(static_cast<float>(a[l * n * k + place]));
          };
          sum += at(i) * at(j);
          magnitude += std::abs(at(i) * at(j));
        }
        const int64_t place = (l * n + i) * n + j;
        double expected = kAlpha * sum;
        if (with_c) expected += kBeta * static_cast<double>(static_cast<float>(c[place]));
        const double value = static_cast<float>(values[place]);
        const double mirror = static_cast<float>(values[(l * n + j) * n + i]);
        wrong += value != mirror || !is_close(value, expected, relative, magnitude * 0x1p-22);
      }
    }
  }
  report(transposed ? "sym_matmul, transposed" : "sym_matmul", batch, n, k, wrong);
}

template <class T>
void run_type(DType dtype, double relative) {
  for (const bool transposed : {false, true}) {
    for (const bool with_c : {false, true}) {
      run<T>(dtype, relative, 1, 8, 8, transposed, with_c);
      run<T>(dtype, relative, 3, 200, 72, transposed, with_c);     // halves; squares are cut
      run<T>(dtype, relative, 100, 136, 200, transposed, with_c);  // more squares than SMs
    }
  }
}

void run_all() {
  run_type<__nv_bfloat16>(DType::kBFloat16, 0x1p-8);
  run_type<__half>(DType::kFloat16, 0x1p-11);
}

}  // namespace
}  // namespace speedrun

int main() { return speedrun::run_on_hopper("sym_matmul", speedrun::run_all); }
