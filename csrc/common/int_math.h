// Index arithmetic for host and device.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

namespace speedrun {

// Smallest number of groups of `size` that hold `count`; count >= 0, size > 0. Doesn't overflow.
HOST_DEVICE constexpr int64_t ceil_div(int64_t count, int64_t size) {
  return count / size + (count % size != 0);
}

// Place of 16-byte vector `vec` in row `row` of a shared-memory tile whose rows hold a multiple of
// 8 vectors. Shared memory serves 8 threads of 16 bytes at a time, without conflict if their places
// differ modulo 8: so they do for one row and 8 neighbouring vectors, and for one vector and 8
// neighbouring rows.
HOST_DEVICE constexpr int swizzle(int row, int vec) { return vec ^ (row % 8); }

// Which tile of a batch of matrices a block works on.
struct TileIndex {
  int64_t batch, row_tile, col_tile;
};

// Tiles are counted along columns first, then rows, then batches.
HOST_DEVICE constexpr TileIndex tile_index(int64_t tile, int64_t row_tiles, int64_t col_tiles) {
  const int64_t tile_row = tile / col_tiles;
  return {tile_row / row_tiles, tile_row % row_tiles, tile % col_tiles};
}

}  // namespace speedrun
