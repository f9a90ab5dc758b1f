// What the epilogue of head_logits computes for a logit; the smoke test runs it on the host.
#pragma once

#include <cmath>

#include "common/int_math.h"
#include "kernels/head_logits.h"

namespace speedrun::head {

// 2^x; the GPU's is off by 2^-22 at most, and takes subnormals for 0.
HOST_DEVICE inline float power_of_two(float x) {
#ifdef __CUDA_ARCH__
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
#else
  return std::exp2(x);
#endif
}

HOST_DEVICE inline float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float quotient;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(quotient) : "f"(x));
  return quotient;
#else
  return 1 / x;
#endif
}

// The smaller one; NaN if one is.
HOST_DEVICE inline float smaller(float x, float y) {
#ifdef __CUDA_ARCH__
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(y));
  return result;
#else
  return x < y || std::isnan(x) ? x : y;
#endif
}

// exp(-(z + b) / c) = 2^(slope · x·w + offset); e = 2^(exponent · (sigma - 1)). The powers that
// `factors` gives are e over the scale of g, so that g needs no further product.
struct Exponents {
  float slope, offset, exponent, shift;

  // Four products x·w become g over its scale; powers: e over it. Special functions are the scarce
  // unit, 16 a clock and multiprocessor: one reciprocal serves the four, 2.25 a logit instead of 3.
  HOST_DEVICE void factors(float slope, float* x, float (&powers)[4]) const {
    constexpr float kLargest = 30;  // where sigma is 2^-30: four denominators' product is finite
    float d[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      d[i] = 1 + power_of_two(smaller(fmaf(x[i], slope, offset), kLargest));
    }
    const float of_01 = d[0] * d[1], of_23 = d[2] * d[3], of_all = reciprocal(of_01 * of_23);
    const float by_01 = of_all * of_23, by_23 = of_all * of_01;
    const float sigmas[4] = {by_01 * d[1], by_01 * d[0], by_23 * d[3], by_23 * d[2]};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      powers[i] = power_of_two(fmaf(sigmas[i], exponent, shift));
      x[i] = powers[i] * fmaf(-sigmas[i], sigmas[i], sigmas[i]);
    }
  }
};

// The scale of g's e5m2: where g is largest, a · sigma² - (a - 2) · sigma - 1 = 0.
inline double factor_scale(double a) {
  const double sigma = (a - 2 + std::sqrt(a * a + 4)) / (2 * a);
  return std::exp(a * (sigma - 1)) * sigma * (1 - sigma) / 57344;
}

inline Exponents exponents_of(const Softcapped& softcap) {
  const double log2e = 1.4426950408889634, a = softcap.a, b = softcap.b, c = softcap.c;
  return {static_cast<float>(-log2e / c), static_cast<float>(-log2e * b / c),
          static_cast<float>(log2e * a),
          static_cast<float>(-log2e * a - std::log2(factor_scale(a)))};
}

inline bool is_valid(const Softcapped& softcap) {
  return softcap.a > 0 && softcap.a <= kMaxHeadSoftcap && softcap.c > 0;
}

}  // namespace speedrun::head
