// Runs both kernels over sizes, types and alignments against a plain loop in double: on the GPU if
// there is one (made for compute-sanitizer), and always on the host, where a row's lanes run one
// after another.
#include <cmath>
#include <memory>
#include <numeric>
#include <vector>

#include "kernels/qk_norm_rope.cu"
#include "tests/smoke.h"

namespace speedrun {
namespace {

struct Shape {
  int64_t parts, part_tokens, heads, head_dim, value_dim;
  bool offset_keys, has_first, own_tables, has_ve, has_gate;
  int64_t misalignment;  // elements between an aligned address and the start
};

constexpr Shape kShapes[] = {
    {1, 16, 6, 128, 128, false, false, false, true, true, 0},  // whole blocks
    {2, 11, 3, 64, 128, true, true, false, true, true, 0},     // a block that is cut, two parts
    {2, 7, 4, 96, 64, true, false, true, true, false, 0},      // tables by head, ve without gate
    {1, 5, 3, 128, 96, true, true, true, true, true, 1},       // nothing aligned
    {3, 1, 1, 16, 8, true, false, false, false, false, 0},     // parts of one token
    {0, 4, 2, 64, 64, false, false, false, false, false, 0},
};

// Tensors of one call, at `misalignment`; on the GPU copies of them.
template <typename T>
struct Tensors {
  std::vector<T> qkv, cos, sin, ve, gate, dq, dk, dv;  // inputs
  std::vector<T> q, k, v, dqkv, dve, dgate;            // outputs
  std::vector<uint8_t> first;
  int64_t pad;

