// Runs both launches over sizes, types and alignments against a plain loop in double: on the GPU if
// there is one (made for compute-sanitizer), and always on the host, where blocks run thread after
// thread.
#include <cmath>
#include <vector>

#include "kernels/polar_express.cu"
#include "tests/smoke.h"

namespace speedrun {
namespace {

struct Shape {
  int64_t batch, numel, offset;  // offset: elements between an aligned address and the start
};

constexpr Shape kShapes[] = {
    {2, 16384, 0},  // whole chunks
    {3, 10000, 0},  // a last chunk that is cut, aligned
    {2, 333, 0},    // matrices that start anywhere
    {1, 8200, 1},   // nothing aligned
    {2, 1, 0},     {0, 64, 0},
};
constexpr double kMu = 0.95, kFactor = 1.02, kEps = 1e-6;

template <typename G, typename X, bool kAligned>
void run_on_host(const PolarPrologueParams& p, int64_t chunks) {
  std::vector<float> totals(p.batch);
  for (int64_t block = 0; block < p.batch * chunks; ++block) {
    const Chunk chunk(block, p.numel, chunks);
    float sum = 0;
    for (int thread = 0; thread < kThreads; ++thread) {
      sum += update_momentum<G, kAligned>(p, chunk, thread);
    }
    p.sums[block] = sum;
    totals[chunk.matrix] += sum;
  }
  for (int64_t block = 0; block < p.batch * chunks; ++block) {
    const Chunk chunk(block, p.numel, chunks);
    for (int thread = 0; thread < kThreads; ++thread) {
      divide_by_norm<G, X, kAligned>(p, chunk, totals[chunk.matrix], thread);
    }
  }
}

template <typename T>
std::vector<T> numbers(int64_t count) {
  std::vector<T> values(count);
  for (T& value : values) value = from_float<T>(uniform());
  return values;
}

template <typename G, typename X>
void run(const Shape& s, DType grad_dtype, DType x_dtype, bool gpu) {
  const int64_t count = s.batch * s.numel, chunks = ceil_div(s.numel, kPolarChunk);
  const auto grad = numbers<G>(count + s.offset);
  const auto before = numbers<float>(count + s.offset);
  std::vector<float> momentum = before, sums(s.batch * chunks);
  std::vector<X> x(count + s.offset);
  PolarPrologueParams p{};
  p.batch = s.batch, p.numel = s.numel;
  p.norm_factor = kFactor, p.eps = kEps;
  p.grad_dtype = grad_dtype, p.x_dtype = x_dtype;
  if (gpu) {
    const Device<G> gpu_grad(grad);
    const Device<float> gpu_momentum(momentum), gpu_sums(sums);
    const Device<X> gpu_x(x);
    const Device<double> gpu_mu({kMu});
    p.grad = gpu_grad.get() + s.offset, p.momentum = gpu_momentum.get() + s.offset;
    p.mu = gpu_mu.get(), p.sums = gpu_sums.get(), p.x = gpu_x.get() + s.offset;
    CUDA_CHECK(launch_polar_express_momentum(p, nullptr));
    CUDA_CHECK(launch_polar_express_normalize(p, nullptr));
    momentum = gpu_momentum.read(), sums = gpu_sums.read(), x = gpu_x.read();
  } else {
    p.grad = grad.data() + s.offset, p.momentum = momentum.data() + s.offset;
    p.mu = &kMu, p.sums = sums.data(), p.x = x.data() + s.offset;
    groups_are_aligned(p) ? run_on_host<G, X, true>(p, chunks)
                          : run_on_host<G, X, false>(p, chunks);
  }

  int64_t wrong = 0;
  for (int64_t b = 0; b < s.batch; ++b) {
    std::vector<double> nesterov(s.numel), of_chunk(chunks);
    double total = 0;
    for (int64_t i = 0; i < s.numel; ++i) {
      const int64_t at = s.offset + b * s.numel + i;
      const double g = to_float(grad[at]), m = before[at] + (1 - kMu) * (g - before[at]);
      wrong += !is_close(momentum[at], m, 1e-6, 1e-6);
      nesterov[i] = g + kMu * (m - g);
      of_chunk[i / kPolarChunk] += nesterov[i] * nesterov[i];
      total += nesterov[i] * nesterov[i];
    }
    for (int64_t c = 0; c < chunks; ++c) {
      wrong += !is_close(sums[b * chunks + c], of_chunk[c], 1e-5, 1e-12);
    }
    const double divisor = std::sqrt(total) * kFactor + kEps;
    for (int64_t i = 0; i < s.numel; ++i) {
      const double found = to_float(x[s.offset + b * s.numel + i]);
      wrong += !is_close(found, nesterov[i] / divisor, 0x1p-8, 1e-5 / divisor);
    }
  }
  report(gpu ? "on the GPU" : "on the host", s.batch, s.numel, s.offset, wrong);
}

void run_all(bool gpu) {
  constexpr DType kFP32 = DType::kFloat32, kBF16 = DType::kBFloat16, kFP16 = DType::kFloat16;
  for (const Shape& s : kShapes) {
    run<float, __nv_bfloat16>(s, kFP32, kBF16, gpu);
    run<float, __half>(s, kFP32, kFP16, gpu);
    run<__nv_bfloat16, __nv_bfloat16>(s, kBF16, kBF16, gpu);
    run<__nv_bfloat16, __half>(s, kBF16, kFP16, gpu);
  }
}

}  // namespace
}  // namespace speedrun

int main() {
  speedrun::run_all(false);
  int num_devices = 0;
  if (cudaGetDeviceCount(&num_devices) == cudaSuccess && num_devices > 0) {
    speedrun::run_all(true);
  } else {
    std::puts("polar_express on the GPU: not run, there is none");
  }
  return speedrun::failures != 0;
}
