// The triangle of tiles that sym_matmul computes, and the size of what a thread block takes of it.
// Pure functions of sizes, without CUDA: csrc/tests/sym_matmul_test.cpp runs them.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/int_math.h"

namespace speedrun {

// Outputs are cut into squares of kSquare; clusters of thread blocks compute one each.
constexpr int kSquare = 128;

constexpr int64_t squares_per_side(int64_t n) { return ceil_div(n, kSquare); }

// Squares on the diagonal and below it.
constexpr int64_t triangle_size(int64_t side) { return side * (side + 1) / 2; }

struct Square {
  int32_t row, col;  // col <= row
};

// Square number `index` of a triangle, row by row: of its row's first `col` ones and the
// triangle_size(row) above them. The root may be off by its rounding, hence the steps.
HOST_DEVICE inline Square square_at(int64_t index) {
  auto row = static_cast<int64_t>((sqrtf(8.f * static_cast<float>(index) + 1.f) - 1.f) * 0.5f);
  while (row * (row + 1) / 2 > index) --row;
  while ((row + 1) * (row + 2) / 2 <= index) ++row;
  return {static_cast<int32_t>(row), static_cast<int32_t>(index - row * (row + 1) / 2)};
}

// ---- Tile choice -----------------------------------------------------------------------------
// Not yet measured: the reasons are arithmetic, for H100 and H200 (132 SMs).

// Whether a square is cut into two thread blocks of 64 x 128, a cluster, instead of one of
// 128 x 128. Half a square takes about 0.55 of a whole one's time: it loads its part of A and, by
// multicast, half of B for half of the products. Worth it where the last wave of whole squares
// would leave SMs idle: 63 squares of three (768, k) fill 48 % of them, their halves 95 %; 126
// squares of six fill 95 % as they are.
constexpr bool choose_half_squares(int64_t n, int64_t batch, int num_sms) {
  const int64_t squares = triangle_size(squares_per_side(n)) * batch;
  return 55 * ceil_div(2 * squares, num_sms) < 100 * ceil_div(squares, num_sms);
}

}  // namespace speedrun
