// What a block of softcap_ce does in each of its phases; the smoke test runs them on the host.
#pragma once

#include <cmath>

#include "common/vec.cuh"
#include "kernels/fp8_quantize.cuh"
#include "kernels/softcap_ce.h"

namespace speedrun::cross_entropy {

using bf16 = __nv_bfloat16;

// Tile choice. Not yet measured on a GPU: the reasons are arithmetic, for H100.
constexpr int kThreads = 512;  // two blocks of a row each, or one of a cluster: 32 or 16 warps
constexpr int kLoads = 4;      // of 16 bytes a thread at once: 32 KB in flight an SM, or more

HOST_DEVICE inline float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  return __fdividef(1.0f, x);
#else
  return 1.0f / x;
#endif
}

struct Softcap {
  float a, b, c;
  float slope, offset;  // e^-u = 2^(slope * z + offset)
  float exponent;       // a / ln 2

  explicit Softcap(const SoftcapCeParams& p) : a(p.a), b(p.b), c(p.c) {
    const double log2e = 1.4426950408889634;
    slope = static_cast<float>(-log2e / p.c);
    offset = static_cast<float>(-log2e * p.b / p.c);
    exponent = static_cast<float>(log2e * p.a);
  }

  template <bool kRounded>
  HOST_DEVICE float sigmoid(float z) const {
    const float s = reciprocal(1.0f + exp2f(fmaf(z, slope, offset)));
    return kRounded ? fp8_cast::round_to_bf16(s) : s;
  }
  // The same by IEEE operations, for targets.
  template <bool kRounded>
  HOST_DEVICE float exact_sigmoid(float z) const {
    const float s = divide(1.0f, add(1.0f, expf(-divide(add(z, b), c))));
    return kRounded ? fp8_cast::round_to_bf16(s) : s;
  }
  // e^(logit - a/2): the middle of the logits' range keeps exponents, and so their errors, small.
  HOST_DEVICE float power(float sigmoid) const {
    return exp2f(fmaf(sigmoid, exponent, -0.5f * exponent));
  }
  HOST_DEVICE float lse(float sum) const { return 0.5f * a + logf(sum); }
};

// A block's columns of a matrix.
struct Strip {
  int64_t start;
  int cols;  // a multiple of 16; 0 if it starts behind the last one

  HOST_DEVICE Strip(int64_t start, int64_t width, int64_t cols)
      : start(start),
        cols(static_cast<int>(cols < start           ? 0
                              : width < cols - start ? width
                                                     : cols - start)) {}
};

// Factors g of 8 logits; adds the powers to `sum`.
template <bool kRounded>
HOST_DEVICE inline Vec<bf16> factors(const Softcap& softcap, const Vec<bf16>& z, float& sum) {
  Vec<bf16> g{};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float s = softcap.sigmoid<kRounded>(to_float(z.get(i))), e = softcap.power(s);
    sum += e;
    g.fill(i, from_float<bf16>(e * s * (1 - s)));
  }
  return g;
}

// Sum of powers of a thread's share of a row's strip: every kLanes-th vector from `lane` on. Stores
// the factors if `kept` isn't null.
template <bool kRounded, int kLanes>
HOST_DEVICE inline float sum_powers(const Softcap& softcap, const bf16* z, int cols, int lane,
                                    Vec<bf16>* kept) {
  float sum = 0;
  for (int first = lane; first < cols / 8; first += kLoads * kLanes) {
    Vec<bf16> vecs[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int vec = first + i * kLanes;
      if (vec < cols / 8) vecs[i] = load16<bf16>(z + vec * 8);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int vec = first + i * kLanes;
      if (vec >= cols / 8) break;
      const Vec<bf16> g = factors<kRounded>(softcap, vecs[i], sum);
      if (kept != nullptr) store16(kept + vec, g);
    }
  }
  return sum;
}

// Casts a thread's share of a row's strip, 16 columns at a time. The codes also take the place of
// the first half of their factors if kAgain.
template <bool kRounded, int kLanes, bool kKept, bool kAgain>
HOST_DEVICE inline void cast_factors(const Softcap& softcap, const bf16* z, int cols, int lane,
                                     float times, Vec<bf16>* kept, uint8_t* dz) {
  for (int i = lane; i < cols / 16; i += kLanes) {
    float values[16], sum = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Vec<bf16> g =
          kKept ? load16<bf16>(kept + 2 * i + half)
                : factors<kRounded>(softcap, load16<bf16>(z + 16 * i + 8 * half), sum);
#pragma unroll
      for (int j = 0; j < 8; ++j) values[8 * half + j] = to_float(g.get(j)) * times;
    }
    const Vec<uint8_t> codes = fp8_cast::to_fp8<false>(values);
    store16(row_start<true>(dz, i, 16), codes);
    if (kAgain) store16(kept + 2 * i, codes);
  }
}

