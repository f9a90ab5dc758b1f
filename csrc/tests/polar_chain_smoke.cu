// Runs chains on small banks against the same products in double, each rounded to fp16: made for
// compute-sanitizer. Needs a GPU of compute capability 9.0; elsewhere it only says so.
#include <cuda_fp16.h>

#include <cmath>
#include <vector>

#include "kernels/polar_chain.h"
#include "tests/smoke.h"

namespace speedrun {
namespace {

constexpr double kCoefficients[kMaxChainSteps][3] = {
    {4.0, -2.8, 0.5}, {3.9, -2.8, 0.5}, {3.3, -2.4, 0.46}, {2.3, -1.7, 0.42}};

using Matrices = std::vector<__half>;  // (batch, n, n)

// alpha · A · B + beta · C, of which the lower triangle counts.
Matrices product(const Matrices& a, const Matrices& b, const Matrices& c, int64_t batch, int64_t n,
                 float alpha, float beta) {
  Matrices out(a.size());
  for (int64_t start = 0; start < batch * n * n; start += n * n) {
    for (int64_t row = 0; row < n; ++row) {
      for (int64_t col = 0; col <= row; ++col) {
        double sum = 0;
        for (int64_t k = 0; k < n; ++k) {
          sum += static_cast<double>(__half2float(a[start + row * n + k])) *
                 __half2float(b[start + col * n + k]);
        }
        const double added = beta * static_cast<double>(__half2float(c[start + row * n + col]));
        out[start + row * n + col] = out[start + col * n + row] =
            __double2half(alpha * sum + added);
      }
    }
  }
  return out;
}

Matrices expected_q(Matrices r, int num_steps, int64_t batch, int64_t n) {
  const Chain chain = make_chain(num_steps, kCoefficients);
  std::vector<Matrices> slots(chain_slots(num_steps));
  slots[0] = std::move(r);
  for (int i = 0; i < chain.num_products; ++i) {
    const ChainProduct& p = chain.products[i];
    slots[p.out] = product(slots[p.a], slots[p.b], slots[p.c], batch, n, p.alpha, p.beta);
    if (p.shifted < 0) continue;
    slots[p.shifted] = slots[p.out];
    for (int64_t j = 0; j < batch * n; ++j) {
      __half& diagonal = slots[p.shifted][j * n + j % n];
      diagonal = __float2half_rn(__half2float(diagonal) + p.shift);
    }
  }
  return slots.back();
}

void run(int64_t batch, int64_t n, int num_steps) {
  Matrices r(batch * n * n);
  for (int64_t start = 0; start < batch * n * n; start += n * n) {
    for (int64_t row = 0; row < n; ++row) {
      for (int64_t col = 0; col < row; ++col) {
        r[start + row * n + col] = r[start + col * n + row] = __float2half_rn(uniform() / n);
      }
      r[start + row * n + row] = __float2half_rn(0.5f + 0.2f * uniform());
    }
  }
  // What the chain may leave out is NaN at first, and counters are not 0: both would be seen.
  Matrices work(chain_slots(num_steps) * r.size(), __float2half_rn(NAN));
  std::copy(r.begin(), r.end(), work.begin());
  const Device<__half> device_work(work);
  const Device<uint32_t> counters(
      std::vector<uint32_t>(chain_slots(num_steps) * batch * (n / kSquare), 1000));
  PolarChainParams params{};
  params.work = device_work.get();
  params.counters = counters.get();
  params.batch = batch;
  params.n = n;
  params.num_steps = num_steps;
  for (int step = 0; step < num_steps; ++step) {
    std::copy(kCoefficients[step], kCoefficients[step] + 3, params.coefficients[step]);
  }
  const Matrices expected = expected_q(r, num_steps, batch, n);
  for (int repetition = 0; repetition < 2; ++repetition) {
    CUDA_CHECK(launch_polar_chain(params, nullptr));
    const Matrices found = device_work.read();
    const size_t last = found.size() - r.size();
    int64_t wrong = 0;
    for (size_t i = 0; i < r.size(); ++i) {
      // A few roundings of numbers of about 1, which later products carry on.
      wrong += !is_close(__half2float(found[last + i]), __half2float(expected[i]), 0x1p-8, 0x1p-7);
      wrong += __half2float(found[i]) != __half2float(r[i]);
    }
    for (int64_t start = 0; start < batch * n * n; start += n * n) {
      for (int64_t row = 0; row < n; ++row) {
        for (int64_t col = 0; col < row; ++col) {
          wrong += __half2float(found[last + start + row * n + col]) !=
                   __half2float(found[last + start + col * n + row]);
        }
      }
    }
    report("polar_chain", batch, n, num_steps, wrong);
  }
}

void run_all() {
  run(1, 128, 1);
  run(3, 128, 3);
  run(2, 256, 2);
  run(7, 384, 4);   // 42 squares a product, for 132 multiprocessors
  run(30, 256, 3);  // more items than they hold at once
}

}  // namespace
}  // namespace speedrun

int main() { return speedrun::run_on_hopper("polar_chain", speedrun::run_all); }
