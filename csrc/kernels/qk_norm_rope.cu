#include <cmath>

#include "common/reduce.cuh"
#include "kernels/head_rows.cuh"
#include "kernels/qk_norm_rope.h"

namespace speedrun {
namespace {

// ---- 1. Tile choice --------------------------------------------------------------------------

using namespace head_rows;  // of both stems: half a warp a row

// ---- 2. Device helpers -----------------------------------------------------------------------

// A lane's part of a row, one head of one token. Sizes in 32 bits: divisions of 64 cost more.
struct Lane {
  int64_t row, token, qkv;  // qkv: start of the token's projection
  int head, place, col;     // place of the token in its part; col: the lane's first column
  bool valid;

  HOST_DEVICE Lane(const QkNormRopeInputs& in, int64_t row_, int lane)
      : row(row_), col(lane * kGroup), valid(row_ < in.tokens * in.heads) {
    const auto heads = static_cast<uint32_t>(in.heads);
    const uint32_t index = valid ? static_cast<uint32_t>(row_) : 0;
    token = index / heads;
    head = static_cast<int>(index % heads);
    place = static_cast<int>(token % static_cast<uint32_t>(in.part_tokens));
    qkv = token * in.heads * (2 * in.head_dim + in.value_dim);
  }

  // How many of a row's `width` numbers begin at this lane's column.
  HOST_DEVICE int64_t count(int64_t width) const { return valid ? width - col : 0; }

  // Where q, k and v of this row begin in qkv.
  HOST_DEVICE int64_t q_at(const QkNormRopeInputs& in) const {
    return qkv + head * in.head_dim + col;
  }
  HOST_DEVICE int64_t k_at(const QkNormRopeInputs& in) const {
    return q_at(in) + in.heads * in.head_dim;
  }
  HOST_DEVICE int64_t v_at(const QkNormRopeInputs& in) const {
    return qkv + 2 * in.heads * in.head_dim + head * in.value_dim + col;
  }