// Transposes what cast_factors left of 16 rows, 4 columns at a time; `kept` has `pitch` vectors a
// row, `dz_t` starts at the strip's first column and these rows.
HOST_DEVICE inline void store_columns(const Vec<bf16>* kept, int pitch, int cols, uint8_t* dz_t,
                                      int64_t rows, int thread) {
  for (int word = thread; word < cols / 4; word += kThreads) {
    Vec<uint8_t> columns[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j)
        words[j] = kept[(4 * i + j) * pitch + word / 4 * 2].words[word % 4];
      transpose_words(words);
#pragma unroll
      for (int j = 0; j < 4; ++j) columns[j].words[i] = words[j];
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      store16(row_start<true>(dz_t, word * 4 + j, rows), columns[j]);
    }
  }
}

// A row's targets; number num_targets is the prefix target, if there are any.
struct Targets {
  const SoftcapCeParams& p;
  int64_t row;

  HOST_DEVICE int64_t count() const { return p.num_targets + (p.prefix_targets != nullptr); }
  HOST_DEVICE int64_t target(int64_t n) const {
    return n < p.num_targets ? p.targets[row * p.num_targets + n] : p.prefix_targets[row];
  }
  HOST_DEVICE float weight(int64_t n) const {
    return n < p.num_targets ? p.weights[n] : *p.prefix_weight;
  }
  // S; column: only those weights whose target it is.
  HOST_DEVICE float total() const {
    float total = 0, missing = 0;
    for (int64_t n = 0; n < count(); ++n) {
      if (target(n) >= 0) {
        total += weight(n);
      } else if (n < p.num_targets && p.count_missing && target(0) >= 0) {
        missing += weight(n);
      }
    }
    return total + missing;
  }
  HOST_DEVICE float of_column(int64_t column) const {
    float sum = 0;
    for (int64_t n = 0; n < count(); ++n) sum += target(n) == column ? weight(n) : 0;
    return sum;
  }
};

template <bool kRounded>
HOST_DEVICE inline float sigmoid_at(const Softcap& softcap, const SoftcapCeParams& p, int64_t row,
                                    int64_t col) {
  return softcap.exact_sigmoid<kRounded>(
      to_float(static_cast<const bf16*>(p.z)[row * p.cols + col]));
}

template <bool kRounded>
HOST_DEVICE inline void store_loss(const Softcap& softcap, const SoftcapCeParams& p, int64_t row,
                                   float sum) {
  const Targets targets{p, row};
  const float lse = softcap.lse(sum);
  float loss = 0;
  for (int64_t n = 0; n < targets.count(); ++n) {
    const int64_t target = targets.target(n);
    if (target < 0) continue;
    const float logit =
        target < p.cols ? softcap.a * sigmoid_at<kRounded>(softcap, p, row, target) : NAN;
    loss += targets.weight(n) * (lse - logit);
  }
  p.loss[row] = loss;
  p.lse[row] = lse;
}

// Gradient of target `n`'s column, if there is one and it lies in the strip: in the reference's
// order, over what cast_factors has stored. Targets that are equal store the same.
template <bool kRounded>
HOST_DEVICE inline void store_target(const Softcap& softcap, const SoftcapCeParams& p, int64_t row,
                                     int64_t n, const Strip& strip, float sum, bool both) {
  const Targets targets{p, row};
  const int64_t col = targets.target(n);
  if (col < strip.start || col >= strip.start + strip.cols) return;
  const float s = sigmoid_at<kRounded>(softcap, p, row, col);
  const float share = expf(softcap.a * s - softcap.lse(sum)) * targets.total();
  const float grad = (share - targets.of_column(col)) * s * (1 - s) * (softcap.a / softcap.c);
  const uint8_t code = __nv_cvt_float_to_fp8(divide(grad, *p.scale), __NV_SATFINITE, __NV_E5M2);
  p.dz[row * p.cols + col] = code;
  if (both) p.dz_t[col * p.rows + row] = code;
}

}  // namespace speedrun::cross_entropy
