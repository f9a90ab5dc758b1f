// Updates tensors of all types, sizes and alignments in one call against a plain loop in double: on
// the GPU if there is one (made for compute-sanitizer); those without `seen` on the host too, where
// the kernel's blocks run thread after thread.
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "kernels/adam_step.cu"
#include "tests/smoke.h"

namespace speedrun {
namespace {

constexpr float kEps = 1e-10f;
constexpr double kBeta1 = 0.75, kBeta2 = 0.95;

struct Shape {
  int64_t rows, cols, offset;  // offset: elements between an aligned address and the start
};

constexpr Shape kShapes[] = {
    {64, 64, 0},   // whole blocks
    {33, 65, 0},   // a last group that is cut, rows that start anywhere
    {33, 65, 1},   // nothing aligned
    {9, 768, 0},   // more rows than a block's warps, aligned
    {3, 5000, 0},  // rows longer than a block's chunk
    {1, 1, 0},    {0, 8, 0},
};

// Numbers as bytes of fp32 or bf16.
std::vector<uint8_t> pack(const std::vector<float>& values, DType dtype, int64_t offset) {
  const bool wide = dtype == DType::kFloat32;
  std::vector<uint8_t> bytes((values.size() + offset) * element_bytes(dtype));
  for (size_t i = 0; i < values.size(); ++i) {
    void* at = bytes.data() + (i + offset) * element_bytes(dtype);
    if (wide) {
      *static_cast<float*>(at) = values[i];
    } else {
      *static_cast<__nv_bfloat16*>(at) = from_float<__nv_bfloat16>(values[i]);
    }
  }
  return bytes;
}

std::vector<double> unpack(const std::vector<uint8_t>& bytes, DType dtype, int64_t offset) {
  std::vector<double> values(bytes.size() / element_bytes(dtype) - offset);
  for (size_t i = 0; i < values.size(); ++i) {
    const void* at = bytes.data() + (i + offset) * element_bytes(dtype);
    values[i] = dtype == DType::kFloat32 ? *static_cast<const float*>(at)
                                         : to_float(*static_cast<const __nv_bfloat16*>(at));
  }
  return values;
}

// A tensor's numbers before the update, and where they lie.
struct Problem {
  Shape shape;
  DType types[4];                          // of weight, gradient and moments
  std::vector<uint8_t> bytes[4];           // the numbers, as stored
  std::vector<double> numbers{0.1, 0.02};  // step size and decay
  std::vector<uint8_t> seen;               // empty: not used
  AdamTensor tensor{};

  Problem(const Shape& shape, DType param, DType moments, bool by_rows)
      : shape(shape), types{param, param, moments, moments} {
    std::vector<float> values[4];
    for (int64_t i = 0; i < shape.rows * shape.cols; ++i) {
      for (auto& some : values) some.push_back(uniform());
      values[3].back() = std::abs(values[3].back());
      if (by_rows && i / shape.cols % 3 != 0) values[1].back() = 0;
    }
    if (by_rows) {
      for (int64_t row = 0; row < shape.rows; ++row) seen.push_back(row % 4 == 1);
    }
    for (int i = 0; i < 4; ++i) bytes[i] = pack(values[i], types[i], shape.offset);
    tensor.numel = shape.rows * shape.cols;
    tensor.cols = shape.cols;
    tensor.beta1 = kBeta1;
    tensor.beta2 = kBeta2;
    tensor.param_dtype = param;
    tensor.moment_dtype = moments;
  }

  // Fills in the pointers; `data`: weight, gradient and moments.
  void point_to(uint8_t* const (&data)[4], const double* scalars, uint8_t* flags) {
    uint8_t* starts[4];
    for (int i = 0; i < 4; ++i) starts[i] = data[i] + shape.offset * element_bytes(types[i]);
    tensor.param = starts[0];
    tensor.grad = starts[1];
    tensor.exp_avg = starts[2];
    tensor.exp_avg_sq = starts[3];
    tensor.scalars = scalars;
    tensor.seen = seen.empty() ? nullptr : flags;
  }

