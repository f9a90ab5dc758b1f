// Index arithmetic at its limits, and the swizzle's promise of no bank conflicts.
#include "common/int_math.h"

#include <cstdio>
#include <cstdlib>
#include <limits>
#include <set>

#include "tests/check.h"

namespace speedrun {
namespace {

void test_ceil_div() {
  constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
  static_assert(ceil_div(0, 64) == 0 && ceil_div(1, 64) == 1);
  static_assert(ceil_div(64, 64) == 1 && ceil_div(65, 64) == 2);
  static_assert(ceil_div(kMax, 1) == kMax);
  static_assert(ceil_div(kMax, 2) == (int64_t{1} << 62));  // adding 1 to kMax would overflow
  static_assert(ceil_div(kMax, kMax) == 1);
}

void test_swizzle(int row_vecs) {
  for (int row = 0; row < 32; ++row) {
    std::set<int> places;
    for (int vec = 0; vec < row_vecs; ++vec) {
      const int place = swizzle(row, vec);
      CHECK(0 <= place && place < row_vecs);  // stays in its row
      places.insert(place);
    }
    CHECK(static_cast<int>(places.size()) == row_vecs);  // and is a permutation of it
  }
  for (int first = 0; first < 32; first += 8) {  // 8 threads of 16 bytes are served together
    for (int other = 0; other < row_vecs; ++other) {
      std::set<int> down;
      for (int row = first; row < first + 8; ++row) down.insert(swizzle(row, other) % 8);
      CHECK(down.size() == 8);
    }
    for (int vec = 0; vec < row_vecs; vec += 8) {
      std::set<int> along;
      for (int i = vec; i < vec + 8; ++i) along.insert(swizzle(first, i) % 8);
      CHECK(along.size() == 8);
    }
  }
}

void test_tile_index() {
  int64_t tile = 0;
  for (int64_t batch = 0; batch < 3; ++batch) {
    for (int64_t row = 0; row < 5; ++row) {
      for (int64_t col = 0; col < 7; ++col) {
        const TileIndex at = tile_index(tile++, 5, 7);
        CHECK(at.batch == batch && at.row_tile == row && at.col_tile == col);
      }
    }
  }
  const TileIndex far = tile_index((int64_t{1} << 40) + 1, 1, int64_t{1} << 20);
  CHECK(far.batch == int64_t{1} << 20 && far.row_tile == 0 && far.col_tile == 1);
}

}  // namespace
}  // namespace speedrun

int main() {
  speedrun::test_ceil_div();
  for (int row_vecs : {8, 16, 32}) speedrun::test_swizzle(row_vecs);
  speedrun::test_tile_index();
  std::puts("int_math: ok");
}
