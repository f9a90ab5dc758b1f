// Runs both kernels over sizes, types and alignments against a plain loop in double: on the GPU if
// there is one (made for compute-sanitizer), and always on the host, where a row's lanes run one
// after another.
#include <cmath>
#include <memory>
#include <numeric>
#include <vector>

#include "kernels/attention_epilogue.cu"
#include "tests/smoke.h"

namespace speedrun {
namespace {

struct Shape {
  int64_t tokens, heads, dim;
  bool alpha, gate, fp8;
  bool shared;           // one gate for all tokens, one alpha for all heads
  int64_t misalignment;  // elements between an aligned address and the start
};

constexpr Shape kShapes[] = {
    {16, 6, 128, true, true, true, false, 0},  // whole blocks
    {11, 3, 96, true, false, false, true, 0},  // a block that is cut
    {7, 3, 64, false, true, true, true, 0},    {5, 2, 8, true, true, true, false, 1},
    {3, 1, 128, false, false, true, false, 0}, {0, 4, 64, true, true, true, false, 0},
};
constexpr float kScale = 0.0078125f;

double sum_of(const float (&parts)[kLanes]) { return std::accumulate(parts, parts + kLanes, 0.0); }

// The kernels' bodies, lane after lane: sums, then what follows from them.
template <typename T, bool kAligned>
void run_on_host(const AttentionEpilogueParams& p, const AttentionEpilogueBwdParams& q) {
  const AttentionEpilogueInputs& in = p.in;
  for (int64_t row = 0; row < ceil_div(in.tokens * in.heads, kRows) * kRows; ++row) {
    float y[kLanes][kGroup], v[kLanes][kGroup], g[kLanes][kGroup], grad[kLanes][kGroup];
    float inner[kLanes], square[kLanes], along[kLanes], dgate[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const Lane lane = Lane::of<T>(in, row, l);
      load_group<kAligned, T>(in.y, lane.at, lane.count, y[l]);
      load_group<kAligned, T>(q.grad, lane.at, lane.count, grad[l]);
      std::copy(grad[l], grad[l] + kGroup, g[l]);
      scale_by(g[l], lane.gate);
      if (in.alpha == nullptr) continue;
      load_group<kAligned, T>(in.v, lane.at, lane.count, v[l]);
      inner[l] = dot(y[l], v[l]), square[l] = dot(v[l], v[l]), along[l] = dot(g[l], v[l]);
    }
    for (int l = 0; l < kLanes; ++l) {
      const Lane lane = Lane::of<T>(in, row, l);
      float out[kGroup];
      std::copy(y[l], y[l] + kGroup, out);
      if (in.alpha != nullptr) {
        const Shares shares(lane, sum_of(inner), sum_of(square));
        add(out, -shares.tau * shares.s, v[l]);
        xsa_bwd<T, kAligned>(q, lane, shares, sum_of(along), v[l], y[l], g[l]);
      }
      scale_by(out, lane.gate);
      const float greatest = std::bit_cast<float>(store_both<T, kAligned>(p, lane, out));
      if (p.amax != nullptr) *p.amax = std::max(*p.amax, greatest);
      store_group<kAligned, T>(q.dy, lane.at, lane.count, g[l]);
      dgate[l] = dot(grad[l], y[l]);
    }
    if (in.gate != nullptr && row < in.tokens * in.heads) {
      static_cast<T*>(q.dgate)[row] = from_float<T>(sum_of(dgate));
    }
  }
}

template <typename T>
void run(const Shape& s, DType dtype, bool gpu) {
  const int64_t rows = s.tokens * s.heads, numel = rows * s.dim, pad = s.misalignment;
  enum { kY, kV, kAlpha, kGate, kGrad, kOut, kDy, kDv, kDalpha, kDgate, kCount };
  std::vector<T> x[kCount];
  for (int i = 0; i < kCount; ++i) {
    const bool by_row = i == kAlpha || i == kGate || i == kDalpha || i == kDgate;
    x[i].resize((by_row ? rows : numel) + pad);
    for (T& value : x[i]) value = from_float<T>(uniform());
  }
  for (int64_t i = 0; i < s.dim && rows > 1; ++i) {  // |v|^2 below 1e-8
    x[kV][pad + s.dim + i] = from_float<T>(1e-6f * uniform());
  }
  std::vector<uint8_t> codes(numel + pad);
  std::vector<float> amax{0.f}, scale{kScale};

  std::vector<std::unique_ptr<Device<T>>> copies;
  T* data[kCount];
  for (int i = 0; i < kCount; ++i) {
    if (gpu) copies.push_back(std::make_unique<Device<T>>(x[i]));
    data[i] = (gpu ? copies.back()->get() : x[i].data()) + pad;
  }
  std::unique_ptr<Device<uint8_t>> gpu_codes;
  std::unique_ptr<Device<float>> gpu_amax, gpu_scale;
  if (gpu) {
    gpu_codes = std::make_unique<Device<uint8_t>>(codes);
    gpu_amax = std::make_unique<Device<float>>(amax);
    gpu_scale = std::make_unique<Device<float>>(scale);
  }
  AttentionEpilogueInputs in{};
  in.y = data[kY], in.v = s.alpha ? data[kV] : nullptr;
  in.alpha = s.alpha ? data[kAlpha] : nullptr, in.gate = s.gate ? data[kGate] : nullptr;
  in.tokens = s.tokens, in.heads = s.heads, in.dim = s.dim, in.dtype = dtype;
  in.alpha_token_stride = s.shared ? 1 : s.heads, in.alpha_head_stride = s.shared ? 0 : 1;
  in.gate_token_stride = s.shared ? 0 : s.heads, in.gate_head_stride = 1;
  AttentionEpilogueParams forward{in, data[kOut], nullptr, nullptr, nullptr};
  if (s.fp8) {
    forward.scale = gpu ? gpu_scale->get() : scale.data();
    forward.out_f8 = (gpu ? gpu_codes->get() : codes.data()) + pad;
    forward.amax = gpu ? gpu_amax->get() : amax.data();
  }
  const AttentionEpilogueBwdParams backward{in,        data[kGrad],   data[kDy],
                                            data[kDv], data[kDalpha], data[kDgate]};
  if (gpu) {
    CUDA_CHECK(launch_attention_epilogue(forward, nullptr));
    CUDA_CHECK(launch_attention_epilogue_bwd(backward, nullptr));
    for (int i = kOut; i < kCount; ++i) x[i] = copies[i]->read();
    codes = gpu_codes->read(), amax = gpu_amax->read();
  } else if (is_all_aligned(forward) && is_all_aligned(backward)) {
    run_on_host<T, true>(forward, backward);
  } else {
    run_on_host<T, false>(forward, backward);
  }

  int64_t wrong = 0;
  const auto at = [&](int which, int64_t i) -> double { return to_float(x[which][pad + i]); };
  const double relative = sizeof(T) == 4 ? 0x1p-18 : 0x1p-8;
  const auto expect = [&](int which, int64_t i, double value, double size) {
    wrong += !is_close(at(which, i), value, relative, relative * size);
  };
  double greatest = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t token = row / s.heads, head = row % s.heads, start = row * s.dim;
    const double gate = s.gate ? at(kGate, s.shared ? head : row) : 1;
    const double tau = s.alpha ? std::tanh(at(kAlpha, s.shared ? token : row)) : 0;
    double inner = 0, square = 0, along = 0, dgate = 0;
    for (int64_t i = start; i < start + s.dim; ++i) {
      inner += at(kY, i) * at(kV, i), square += at(kV, i) * at(kV, i);
      along += gate * at(kGrad, i) * at(kV, i);
    }
    const double n = std::max(square, 1e-8), share = inner / n, size = std::abs(share) + 1;
    for (int64_t i = start; i < start + s.dim; ++i) {
      const double y = at(kY, i), v = at(kV, i), G = gate * at(kGrad, i);
      const double z = y - tau * share * v;
      dgate += at(kGrad, i) * z;
      expect(kOut, i, gate * z, size);
      expect(kDy, i, G - tau * along / n * v, size);
      const double twice = square < 1e-8 ? 0 : 2 * share * v;
      if (s.alpha)
        expect(kDv, i, -tau * (share * G + along / n * (y - twice)), size + std::abs(along) / n);
      greatest = std::max(greatest, std::abs(at(kOut, i)));
      if (!s.fp8) continue;
      const float code =
          static_cast<float>(__nv_fp8_e4m3(static_cast<float>(at(kOut, i)) / kScale));
      __nv_fp8_e4m3 found;
      found.__x = codes[pad + i];
      wrong += static_cast<float>(found) != code;
    }
    if (s.gate) expect(kDgate, row, dgate, s.dim);
    if (s.alpha) expect(kDalpha, row, (tau * tau - 1) * share * along, size * s.dim);
  }
  if (s.fp8) wrong += amax[0] != greatest;
  report(gpu ? "on the GPU" : "on the host", s.tokens, s.heads, s.dim, wrong);
}

void run_all(bool gpu) {
  for (const Shape& s : kShapes) {
    run<float>(s, DType::kFloat32, gpu);
    run<__nv_bfloat16>(s, DType::kBFloat16, gpu);
    run<__half>(s, DType::kFloat16, gpu);
  }
}

}  // namespace
}  // namespace speedrun

int main() { return speedrun::run_everywhere("attention_epilogue", speedrun::run_all); }