  explicit Tensors(const Shape& s) : pad(s.misalignment) {
    const int64_t tokens = s.parts * s.part_tokens, rows = tokens * s.heads;
    const int64_t qk = rows * s.head_dim, values = rows * s.value_dim;
    const int64_t table = s.part_tokens * (s.own_tables ? s.heads : 1) * s.head_dim / 4;
    for (auto [x, count] : {std::pair{&qkv, 2 * qk + values},
                            {&cos, table},
                            {&sin, table},
                            {&ve, values},
                            {&gate, rows},
                            {&dq, qk},
                            {&dk, qk},
                            {&dv, values},
                            {&q, qk},
                            {&k, qk},
                            {&v, values},
                            {&dqkv, 2 * qk + values},
                            {&dve, values},
                            {&dgate, rows}}) {
      x->resize(count + pad);
      for (T& value : *x) value = from_float<T>(uniform());
    }
    first.resize(tokens);
    for (uint8_t& flag : first) flag = uniform() > 0.5f;
  }
};

template <typename T>
QkNormRopeInputs inputs_of(const Shape& s, DType dtype) {
  QkNormRopeInputs in{};
  in.tokens = s.parts * s.part_tokens, in.part_tokens = s.part_tokens;
  in.heads = s.heads, in.head_dim = s.head_dim, in.value_dim = s.value_dim;
  in.table_heads = s.own_tables ? s.heads : 1;
  in.eps = 0x1p-23f, in.offset_keys = s.offset_keys, in.dtype = dtype;
  return in;
}

double sum_of(const float (&parts)[kLanes]) { return std::accumulate(parts, parts + kLanes, 0.0); }

// The kernels' bodies, lane after lane.
template <typename T, bool kAligned>
void run_on_host(const QkNormRopeParams& p) {
  const QkNormRopeInputs& in = p.in;
  for (int64_t row = 0; row < ceil_div(in.tokens * in.heads, kRows) * kRows; ++row) {
    float x[2][kLanes][kGroup], squares[2][kLanes];
    for (int phase = 0; phase < 2; ++phase) {
      for (int l = 0; l < kLanes; ++l) {
        const Lane lane(in, row, l);
        const int64_t count = lane.count(in.head_dim);
        if (phase == 0) {
          load_group<kAligned, T>(in.qkv, lane.q_at(in), count, x[0][l]);
          load_group<kAligned, T>(in.qkv, lane.k_at(in), count, x[1][l]);
          for (int i = 0; i < 2; ++i) squares[i][l] = dot(x[i][l], x[i][l]);
          move_value<T, kAligned>(p, lane);
          continue;
        }
        const Angles angles = load_angles<T, kAligned>(in, lane);
        for (int i = 0; i < 2; ++i) norm_turn(in, x[i][l], sum_of(squares[i]), angles);
        store_group<kAligned, T>(p.q, lane.row * in.head_dim + lane.col, count, x[0][l]);
        store_key<T, kAligned>(p, lane, x[1][l]);
      }
    }
  }
}

template <typename T, bool kAligned>
void run_on_host(const QkNormRopeBwdParams& p) {
  const QkNormRopeInputs& in = p.in;
  for (int64_t row = 0; row < ceil_div(in.tokens * in.heads, kRows) * kRows; ++row) {
    float x[2][kLanes][kGroup], g[2][kLanes][kGroup], squares[2][kLanes], inner[2][kLanes];
    float dgate[kLanes];
    for (int phase = 0; phase < 2; ++phase) {
      for (int l = 0; l < kLanes; ++l) {
        const Lane lane(in, row, l);
        const int64_t count = lane.count(in.head_dim);
        if (phase == 0) {
          load_group<kAligned, T>(in.qkv, lane.q_at(in), count, x[0][l]);
          load_group<kAligned, T>(in.qkv, lane.k_at(in), count, x[1][l]);
          load_group<kAligned, T>(p.dq, lane.row * in.head_dim + lane.col, count, g[0][l]);
          load_key_grad<T, kAligned>(p, lane, g[1][l]);
          dgate[l] = move_value_grad<T, kAligned>(p, lane);
          const Angles angles = load_angles<T, kAligned>(in, lane);
          for (int i = 0; i < 2; ++i) {
            turn<true>(g[i][l], angles);
            squares[i][l] = dot(x[i][l], x[i][l]);
            inner[i][l] = dot(g[i][l], x[i][l]);
          }
          continue;
        }
        for (int i = 0; i < 2; ++i) {
          norm_bwd(in, x[i][l], g[i][l], sum_of(squares[i]), sum_of(inner[i]));
        }
        store_group<kAligned, T>(p.dqkv, lane.q_at(in), count, g[0][l]);
        store_group<kAligned, T>(p.dqkv, lane.k_at(in), count, g[1][l]);
      }
    }
    if (in.gate != nullptr && row < in.tokens * in.heads) {
      static_cast<T*>(p.dgate)[row] = from_float<T>(sum_of(dgate));
    }
  }
}

// What the results must be: forward, and the derivative of <q, dq> + <k, dk> + <v, dv>.
template <typename T>
int64_t count_wrong(const Shape& s, const QkNormRopeInputs& in, const Tensors<T>& t) {
  const int64_t K = s.head_dim, E = s.value_dim, H = s.heads, N = H * (2 * K + E);
  const double tolerance = sizeof(T) == 4 ? 0x1p-18 : 0x1p-8;
  const auto at = [&](const std::vector<T>& x, int64_t i) {
    return static_cast<double>(to_float(x[t.pad + i]));
  };
  int64_t wrong = 0;
  const auto expect = [&](const std::vector<T>& x, int64_t i, double value) {
    wrong += !is_close(at(x, i), value, tolerance, tolerance);
  };
  const auto keeps = [&](int64_t token) {
    return token % s.part_tokens == 0 || (s.has_first && t.first[token]);
  };
  for (int64_t row = 0; row < in.tokens * H; ++row) {
    const int64_t token = row / H, h = row % H, place = token % s.part_tokens;
    for (int which = 0; which < 2; ++which) {  // q, k
      const int64_t start = token * N + (which * H + h) * K;
      const auto& out = which ? t.k : t.q;
      const auto& grad = which ? t.dk : t.dq;
      double squares = 0, inner = 0;
      for (int64_t i = 0; i < K; ++i) squares += at(t.qkv, start + i) * at(t.qkv, start + i);
      const double root = std::sqrt(squares / K + 0x1p-23);
      std::vector<double> y(K), g(K);
      for (int64_t i = 0; i < K; ++i) {
        y[i] = at(t.qkv, start + i) / root;
        g[i] = at(grad, row * K + i);
      }
      const bool moves = which && s.offset_keys;
      const bool gives = place + 1 < s.part_tokens && !keeps(token + 1);
      for (int64_t i = 0; i < K / 2 && !moves; ++i) expect(out, row * K + K / 2 + i, y[K / 2 + i]);
      for (int64_t i = K / 2; i < K && moves; ++i) {
        if (keeps(token)) expect(out, row * K + i, y[i]);
        if (gives) expect(out, (row + H) * K + i, y[i]);
        g[i] = (keeps(token) ? g[i] : 0) + (gives ? at(grad, (row + H) * K + i) : 0);
      }
      for (int64_t i = 0; i < K / 4; ++i) {
        const int64_t angle = (place * in.table_heads + (s.own_tables ? h : 0)) * (K / 4) + i;
        const double c = at(t.cos, angle), sine = at(t.sin, angle), a = y[2 * i], b = y[2 * i + 1];
        expect(out, row * K + 2 * i, a * c + b * sine);
        expect(out, row * K + 2 * i + 1, b * c - a * sine);
        const double da = g[2 * i], db = g[2 * i + 1];
        g[2 * i] = da * c - db * sine;
        g[2 * i + 1] = da * sine + db * c;
      }
      for (int64_t i = 0; i < K; ++i) inner += g[i] * y[i] / K;
      for (int64_t i = 0; i < K; ++i) expect(t.dqkv, start + i, (g[i] - y[i] * inner) / root);
    }
    double dgate = 0;
    for (int64_t i = 0; i < E; ++i) {
      const int64_t own = row * E + i, source = token * N + 2 * H * K + h * E + i;
      const double gate = s.has_gate ? at(t.gate, row) : 1, ve = at(t.ve, own), g = at(t.dv, own);
      expect(t.v, own, at(t.qkv, source) + (s.has_ve ? gate * ve : 0));
      expect(t.dqkv, source, g);
      if (s.has_gate) expect(t.dve, own, gate * g);
      dgate += g * ve;
    }
    if (s.has_gate) expect(t.dgate, row, dgate);
  }
  return wrong;
}

template <typename T>
void run(const Shape& s, DType dtype, bool gpu) {
  Tensors<T> t(s);
  std::vector<std::vector<T>*> all{&t.qkv, &t.cos, &t.sin, &t.ve, &t.gate, &t.dq,  &t.dk,
                                   &t.dv,  &t.q,   &t.k,   &t.v,  &t.dqkv, &t.dve, &t.dgate};
  std::vector<std::unique_ptr<Device<T>>> copies;
  std::vector<T*> data;
  for (auto* x : all) {
    if (gpu) copies.push_back(std::make_unique<Device<T>>(*x));
    data.push_back((gpu ? copies.back()->get() : x->data()) + t.pad);
  }
  const std::unique_ptr<Device<uint8_t>> flags(gpu ? new Device<uint8_t>(t.first) : nullptr);
  QkNormRopeInputs in = inputs_of<T>(s, dtype);
  in.qkv = data[0], in.cos = data[1], in.sin = data[2];
  in.ve = s.has_ve ? data[3] : nullptr, in.gate = s.has_gate ? data[4] : nullptr;
  const uint8_t* first = gpu ? flags->get() : t.first.data();
  in.first = s.has_first ? reinterpret_cast<const bool*>(first) : nullptr;
  const QkNormRopeParams forward{in, data[8], data[9], data[10]};
  const QkNormRopeBwdParams backward{in, data[5], data[6], data[7], data[11], data[12], data[13]};
  if (gpu) {
    CUDA_CHECK(launch_qk_norm_rope(forward, nullptr));
    CUDA_CHECK(launch_qk_norm_rope_bwd(backward, nullptr));
    for (size_t i = 8; i < all.size(); ++i) *all[i] = copies[i]->read();
  } else if (is_all_aligned(forward) && is_all_aligned(backward)) {
    run_on_host<T, true>(forward);
    run_on_host<T, true>(backward);
  } else {
    run_on_host<T, false>(forward);
    run_on_host<T, false>(backward);
  }
  const char* what = gpu ? "on the GPU" : "on the host";
  report(what, in.tokens, s.heads, s.head_dim, count_wrong(s, in, t));
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

int main() { return speedrun::run_everywhere("qk_norm_rope", speedrun::run_all); }
