// Runs both GEMMs of the bf16 MLP on small matrices against plain loops in double: made for
// compute-sanitizer. Needs a GPU of compute capability 9.0; elsewhere it only says so.
#include <cuda_bf16.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/relu2_mlp.h"
#include "tests/smoke.h"

namespace speedrun {
namespace {

using Values = std::vector<__nv_bfloat16>;

Values random_bf16(int64_t count) {
  Values values(count);
  for (auto& value : values) value = __float2bfloat16_rn(uniform());
  return values;
}

void run(int64_t tokens, int64_t hidden, int64_t dim, bool backward) {
  const Values a = random_bf16(tokens * dim), b = random_bf16(hidden * dim);
  Values post = random_bf16(tokens * hidden);
  for (auto& value : post) value = __float2bfloat16_rn(std::abs(__bfloat162float(value)));
  const Device<__nv_bfloat16> device_a(a), device_b(b), device_post(post), out(post);
  if (backward) {
    CUDA_CHECK(launch_drelu2({device_a.get(), device_b.get(), device_post.get(), out.get(), tokens,
                              dim, hidden, dim, dim, hidden, hidden},
                             nullptr));
  } else {
    CUDA_CHECK(launch_relu2_up(
        {device_a.get(), device_b.get(), out.get(), tokens, dim, hidden, dim, dim, hidden},
        nullptr));
  }
  const Values values = out.read();
  int64_t wrong = 0;
  for (int64_t i = 0; i < tokens; ++i) {
    for (int64_t j = 0; j < hidden; ++j) {
      double sum = 0, magnitude = 0;
      for (int64_t l = 0; l < dim; ++l) {
        const double term = static_cast<double>(__bfloat162float(a[i * dim + l])) *
                            __bfloat162float(b[j * dim + l]);
        sum += term;
        magnitude += std::abs(term);
      }
      const double slack = 0x1p-16 * magnitude, value = __bfloat162float(values[i * hidden + j]);
      if (backward) {
        const double root = 2 * std::sqrt(double{__bfloat162float(post[i * hidden + j])});
        wrong += !is_close(value, sum * root, 0x1p-8, slack * root);
      } else {
        const double pre = std::max(sum, 0.);
        wrong += !is_close(value, pre * pre, 0x1p-6, 2 * pre * slack + slack * slack);
      }
    }
  }
  report(backward ? "drelu2" : "relu2_up", tokens, hidden, dim, wrong);
}

void run_all() {
  for (const bool backward : {false, true}) {
    run(272, 528, 776, backward);  // edges of tiles on all sides
    run(1, 8, 8, backward);
  }
}

}  // namespace
}  // namespace speedrun

int main() { return speedrun::run_on_hopper("relu2_mlp", speedrun::run_all); }