  // Whether the key of the token `ahead` tokens on, of the same part, keeps its stationary half.
  HOST_DEVICE bool keeps(const QkNormRopeInputs& in, int ahead) const {
    return place + ahead == 0 || (in.first != nullptr && in.first[token + ahead]);
  }
  // Whether this token's stationary half goes to the token behind.
  HOST_DEVICE bool gives(const QkNormRopeInputs& in) const {
    return valid && place + 1 < in.part_tokens && !keeps(in, 1);
  }
};

// Cosines and sines of a lane's 4 pairs; of the stationary half 1 and 0.
struct Angles {
  float cos[kGroup / 2], sin[kGroup / 2];
};

// Four numbers, in one load where kAligned.
template <bool kAligned, typename T>
HOST_DEVICE inline void load_four(const void* tensor, int64_t at, float (&values)[4]) {
  const T* source = static_cast<const T*>(tensor) + at;
  if constexpr (!kAligned) {
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = to_float(source[i]);
  } else if constexpr (sizeof(T) == 4) {
    const Vec<T> vec = load16<T>(source);
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = vec.get(i);
  } else {
    const uint2 bits = *reinterpret_cast<const uint2*>(source);
    const Vec<T> vec{{bits.x, bits.y, 0, 0}};
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = to_float(vec.get(i));
  }
}

template <typename T, bool kAligned>
HOST_DEVICE inline Angles load_angles(const QkNormRopeInputs& in, const Lane& lane) {
  Angles angles{{1, 1, 1, 1}, {}};
  if (!lane.valid || lane.col >= in.head_dim / 2) return angles;
  const int64_t own = in.table_heads == 1 ? 0 : lane.head;
  const int64_t at = (lane.place * in.table_heads + own) * (in.head_dim / 4) + lane.col / 2;
  load_four<kAligned, T>(in.cos, at, angles.cos);
  load_four<kAligned, T>(in.sin, at, angles.sin);
  return angles;
}

// Pairs (a, b) become (a cos + b sin, b cos - a sin); with kBack the other way round.
template <bool kBack>
HOST_DEVICE inline void turn(float (&x)[kGroup], const Angles& angles) {
#pragma unroll
  for (int i = 0; i < kGroup / 2; ++i) {
    const float a = x[2 * i], b = x[2 * i + 1], c = angles.cos[i];
    const float s = kBack ? -angles.sin[i] : angles.sin[i];
    x[2 * i] = a * c + b * s;
    x[2 * i + 1] = b * c - a * s;
  }
}

// What a row of `squares` is multiplied by to be normed.
HOST_DEVICE inline float inverse_root(const QkNormRopeInputs& in, float squares) {
  return 1 / sqrtf(squares / static_cast<float>(in.head_dim) + in.eps);
}

HOST_DEVICE inline void norm_turn(const QkNormRopeInputs& in, float (&x)[kGroup], float squares,
                                  const Angles& angles) {
  scale_by(x, inverse_root(in, squares));
  turn<false>(x, angles);
}

// Gradient of x from g, that of the turned, which is turned back already; `inner`: the row's <g,
// x>.
HOST_DEVICE inline void norm_bwd(const QkNormRopeInputs& in, const float (&x)[kGroup],
                                 float (&g)[kGroup], float squares, float inner) {
  const float inverse = inverse_root(in, squares);
  const float share = inverse * inverse * (inner / static_cast<float>(in.head_dim));
#pragma unroll
  for (int i = 0; i < kGroup; ++i) g[i] = (g[i] - x[i] * share) * inverse;
}

// A key, whose stationary half may belong to the token behind.
template <typename T, bool kAligned>
HOST_DEVICE inline void store_key(const QkNormRopeParams& p, const Lane& lane,
                                  const float (&k)[kGroup]) {
  const QkNormRopeInputs& in = p.in;
  const int64_t at = lane.row * in.head_dim + lane.col, count = lane.count(in.head_dim);
  const bool moves = in.offset_keys && lane.col >= in.head_dim / 2;
  if (!moves || (lane.valid && lane.keeps(in, 0))) store_group<kAligned, T>(p.k, at, count, k);
  if (moves && lane.gives(in)) {
    store_group<kAligned, T>(p.k, at + in.heads * in.head_dim, count, k);
  }
}

// Its gradient: the sum of those of all keys that it was stored as.
template <typename T, bool kAligned>
HOST_DEVICE inline void load_key_grad(const QkNormRopeBwdParams& p, const Lane& lane,
                                      float (&g)[kGroup]) {
  const QkNormRopeInputs& in = p.in;
  const int64_t at = lane.row * in.head_dim + lane.col, count = lane.count(in.head_dim);
  const bool moves = in.offset_keys && lane.col >= in.head_dim / 2;
  const bool own = !moves || (lane.valid && lane.keeps(in, 0));
  load_group<kAligned, T>(p.dk, at, own ? count : 0, g);
  if (moves && lane.gives(in)) {
    float behind[kGroup];
    load_group<kAligned, T>(p.dk, at + in.heads * in.head_dim, count, behind);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) g[i] += behind[i];
  }
}

template <typename T>
HOST_DEVICE inline float gate_of(const QkNormRopeInputs& in, const Lane& lane) {
  if (in.gate == nullptr || !lane.valid) return 1;
  return to_float(static_cast<const T*>(in.gate)[lane.row]);
}

template <typename T, bool kAligned>
HOST_DEVICE inline void move_value(const QkNormRopeParams& p, const Lane& lane) {
  const QkNormRopeInputs& in = p.in;
  const int64_t at = lane.row * in.value_dim + lane.col, count = lane.count(in.value_dim);
  float v[kGroup];
  load_group<kAligned, T>(in.qkv, lane.v_at(in), count, v);
  if (in.ve != nullptr) {
    float ve[kGroup];
    load_group<kAligned, T>(in.ve, at, count, ve);
    const float gate = gate_of<T>(in, lane);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) v[i] += gate * ve[i];
  }
  store_group<kAligned, T>(p.v, at, count, v);
}

// Stores the gradients of v and, with a gate, of ve; returns the lane's share of the gate's.
template <typename T, bool kAligned>
HOST_DEVICE inline float move_value_grad(const QkNormRopeBwdParams& p, const Lane& lane) {
  const QkNormRopeInputs& in = p.in;
  const int64_t at = lane.row * in.value_dim + lane.col, count = lane.count(in.value_dim);
  float g[kGroup], ve[kGroup];
  load_group<kAligned, T>(p.dv, at, count, g);
  store_group<kAligned, T>(p.dqkv, lane.v_at(in), count, g);
  if (in.gate == nullptr) return 0;
  load_group<kAligned, T>(in.ve, at, count, ve);
  const float share = dot(g, ve);
  scale_by(g, gate_of<T>(in, lane));
  store_group<kAligned, T>(p.dve, at, count, g);
  return share;
}

