#include <cuda_fp8.h>

#include <cmath>

#include "common/ieee.cuh"
#include "common/reduce.cuh"
#include "kernels/attention_epilogue.h"
#include "kernels/head_rows.cuh"

namespace speedrun {
namespace {

// ---- 1. Tile choice --------------------------------------------------------------------------

using namespace head_rows;  // of both stems: half a warp a row

constexpr float kMinSquare = 1e-8f;

// ---- 2. Device helpers -----------------------------------------------------------------------

// A lane's part of a row, one head of one token.
struct Lane {
  int64_t row, at, count;  // at: its first number in y; count: how many are left in the row
  float alpha, gate;       // 1 where there is no gate
  bool valid, first;       // first of its row

  template <typename T>
  static HOST_DEVICE Lane of(const AttentionEpilogueInputs& in, int64_t row, int lane) {
    Lane found{row, row * in.dim + lane * kGroup, 0, 0, 1, row < in.tokens * in.heads, lane == 0};
    if (!found.valid) return found;
    found.count = in.dim - lane * kGroup;
    // 32 bits: divisions of 64 cost more.
    const auto index = static_cast<uint32_t>(row), heads = static_cast<uint32_t>(in.heads);
    const int64_t token = index / heads, head = index % heads;
    if (in.alpha != nullptr) {
      const int64_t place = token * in.alpha_token_stride + head * in.alpha_head_stride;
      found.alpha = to_float(static_cast<const T*>(in.alpha)[place]);
    }
    if (in.gate != nullptr) {
      const int64_t place = token * in.gate_token_stride + head * in.gate_head_stride;
      found.gate = to_float(static_cast<const T*>(in.gate)[place]);
    }
    return found;
  }
};

// x += factor * v.
HOST_DEVICE inline void add(float (&x)[kGroup], float factor, const float (&v)[kGroup]) {
#pragma unroll
  for (int i = 0; i < kGroup; ++i) x[i] += factor * v[i];
}

// The numbers of a row that its sums give.
struct Shares {
  float tau, s, n;  // n = max(|v|^2, kMinSquare)
  bool counts;      // whether |v|^2 isn't below kMinSquare

