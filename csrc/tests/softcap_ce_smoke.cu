// Losses and gradients over sizes against a plain loop in double: on the GPU if there is one (made
// for compute-sanitizer), and always on the host, where the phases of both kinds of blocks, a row's
// and a cluster's, run thread after thread over shared memory that is full of garbage before.
#include <cstring>
#include <vector>

#include "kernels/softcap_ce.cu"
#include "tests/smoke.h"

namespace speedrun {
namespace {

struct Shape {
  int64_t rows, cols, num_targets;
  bool prefix;
};

constexpr Shape kShapes[] = {
    {16, 16, 1, false},    // of a cluster's blocks, seven have no columns
    {32, 272, 3, true},    // two clusters, strips of which one is cut
    {5, 48, 3, true},      // rows that no cluster takes
    {16, 8208, 2, true},   // strips of more vectors than a warp, the last one cut
    {1, 50304, 3, true},   // the record's vocabulary
    {2, 120000, 1, false}  // rows too long for shared memory
};
constexpr float kA = 23, kB = 5, kC = 7.5, kScale = 0.75f / 448;

struct Problem {
  Shape shape;
  std::vector<bf16> z;
  std::vector<int64_t> targets, prefix_targets;
  std::vector<float> weights{1, 0.5f, 0.25f}, prefix_weight{0.3f}, scale{kScale};
  std::vector<float> loss, lse;
  std::vector<uint8_t> dz, dz_t;