  int64_t count_wrong(const std::vector<uint8_t> (&after)[4],
                      const std::vector<uint8_t>& seen_after) const {
    std::vector<double> before[4], found[4];
    for (int i = 0; i < 4; ++i) before[i] = unpack(bytes[i], types[i], shape.offset);
    for (int i = 0; i < 4; ++i) found[i] = unpack(after[i], types[i], shape.offset);
    int64_t wrong = 0;
    for (size_t i = 0; i < before[0].size(); ++i) {
      const int64_t row = static_cast<int64_t>(i) / shape.cols;
      const bool left_alone = !seen.empty() && !seen[row] && row % 3 != 0;
      double w = before[0][i], m = before[2][i], v = before[3][i];
      const double g = before[1][i];
      if (!left_alone) {
        m = m * kBeta1 + g * (1 - kBeta1);
        v = v * kBeta2 + g * g * (1 - kBeta2);
        const double update = m / (std::sqrt(v) + kEps) * numbers[0];
        w -= update + (update * w > 0 ? w * numbers[1] : 0);
      }
      const auto close = [&](int which, double right) {
        const bool wide = types[which] == DType::kFloat32;
        return is_close(found[which][i], right, wide ? 1e-5 : 0x1p-8, 1e-6);
      };
      wrong += !close(0, w) || !close(2, m) || !close(3, v) || found[1][i] != g;
      if (!seen.empty()) wrong += seen_after[row] != !left_alone;
    }
    return wrong;
  }
};

// All shapes and types; more than one table of them.
std::vector<Problem> problems(bool by_rows) {
  std::vector<Problem> all;
  for (const Shape& shape : kShapes) {
    for (const DType param : {DType::kFloat32, DType::kBFloat16}) {
      for (const DType moments : {DType::kFloat32, DType::kBFloat16}) {
        all.emplace_back(shape, param, moments, false);
        if (by_rows) all.emplace_back(shape, param, moments, true);
      }
    }
  }
  return all;
}

void run_on_host() {
  std::vector<Problem> all = problems(false);
  std::vector<std::vector<uint8_t>> data;
  Table table{};
  table.eps = kEps;
  table.cautious = true;
  int64_t blocks = 0;
  for (Problem& p : all) {
    for (const auto& bytes : p.bytes) data.push_back(bytes);
    uint8_t* starts[4];
    for (int i = 0; i < 4; ++i) starts[i] = data[data.size() - 4 + i].data();
    p.point_to(starts, p.numbers.data(), nullptr);
    if (p.tensor.numel) blocks = append(table, p.tensor, blocks);
  }
  for (int32_t block = 0; block < blocks; ++block) {
    const int index = tensor_of(table, block);
    const AdamTensor& t = table.tensors[index];
    const int64_t begin = (block - table.first_block[index]) * kChunk;
    const int64_t end = std::min(begin + kChunk, t.numel);
    const Factors factors(t, table.eps, table.cautious);
    const auto update = [&]<typename P, typename M>(P, M) {
      for (int thread = 0; thread < kThreads; ++thread) {
        update_span<P, M>(t, table.aligned[index], begin, end, thread, kThreads, factors);
      }
    };
    const bool wide = t.moment_dtype == DType::kFloat32;
    if (t.param_dtype == DType::kFloat32) {
      wide ? update(0.f, 0.f) : update(0.f, __nv_bfloat16{});
    } else {
      wide ? update(__nv_bfloat16{}, 0.f) : update(__nv_bfloat16{}, __nv_bfloat16{});
    }
  }
  for (size_t k = 0; k < all.size(); ++k) {
    const std::vector<uint8_t> after[4] = {data[4 * k], data[4 * k + 1], data[4 * k + 2],
                                           data[4 * k + 3]};
    report("on the host", all[k].shape.rows, all[k].shape.cols, 1, all[k].count_wrong(after, {}));
  }
}

// Refused before anything is launched; and elements beyond 2^31 have blocks of their own.
void check_limits() {
  AdamTensor good{};
  good.numel = int64_t{768} << 24;
  good.cols = 768;
  good.param_dtype = good.moment_dtype = DType::kFloat32;
  uint8_t flag = 0;
  int64_t wrong = blocks_of(good) * kChunk != good.numel;
  good.seen = &flag;
  wrong += blocks_of(good) * rows_per_block(768) != int64_t{1} << 24;
  for (const auto& spoil : std::vector<void (*)(AdamTensor&)>{
           [](AdamTensor& t) { t.param_dtype = DType::kFloat16; },
           [](AdamTensor& t) { t.moment_dtype = DType::kUInt8; },
           [](AdamTensor& t) { t.numel = -1; }, [](AdamTensor& t) { t.cols = 0; },
           [](AdamTensor& t) { t.cols = 767; },
           [](AdamTensor& t) { t.numel = int64_t{768} << 40; }}) {
    AdamTensor bad = good;
    spoil(bad);
    wrong += launch_adam_step(&bad, 1, kEps, true, nullptr) != cudaErrorInvalidValue;
  }
  report("limits", 1, 1, 1, wrong);
}

void run_on_gpu() {
  std::vector<Problem> all = problems(true);
  std::vector<std::unique_ptr<Device<uint8_t>>> data;
  std::vector<std::unique_ptr<Device<double>>> numbers;
  std::vector<AdamTensor> tensors;
  for (Problem& p : all) {
    uint8_t* starts[4];
    for (int i = 0; i < 4; ++i) {
      data.push_back(std::make_unique<Device<uint8_t>>(p.bytes[i]));
      starts[i] = data.back()->get();
    }
    data.push_back(std::make_unique<Device<uint8_t>>(p.seen));
    numbers.push_back(std::make_unique<Device<double>>(p.numbers));
    p.point_to(starts, numbers.back()->get(), data.back()->get());
    tensors.push_back(p.tensor);
  }
  CUDA_CHECK(
      launch_adam_step(tensors.data(), static_cast<int64_t>(tensors.size()), kEps, true, nullptr));
  for (size_t k = 0; k < all.size(); ++k) {
    const std::vector<uint8_t> after[4] = {data[5 * k]->read(), data[5 * k + 1]->read(),
                                           data[5 * k + 2]->read(), data[5 * k + 3]->read()};
    const int64_t wrong = all[k].count_wrong(after, data[5 * k + 4]->read());
    report(all[k].seen.empty() ? "on the GPU" : "on the GPU, by rows", all[k].shape.rows,
           all[k].shape.cols, 1, wrong);
  }
}

}  // namespace
}  // namespace speedrun

int main() {
  speedrun::run_on_host();
  speedrun::check_limits();
  int num_devices = 0;
  if (cudaGetDeviceCount(&num_devices) == cudaSuccess && num_devices > 0) {
    speedrun::run_on_gpu();
  } else {
    std::puts("adam_step on the GPU: not run, there is none");
  }
  return speedrun::failures != 0;
}
