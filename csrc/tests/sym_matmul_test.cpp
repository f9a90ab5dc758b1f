// The triangle of squares and its schedule: for all n up to 4,096 in steps of 8 and several
// batches, each square of the triangle belongs to one index and is reached by one cluster.
#include <cstdio>
#include <vector>

#include "kernels/sym_matmul_tiles.h"
#include "tests/check.h"

namespace speedrun {
namespace {

constexpr int kSms = 132;  // H100 SXM and H200

// Every element on or below the diagonal lies in one square of the list, and no square is twice in
// it or above the diagonal.
void test_each_square_once() {
  for (int64_t n = 8; n <= 4096; n += 8) {
    const int64_t side = squares_per_side(n);
    CHECK((side - 1) * kSquare < n && n <= side * kSquare);
    std::vector<int> seen(side * side);
    for (int64_t i = 0; i < triangle_size(side); ++i) {
      const Square square = square_at(i);
      CHECK(0 <= square.col && square.col <= square.row && square.row < side);
      ++seen[square.row * side + square.col];
    }
    for (int64_t row = 0; row < side; ++row) {
      for (int64_t col = 0; col < side; ++col) CHECK(seen[row * side + col] == (col <= row));
    }
  }
}

// Far beyond float's 24 bits of index, where its root is a row too high or too low.
void test_long_triangles() {
  for (const int64_t side : {int64_t{100}, int64_t{5000}, int64_t{1} << 23}) {
    for (const int64_t index : {triangle_size(side) - 1, triangle_size(side)}) {
      const Square square = square_at(index);
      const bool next = index == triangle_size(side);
      CHECK(square.row == side - 1 + next && square.col == (next ? 0 : side - 1));
    }
  }
}

// As TriangularScheduler's clusters go through the work: each begins at its own number and goes on
// by their count, which takes all squares of all matrices once.
void test_persistent_clusters() {
  for (const int64_t batch : {1, 3, 6, 8, 64}) {
    for (int64_t n = 8; n <= 4096; n += 8) {
      const int64_t per_matrix = triangle_size(squares_per_side(n));
      const int blocks = choose_half_squares(n, batch, kSms) ? 2 : 1;
      const int64_t work = per_matrix * batch, most = kSms / blocks;
      const int64_t clusters = work < most ? work : most;
      std::vector<char> taken(work);
      for (int64_t first = 0; first < clusters; ++first) {
        for (int64_t at = first; at < work; at += clusters) CHECK(++taken[at] == 1);
      }
      for (const char count : taken) CHECK(count == 1);
    }
  }
}

// The record's banks, at one GPU's share of 8 and whole (KERNELS b.2).
void test_tile_choice() {
  // Alone, vo or mlp: 63 squares; as halves they fill 126 SMs.
  CHECK(triangle_size(squares_per_side(768)) * 3 == 63);
  CHECK(choose_half_squares(768, 3, kSms));
  // Together: 126 squares.
  CHECK(!choose_half_squares(768, 6, kSms));
  // qk: 24 squares, or 192: two waves of squares, the second half empty, or three of halves.
  CHECK(choose_half_squares(256, 8, kSms));
  CHECK(choose_half_squares(256, 64, kSms));
  // Many tiles: whole squares read less.
  CHECK(!choose_half_squares(768, 24, kSms));
  CHECK(!choose_half_squares(4096, 8, kSms));
  CHECK(choose_half_squares(8, 1, kSms));
}

}  // namespace
}  // namespace speedrun

int main() {
  speedrun::test_each_square_once();
  speedrun::test_long_triangles();
  speedrun::test_persistent_clusters();
  speedrun::test_tile_choice();
  std::puts("sym_matmul: every square of the triangle once");
}