  explicit Problem(const Shape& shape) : shape(shape) {
    const int64_t size = shape.rows * shape.cols;
    for (int64_t i = 0; i < size; ++i) z.push_back(from_float<bf16>(20 * uniform()));
    for (int64_t i = 0; i < shape.rows * shape.num_targets; ++i) targets.push_back(next_target(i));
    for (int64_t i = 0; i < shape.rows; ++i) prefix_targets.push_back(next_target(i + 1));
    targets[0] = prefix_targets[0] = shape.cols - 1;  // one column twice, and the last
    weights.resize(shape.num_targets);
    loss.resize(shape.rows, NAN);
    lse.resize(shape.rows, NAN);
    dz.resize(size, 0x7f);
    dz_t.resize(size, 0x7f);
  }
  int64_t next_target(int64_t i) const {
    return i % 5 == 4 ? -1 : static_cast<int64_t>((uniform() + 1) / 2 * (shape.cols - 1));
  }
  SoftcapCeParams params(bool rounded, bool counted) {
    return {z.data(),
            targets.data(),
            weights.data(),
            shape.prefix ? prefix_targets.data() : nullptr,
            prefix_weight.data(),
            scale.data(),
            loss.data(),
            lse.data(),
            dz.data(),
            dz_t.data(),
            shape.rows,
            shape.cols,
            shape.num_targets,
            kA,
            kB,
            kC,
            counted,
            rounded};
  }
};

double decode(uint8_t code) {
  const int exponent = code >> 2 & 31, mantissa = code & 3;
  if (exponent == 31) return NAN;
  const double size =
      exponent ? std::ldexp(4 + mantissa, exponent - 17) : std::ldexp(mantissa, -16);
  return code & 0x80 ? -size : size;
}

// What is wrong of a row: losses to fp32's rounding, bytes to half a step of e5m2 and bf16's share.
int64_t wrong_in_row(const Problem& q, int64_t row, bool rounded, bool counted) {
  std::vector<double> sigmoids(q.shape.cols);
  double sum = 0, loss = 0, total = 0;
  for (int64_t col = 0; col < q.shape.cols; ++col) {
    const double x = to_float(q.z[row * q.shape.cols + col]);
    double s = 1 / (1 + std::exp(-(x + kB) / kC));
    if (rounded) s = to_float(from_float<bf16>(static_cast<float>(s)));
    sigmoids[col] = s;
    sum += std::exp(kA * s);
  }
  std::vector<double> own(q.shape.cols);
  const int64_t* targets = &q.targets[row * q.shape.num_targets];
  for (int64_t n = 0; n < q.shape.num_targets + q.shape.prefix; ++n) {
    const bool is_prefix = n == q.shape.num_targets;
    const int64_t target = is_prefix ? q.prefix_targets[row] : targets[n];
    const double weight = is_prefix ? q.prefix_weight[0] : q.weights[n];
    if (target >= 0) {
      loss += weight * (std::log(sum) - kA * sigmoids[target]);
      own[target] += weight;
      total += weight;
    } else if (!is_prefix && counted && targets[0] >= 0) {
      total += weight;
    }
  }
  int64_t wrong = !is_close(q.loss[row], loss, 1e-6, 1e-5);
  wrong += !is_close(q.lse[row], std::log(sum), 1e-6, 0);
  for (int64_t col = 0; col < q.shape.cols; ++col) {
    const double s = sigmoids[col], share = total * std::exp(kA * s) / sum - own[col];
    const double grad = share * s * (1 - s) * kA / kC / kScale, size = std::abs(grad);
    const double half_step = std::ldexp(1, std::max(std::ilogb(std::max(size, 1e-9)), -14) - 3);
    const uint8_t code = q.dz[row * q.shape.cols + col];
    wrong += !is_close(decode(code), grad, 1.0 / 128, half_step);
    wrong += q.dz_t[col * q.shape.rows + row] != code;
  }
  return wrong;
}

// kRows rows, kBlocks blocks that share them, as softcap_ce_kernel does it.
template <bool kRounded, int kRows, bool kKept>
void run_on_host(const SoftcapCeParams& p) {
  constexpr int kLanes = kThreads / kRows, kBlocks = kRows == 1 ? 1 : kClusterSize;
  const Softcap softcap(p);
  const int64_t width = kRows == 1 ? p.cols : strip_width(p.cols), pitch = width / 8;
  std::vector<Vec<bf16>> shared[kBlocks];
  for (int64_t first_row = 0; first_row < p.rows; first_row += kRows) {
    float sums[kRows] = {};
    for (int rank = 0; rank < kBlocks; ++rank) {
      shared[rank].assign(kRows * pitch, {{~0u, ~0u, ~0u, ~0u}});
      const Strip strip(rank * width, width, p.cols);
      for (int i = 0; i < kThreads; ++i) {
        const bf16* z =
            static_cast<const bf16*>(p.z) + (first_row + i / kLanes) * p.cols + strip.start;
        Vec<bf16>* kept = kKept ? &shared[rank][i / kLanes * pitch] : nullptr;
        sums[i / kLanes] += sum_powers<kRounded, kLanes>(softcap, z, strip.cols, i % kLanes, kept);
      }
    }
    for (int rank = 0; rank < kBlocks; ++rank) {
      const Strip strip(rank * width, width, p.cols);
      for (int i = 0; i < kThreads; ++i) {
        const int64_t row = first_row + i / kLanes, offset = row * p.cols + strip.start;
        const float times =
            Targets{p, row}.total() * (softcap.a / softcap.c) / (sums[i / kLanes] * *p.scale);
        cast_factors<kRounded, kLanes, kKept, (kRows > 1)>(
            softcap, static_cast<const bf16*>(p.z) + offset, strip.cols, i % kLanes, times,
            &shared[rank][i / kLanes * pitch], p.dz + offset);
        if (rank == 0 && i % kLanes == 0) store_loss<kRounded>(softcap, p, row, sums[i / kLanes]);
      }
      for (int i = 0; i < kThreads && kRows > 1; ++i) {
        store_columns(shared[rank].data(), static_cast<int>(pitch), strip.cols,
                      p.dz_t + strip.start * p.rows + first_row, p.rows, i);
      }
      for (int own = 0; own < kRows; ++own) {
        const int64_t row = first_row + own;
        for (int64_t n = 0; n < Targets{p, row}.count(); ++n) {
          store_target<kRounded>(softcap, p, row, n, strip, sums[own], kRows > 1);
        }
      }
    }
  }
  for (int64_t i = 0; kRows == 1 && i < p.rows * p.cols; ++i) {  // launch_transpose's part
    p.dz_t[i % p.cols * p.rows + i / p.cols] = p.dz[i];
  }
}

void check(const char* what, const Problem& q, bool rounded, bool counted) {
  int64_t wrong = 0;
  for (int64_t row = 0; row < q.shape.rows; ++row) wrong += wrong_in_row(q, row, rounded, counted);
  report(what, q.shape.rows, q.shape.cols, q.shape.num_targets, wrong);
}

template <bool kRounded, int kRows, bool kKept>
void check_on_host(const char* what, const Shape& shape) {
  if (shape.rows % kRows != 0) return;
  Problem q(shape);
  run_on_host<kRounded, kRows, kKept>(q.params(kRounded, kRounded));
  check(what, q, kRounded, kRounded);
}

void check_on_gpu(const Shape& shape, bool rounded) {
  Problem q(shape);
  const Device<bf16> z(q.z);
  const Device<int64_t> targets(q.targets), prefix_targets(q.prefix_targets);
  const Device<float> weights(q.weights), prefix_weight(q.prefix_weight), scale(q.scale);
  const Device<float> loss(q.loss), lse(q.lse);
  const Device<uint8_t> dz(q.dz), dz_t(q.dz_t);
  SoftcapCeParams p = q.params(rounded, rounded);
  p.z = z.get();
  p.targets = targets.get();
  if (shape.prefix) p.prefix_targets = prefix_targets.get();
  p.weights = weights.get();
  p.prefix_weight = prefix_weight.get();
  p.scale = scale.get();
  p.loss = loss.get();
  p.lse = lse.get();
  p.dz = dz.get();
  p.dz_t = dz_t.get();
  CUDA_CHECK(launch_softcap_ce(p, nullptr));
  CUDA_CHECK(cudaDeviceSynchronize());
  q.loss = loss.read();
  q.lse = lse.read();
  q.dz = dz.read();
  q.dz_t = dz_t.read();
  check("on the GPU", q, rounded, rounded);
}

}  // namespace
}  // namespace speedrun

int main() {
  using namespace speedrun;
  int num_devices = 0;
  const bool on_gpu = cudaGetDeviceCount(&num_devices) == cudaSuccess && num_devices > 0;
  for (const Shape& shape : kShapes) {
    check_on_host<false, 1, true>("rows", shape);
    check_on_host<true, 1, true>("rows, rounded", shape);
    check_on_host<true, 1, false>("rows, not kept", shape);
    check_on_host<false, kGroupRows, true>("clusters", shape);
    check_on_host<true, kGroupRows, true>("clusters, rounded", shape);
    for (const bool rounded : {false, true}) {
      if (on_gpu) check_on_gpu(shape, rounded);
    }
  }
  return failures != 0;
}
