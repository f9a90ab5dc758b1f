// Runs symmetric products of small matrices against plain loops in double: made for
// compute-sanitizer. Needs a GPU of compute capability 9.0; elsewhere it only says so.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
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

// What the kernel may leave out is NaN at first, and seen. two: another B than A, whose product is
// not symmetric: that its lower triangle counts shows which of both was copied.
template <class T>
void run(DType dtype, double relative, int64_t batch, int64_t n, int64_t k, bool transposed,
         bool two, bool with_c) {
  const std::vector<T> a = random_values<T>(batch * n * k);
  const std::vector<T> b = two ? random_values<T>(batch * n * k) : a;
  std::vector<T> c = random_values<T>(batch * n * n);
  for (int64_t l = 0; l < batch; ++l) {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < i; ++j) c[(l * n + j) * n + i] = c[(l * n + i) * n + j];
    }
  }
  const std::vector<T> nothing(batch * n * n, static_cast<T>(NAN));
  const Device<T> device_a(a), device_b(b), device_c(c), out(nothing);
  const int64_t row_stride = transposed ? n : k;
  SymMatmulParams params{};
  params.a = device_a.get();
  params.b = two ? device_b.get() : device_a.get();
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
          const auto at = [&](const std::vector<T>& x, int64_t row) {
            const int64_t place = transposed ? step * n + row : row * k + step;
            return static_cast<double>(static_cast<float>(x[l * n * k + place]));
          };
          const double product = at(a, std::max(i, j)) * at(b, std::min(i, j));
          sum += product;
          magnitude += std::abs(product);
        }
        const int64_t place = (l * n + i) * n + j;
        double expected = kAlpha * sum;
        if (with_c) {
          const double added = kBeta * static_cast<double>(static_cast<float>(c[place]));
          expected += added;
          magnitude += std::abs(added);
        }
        const double value = static_cast<float>(values[place]);
        const double mirror = static_cast<float>(values[(l * n + j) * n + i]);
        wrong += value != mirror || !is_close(value, expected, relative, magnitude * 0x1p-20);
      }
    }
  }
  report(two          ? "sym_matmul, a and b"
         : transposed ? "sym_matmul, transposed"
                      : "sym_matmul",
         batch, n, k, wrong);
}

template <class T>
void run_type(DType dtype, double relative) {
  enum { kRows, kColumns, kTwo };
  for (const auto kind : {kRows, kColumns, kTwo}) {
    for (const bool with_c : {false, true}) {
      const auto run_size = [&](int64_t batch, int64_t n, int64_t k) {
        run<T>(dtype, relative, batch, n, k, kind == kColumns, kind == kTwo, with_c);
      };
      run_size(1, 8, 8);
      run_size(3, 200, 72);    // half squares; the edge cuts them
      run_size(87, 136, 200);  // whole ones, twice as many as the 132 SMs are
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