// ---- 3. Kernels ------------------------------------------------------------------------------

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads) qk_norm_rope_kernel(QkNormRopeParams p) {
  const QkNormRopeInputs& in = p.in;
  const int64_t row = int64_t{blockIdx.x} * kRows + threadIdx.x / kLanes;
  const Lane lane(in, row, threadIdx.x % kLanes);
  const int64_t count = lane.count(in.head_dim);
  float q[kGroup], k[kGroup];
  load_group<kAligned, T>(in.qkv, lane.q_at(in), count, q);
  load_group<kAligned, T>(in.qkv, lane.k_at(in), count, k);
  const Angles angles = load_angles<T, kAligned>(in, lane);
  move_value<T, kAligned>(p, lane);
  norm_turn(in, q, group_sum<kLanes>(dot(q, q)), angles);
  norm_turn(in, k, group_sum<kLanes>(dot(k, k)), angles);
  store_group<kAligned, T>(p.q, lane.row * in.head_dim + lane.col, count, q);
  store_key<T, kAligned>(p, lane, k);
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads) qk_norm_rope_bwd_kernel(QkNormRopeBwdParams p) {
  const QkNormRopeInputs& in = p.in;
  const int64_t row = int64_t{blockIdx.x} * kRows + threadIdx.x / kLanes;
  const Lane lane(in, row, threadIdx.x % kLanes);
  const int64_t count = lane.count(in.head_dim);
  float q[kGroup], k[kGroup], dq[kGroup], dk[kGroup];
  load_group<kAligned, T>(in.qkv, lane.q_at(in), count, q);
  load_group<kAligned, T>(in.qkv, lane.k_at(in), count, k);
  load_group<kAligned, T>(p.dq, lane.row * in.head_dim + lane.col, count, dq);
  load_key_grad<T, kAligned>(p, lane, dk);
  const Angles angles = load_angles<T, kAligned>(in, lane);
  const float dgate = group_sum<kLanes>(move_value_grad<T, kAligned>(p, lane));
  if (in.gate != nullptr && lane.valid && lane.col == 0) {
    static_cast<T*>(p.dgate)[lane.row] = from_float<T>(dgate);
  }
  turn<true>(dq, angles);
  turn<true>(dk, angles);
  norm_bwd(in, q, dq, group_sum<kLanes>(dot(q, q)), group_sum<kLanes>(dot(dq, q)));
  norm_bwd(in, k, dk, group_sum<kLanes>(dot(k, k)), group_sum<kLanes>(dot(dk, k)));
  store_group<kAligned, T>(p.dqkv, lane.q_at(in), count, dq);
  store_group<kAligned, T>(p.dqkv, lane.k_at(in), count, dk);
}

// ---- 4. Launchers ----------------------------------------------------------------------------

bool is_valid(const QkNormRopeInputs& in) {
  return is_width(in.head_dim, 16) && is_width(in.value_dim, kGroup) && in.part_tokens > 0 &&
         (in.table_heads == 1 || in.table_heads == in.heads);
}

bool is_all_aligned(const QkNormRopeParams& p) {
  return all_aligned(p.in.qkv, p.in.cos, p.in.sin, p.in.ve, p.q, p.k, p.v);
}

bool is_all_aligned(const QkNormRopeBwdParams& p) {
  return all_aligned(p.in.qkv, p.in.cos, p.in.sin, p.in.ve, p.dq, p.dk, p.dv, p.dqkv, p.dve);
}

}  // namespace

cudaError_t launch_qk_norm_rope(const QkNormRopeParams& p, cudaStream_t stream) {
  const auto start = [&]<typename T, bool kAligned>(unsigned blocks) {
    qk_norm_rope_kernel<T, kAligned><<<blocks, kThreads, 0, stream>>>(p);
  };
  return launch_rows(p.in, is_valid(p.in), is_all_aligned(p), start);
}

cudaError_t launch_qk_norm_rope_bwd(const QkNormRopeBwdParams& p, cudaStream_t stream) {
  const auto start = [&]<typename T, bool kAligned>(unsigned blocks) {
    qk_norm_rope_bwd_kernel<T, kAligned><<<blocks, kThreads, 0, stream>>>(p);
  };
  return launch_rows(p.in, is_valid(p.in), is_all_aligned(p), start);
}

}  // namespace speedrun
