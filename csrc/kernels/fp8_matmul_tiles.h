// The FP8 GEMMs that are compiled, which of them serves a call, and how its work is cut.
// Pure functions of types and sizes, without CUDA: csrc/tests/fp8_matmul_test.cpp runs them.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/int_math.h"

namespace speedrun {

// ---- 1. The table ----------------------------------------------------------------------------

// What happens to the sums: stored; added to what is there; the forward pass of relu², without and
// with the transposed copy of its result; its backward pass.
enum class Fp8Epilogue { kStore, kAdd, kRelu2, kRelu2Transposed, kDrelu2 };

// Tiles of tile_m x tile_n outputs and 128 of K. Two thread blocks one below the other (cluster_m
// = 2) share what they load of B. Slow sums: every 128 of K the tensor cores' sums, of about 14
// bits, are added to others in fp32, which costs a second set of registers: 96 a thread at most.
struct Fp8Kernel {
  Fp8Epilogue epilogue;
  DType a, b, out;  // kDrelu2: e5m2 out goes with an e4m3 `post`, bf16 with a bf16 one
  bool fast_accum;
  int tile_m, tile_n, cluster_m;
  bool pingpong;  // two warpgroups with a tile each, instead of two on one tile
};

enum Fp8KernelId {
  kStoreFast,
  kStoreFastSmall,
  kStoreSlow,
  kStoreE5m2Fast,
  kStoreE5m2Slow,
  kStoreFp8,
  kAddToE5m2,
  kAddE5m2,
  kRelu2,
  kRelu2Transposed,
  kDrelu2,
  kDrelu2Fp8,
  kNumFp8Kernels,
};

namespace fp8_kernels {
using enum DType;
using enum Fp8Epilogue;

// Every FP8 GEMM in the library, in the order of the names above. All are persistent and
// warp-specialised. Tiles: the largest that leave no register spilled, since the tensor cores wait
// for shared memory and L2 with smaller ones.
inline constexpr Fp8Kernel kTable[] = {
    // 128 sums a thread.
    {kStore, kFloat8E4M3, kFloat8E4M3, kBFloat16, true, 128, 256, 2, false},
    // For products with few tiles: a quarter of the size, so four times as many SMs.
    {kStore, kFloat8E4M3, kFloat8E4M3, kBFloat16, true, 64, 128, 1, true},
    // 96 sums a thread, twice. 192 divides 768, 2304, 3072 and 50304.
    {kStore, kFloat8E4M3, kFloat8E4M3, kBFloat16, false, 128, 192, 2, false},
    // Gradients of activations: e5m2 times e4m3.
    {kStore, kFloat8E5M2, kFloat8E4M3, kBFloat16, true, 128, 256, 2, false},
    {kStore, kFloat8E5M2, kFloat8E4M3, kBFloat16, false, 128, 192, 2, false},
    {kStore, kFloat8E4M3, kFloat8E4M3, kFloat8E4M3, false, 128, 192, 2, false},
    // Gradients of weights: K is the number of tokens, far too many for 14 bits.
    {kAdd, kFloat8E4M3, kFloat8E5M2, kFloat32, false, 128, 192, 2, false},
    {kAdd, kFloat8E5M2, kFloat8E4M3, kFloat32, false, 128, 192, 2, false},
    // K is 768: fast sums lose less than the operands' own rounding.
    {kRelu2, kFloat8E4M3, kFloat8E4M3, kFloat8E4M3, true, 128, 256, 2, false},
    {kRelu2Transposed, kFloat8E4M3, kFloat8E4M3, kFloat8E4M3, true, 128, 256, 2, false},
    // Serve calls that allow fast sums as well as those that do not.
    {kDrelu2, kFloat8E5M2, kFloat8E4M3, kBFloat16, false, 128, 192, 2, false},
    {kDrelu2, kFloat8E5M2, kFloat8E4M3, kFloat8E5M2, false, 128, 192, 2, false},
};
static_assert(sizeof(kTable) / sizeof(kTable[0]) == kNumFp8Kernels);

}  // namespace fp8_kernels

constexpr const Fp8Kernel& fp8_kernel(int id) { return fp8_kernels::kTable[id]; }

// ---- 2. Tile choice --------------------------------------------------------------------------
// Not yet measured: the reasons are arithmetic, for H100 and H200 (132 SMs).

// Tiles of the whole product, with those that fill up clusters.
constexpr int64_t num_tiles(const Fp8Kernel& kernel, int64_t m, int64_t n, int64_t batch) {
  return ceil_div(ceil_div(m, kernel.tile_m), kernel.cluster_m) * kernel.cluster_m *
         ceil_div(n, kernel.tile_n) * batch;
}

// Clocks of one SM for 128 of K of one tile.
constexpr int64_t tile_clocks(const Fp8Kernel& kernel) {
  const int64_t outputs = int64_t{kernel.tile_m} * kernel.tile_n;
  const int64_t mma = outputs * 128 / 4096;  // the tensor cores' rate, multiplied a clock
  const int64_t loads = kernel.tile_m * 128 + kernel.tile_n * 128 / kernel.cluster_m;
  const int64_t load = loads / 40;  // L2's rate a clock and SM, if all SMs load
  const int64_t add = kernel.fast_accum ? 0 : outputs / 128 / 2;  // half behind other sums' mma
  return (mma > load ? mma : load) + add;
}

// Which kernel serves a product; -1: none. A slow one also serves calls that allow fast sums.
constexpr int choose_fp8_kernel(Fp8Epilogue epilogue, DType a, DType b, DType out, bool fast_accum,
                                int64_t m, int64_t n, int64_t batch, int num_sms) {
  int best = -1;
  int64_t best_clocks = 0;
  for (int id = 0; id < kNumFp8Kernels; ++id) {
    const Fp8Kernel& kernel = fp8_kernel(id);
    if (kernel.epilogue != epilogue || kernel.a != a || kernel.b != b || kernel.out != out)
      continue;
    if (kernel.fast_accum && !fast_accum) continue;
    const int64_t waves = ceil_div(num_tiles(kernel, m, n, batch), num_sms);
    const int64_t clocks = waves * tile_clocks(kernel);  // K is the same for all
    if (best < 0 || clocks < best_clocks) {
      best = id;
      best_clocks = clocks;
    }
  }
  return best;
}

// Into how many equal parts K is cut (kAdd only), each added to the output on its own: weight
// gradients have few tiles (96 for 3072 x 768) and a long K.
constexpr int choose_fp8_splits(const Fp8Kernel& kernel, int64_t m, int64_t n, int64_t k,
                                int num_sms) {
  constexpr int kMaxSplits = 16;        // each writes all of the output
  constexpr int64_t kAddClocks = 4096;  // to add a tile of 96 KB, at 24 bytes a clock and SM
  int best = 1;
  int64_t best_clocks = 0;
  for (int splits = 1; splits <= kMaxSplits; ++splits) {
    if (splits > 1 && k % (int64_t{128} * splits) != 0) continue;  // whole steps of K only
    const int64_t waves = ceil_div(num_tiles(kernel, m, n, splits), num_sms);
    const int64_t clocks = waves * (ceil_div(k / splits, 128) * tile_clocks(kernel) + kAddClocks);
    if (best_clocks == 0 || clocks < best_clocks) {
      best = splits;
      best_clocks = clocks;
    }
  }
  return best;
}

// How many clusters high the strip is in which tiles are taken one after the other. 1: a row of
// tiles after the other, so that B stays in L2; 8 where neither side of the output is short, as in
// the head, whose B (39 MB) would be read anew from HBM for each row of tiles.
constexpr int choose_strip(int64_t m, int64_t n) { return m >= 8192 && n >= 8192 ? 8 : 1; }

}  // namespace speedrun