  HOST_DEVICE Shares(const Lane& lane, float inner, float square)
      : tau(tanhf(lane.alpha)), n(fmaxf(square, kMinSquare)), counts(!(square < kMinSquare)) {
    s = inner / n;
  }
};

// Rounds out to T, stores it and its copy; returns the greatest |out| as fp32 bits, whose order as
// integers is that of the numbers, NaN above all.
template <typename T, bool kAligned>
HOST_DEVICE inline uint32_t store_both(const AttentionEpilogueParams& p, const Lane& lane,
                                       const float (&out)[kGroup]) {
  store_group<kAligned, T>(p.out, lane.at, lane.count, out);
  if (p.out_f8 == nullptr || lane.count <= 0) return 0;
  uint32_t greatest = 0;
  uint2 codes = make_uint2(0, 0);
#pragma unroll
  for (int i = 0; i < kGroup; i += 2) {  // two a conversion, the first in the low byte
    float pair[2];
    for (int j = 0; j < 2; ++j) {
      const float rounded = to_float(from_float<T>(out[i + j]));
      const uint32_t bits = std::bit_cast<uint32_t>(rounded) & 0x7fffffff;
      greatest = bits > greatest ? bits : greatest;
      pair[j] = divide(rounded, *p.scale);
    }
    const uint32_t both =
        __nv_cvt_float2_to_fp8x2(make_float2(pair[0], pair[1]), __NV_SATFINITE, __NV_E4M3);
    (i < 4 ? codes.x : codes.y) |= both << (i % 4 * 8);
  }
  if constexpr (kAligned) {
    *reinterpret_cast<uint2*>(p.out_f8 + lane.at) = codes;
  } else {
    for (int i = 0; i < kGroup; ++i) {
      p.out_f8[lane.at + i] = static_cast<uint8_t>((i < 4 ? codes.x : codes.y) >> (i % 4 * 8));
    }
  }
  return greatest;
}

// Stores what exclusive self-attention adds to the gradients: dv, and dalpha; g, which is G,
// becomes dy, and y becomes z. `along`: the row's <G, v>.
template <typename T, bool kAligned>
HOST_DEVICE inline void xsa_bwd(const AttentionEpilogueBwdParams& p, const Lane& lane,
                                const Shares& shares, float along, const float (&v)[kGroup],
                                float (&y)[kGroup], float (&g)[kGroup]) {
  const float b = shares.tau * along / shares.n, t = shares.tau * shares.s;
  float dv[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    const float rest = y[i] - (shares.counts ? 2 * shares.s * v[i] : 0);
    dv[i] = -t * g[i] - b * rest;
  }
  store_group<kAligned, T>(p.dv, lane.at, lane.count, dv);
  if (lane.valid && lane.first) {
    const float dalpha = (shares.tau * shares.tau - 1) * shares.s * along;
    static_cast<T*>(p.dalpha)[lane.row] = from_float<T>(dalpha);
  }
  add(g, -b, v);
  add(y, -t, v);
}

// ---- 3. Kernels ------------------------------------------------------------------------------

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads) attention_epilogue_kernel(AttentionEpilogueParams p) {
  const AttentionEpilogueInputs& in = p.in;
  const int64_t row = int64_t{blockIdx.x} * kRows + threadIdx.x / kLanes;
  const Lane lane = Lane::of<T>(in, row, threadIdx.x % kLanes);
  float y[kGroup], v[kGroup];
  load_group<kAligned, T>(in.y, lane.at, lane.count, y);
  if (in.alpha != nullptr) {
    load_group<kAligned, T>(in.v, lane.at, lane.count, v);
    const Shares shares(lane, group_sum<kLanes>(dot(y, v)), group_sum<kLanes>(dot(v, v)));
    add(y, -shares.tau * shares.s, v);
  }
  scale_by(y, lane.gate);
  const uint32_t own = store_both<T, kAligned>(p, lane, y);
  if (p.out_f8 == nullptr) return;
  const uint32_t greatest = block_max(own);
  // Most blocks find a greater one there already and leave it: atomics on one word queue up.
  auto* amax = reinterpret_cast<uint32_t*>(p.amax);
  if (threadIdx.x == 0 && greatest > __ldcg(amax)) atomicMax(amax, greatest);
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    attention_epilogue_bwd_kernel(AttentionEpilogueBwdParams p) {
  const AttentionEpilogueInputs& in = p.in;
  const int64_t row = int64_t{blockIdx.x} * kRows + threadIdx.x / kLanes;
  const Lane lane = Lane::of<T>(in, row, threadIdx.x % kLanes);
  float y[kGroup], v[kGroup], g[kGroup], grad[kGroup];
  load_group<kAligned, T>(p.grad, lane.at, lane.count, grad);
#pragma unroll
  for (int i = 0; i < kGroup; ++i) g[i] = lane.gate * grad[i];
  if (in.alpha != nullptr || in.gate != nullptr) {
    load_group<kAligned, T>(in.y, lane.at, lane.count, y);
  }
  if (in.alpha != nullptr) {
    load_group<kAligned, T>(in.v, lane.at, lane.count, v);
    const Shares shares(lane, group_sum<kLanes>(dot(y, v)), group_sum<kLanes>(dot(v, v)));
    xsa_bwd<T, kAligned>(p, lane, shares, group_sum<kLanes>(dot(g, v)), v, y, g);
  }
  store_group<kAligned, T>(p.dy, lane.at, lane.count, g);
  if (in.gate == nullptr) return;
  const float dgate = group_sum<kLanes>(dot(grad, y));
  if (lane.valid && lane.first) static_cast<T*>(p.dgate)[row] = from_float<T>(dgate);
}

// ---- 4. Launchers ----------------------------------------------------------------------------

bool is_valid(const AttentionEpilogueInputs& in) {
  return is_width(in.dim, kGroup) && (in.alpha == nullptr || in.v != nullptr);
}

bool is_all_aligned(const AttentionEpilogueParams& p) {
  return all_aligned(p.in.y, p.in.v, p.out, p.out_f8);
}

bool is_all_aligned(const AttentionEpilogueBwdParams& p) {
  return all_aligned(p.in.y, p.in.v, p.grad, p.dy, p.dv);
}

}  // namespace

cudaError_t launch_attention_epilogue(const AttentionEpilogueParams& p, cudaStream_t stream) {
  const auto start = [&]<typename T, bool kAligned>(unsigned blocks) {
    attention_epilogue_kernel<T, kAligned><<<blocks, kThreads, 0, stream>>>(p);
  };
  return launch_rows(p.in, is_valid(p.in), is_all_aligned(p), start);
}

cudaError_t launch_attention_epilogue_bwd(const AttentionEpilogueBwdParams& p,
                                          cudaStream_t stream) {
  const auto start = [&]<typename T, bool kAligned>(unsigned blocks) {
    attention_epilogue_bwd_kernel<T, kAligned><<<blocks, kThreads, 0, stream>>>(p);
  };
  return launch_rows(p.in, is_valid(p.in), is_all_aligned(p), start);
}

}  // namespace speedrun
