// Tile choice of the FP8 GEMMs at the record's shapes (KERNELS 0.2), on 132 SMs, and at its edges.
#include <cstdio>
#include <utility>

#include "kernels/fp8_matmul_tiles.h"
#include "tests/check.h"

namespace speedrun {
namespace {

using enum DType;

constexpr int kSms = 132;  // H100 SXM and H200
constexpr int64_t kTokens[] = {16384, 32768, 49152};
constexpr int64_t kDim = 768, kHidden = 3072, kVocab = 50304;

int store(DType a, DType b, DType out, bool fast, int64_t m, int64_t n) {
  return choose_fp8_kernel(Fp8Epilogue::kStore, a, b, out, fast, m, n, 1, kSms);
}

// Share of the SMs that work, over the whole product.
double filled(int id, int64_t m, int64_t n, int64_t splits = 1) {
  const int64_t tiles = num_tiles(fp8_kernel(id), m, n, splits);
  return static_cast<double>(tiles) / (ceil_div(tiles, kSms) * kSms);
}

void test_table() {
  for (int id = 0; id < kNumFp8Kernels; ++id) {
    const Fp8Kernel& kernel = fp8_kernel(id);
    const int threads = kernel.pingpong ? 128 : 256;
    const int sums = kernel.tile_m * kernel.tile_n / threads;
    CHECK(sums <= (kernel.fast_accum ? 128 : 96));  // more is spilled
    CHECK(kernel.tile_m % (kernel.pingpong ? 64 : 128) == 0 && kernel.tile_n % 64 == 0);
    CHECK(kernel.cluster_m == 1 || kernel.cluster_m == 2);
    // K of weight gradients and of the head's dX is long: sums are promoted.
    CHECK(!(kernel.epilogue == Fp8Epilogue::kAdd && kernel.fast_accum));
    for (int other = 0; other < id; ++other) {  // no two rows for the same calls but by tile
      const Fp8Kernel& o = fp8_kernel(other);
      CHECK(!(o.epilogue == kernel.epilogue && o.a == kernel.a && o.b == kernel.b &&
              o.out == kernel.out && o.fast_accum == kernel.fast_accum &&
              o.tile_m == kernel.tile_m && o.tile_n == kernel.tile_n));
    }
  }
}

void test_record_shapes() {
  for (const int64_t tokens : kTokens) {
    // MLP down: 128 x 256 tiles, 384 to 1152 of them.
    CHECK(store(kFloat8E4M3, kFloat8E4M3, kBFloat16, true, tokens, kDim) == kStoreFast);
    CHECK(filled(kStoreFast, tokens, kDim) > 0.96);
    // Head, forward and backward.
    CHECK(store(kFloat8E4M3, kFloat8E4M3, kBFloat16, true, tokens, kVocab) == kStoreFast);
    CHECK(filled(kStoreFast, tokens, kVocab) > 0.99);
    CHECK(store(kFloat8E5M2, kFloat8E4M3, kBFloat16, false, tokens, kDim) == kStoreE5m2Slow);
    CHECK(filled(kStoreE5m2Slow, tokens, kDim) > 0.96);
    // MLP up with relu², with and without the transposed copy; its backward.
    for (const auto& [epilogue, id] :
         {std::pair{Fp8Epilogue::kRelu2, kRelu2},
          std::pair{Fp8Epilogue::kRelu2Transposed, kRelu2Transposed}}) {
      CHECK(choose_fp8_kernel(epilogue, kFloat8E4M3, kFloat8E4M3, kFloat8E4M3, true, tokens,
                              kHidden, 1, kSms) == id);
      CHECK(filled(id, tokens, kHidden) > 0.96);
    }
    for (const bool fast : {false, true}) {
      CHECK(choose_fp8_kernel(Fp8Epilogue::kDrelu2, kFloat8E5M2, kFloat8E4M3, kFloat8E5M2, fast,
                              tokens, kHidden, 1, kSms) == kDrelu2Fp8);
      CHECK(choose_fp8_kernel(Fp8Epilogue::kDrelu2, kFloat8E5M2, kFloat8E4M3, kBFloat16, fast,
                              tokens, kHidden, 1, kSms) == kDrelu2);
    }
    CHECK(filled(kDrelu2, tokens, kHidden) > 0.96);
  }
}

void test_weight_gradients() {
  for (const int64_t tokens : kTokens) {
    for (const int id : {kAddToE5m2, kAddE5m2}) {
      const Fp8Kernel& kernel = fp8_kernel(id);
      CHECK(choose_fp8_kernel(Fp8Epilogue::kAdd, kernel.a, kernel.b, kFloat32, false, kHidden, kDim,
                              1, kSms) == id);
      CHECK(num_tiles(kernel, kHidden, kDim, 1) == 96);  // of 132 SMs
      for (const auto& [m, n] : {std::pair{kHidden, kDim}, std::pair{kDim, kHidden}}) {
        const int splits = choose_fp8_splits(kernel, m, n, tokens, kSms);
        CHECK(splits == 4);
        CHECK(filled(id, m, n, splits) > 0.96);
      }
      // The head has enough tiles (1572 or 1576) for all SMs as it is.
      for (const auto& [m, n] : {std::pair{kDim, kVocab}, std::pair{kVocab, kDim}}) {
        CHECK(choose_fp8_kernel(Fp8Epilogue::kAdd, kernel.a, kernel.b, kFloat32, false, m, n, 1,
                                kSms) == id);
        CHECK(choose_fp8_splits(kernel, m, n, tokens, kSms) == 1);
        CHECK(filled(id, m, n) > 0.99);
      }
    }
  }
  const Fp8Kernel& kernel = fp8_kernel(kAddE5m2);
  CHECK(choose_fp8_splits(kernel, kDim, kDim, 16384, kSms) == 4);     // 24 tiles
  CHECK(choose_fp8_splits(kernel, kHidden, kDim, 16400, kSms) == 1);  // not in whole steps
  CHECK(choose_fp8_splits(kernel, 1, 1, 16, kSms) == 1);
}

void test_small() {
  CHECK(store(kFloat8E4M3, kFloat8E4M3, kBFloat16, true, 1024, 768) == kStoreFastSmall);
  CHECK(store(kFloat8E4M3, kFloat8E4M3, kBFloat16, true, 1, 1) == kStoreFastSmall);
  CHECK(store(kFloat8E4M3, kFloat8E4M3, kBFloat16, false, 1, 1) == kStoreSlow);
  CHECK(num_tiles(fp8_kernel(kStoreFast), 1, 1, 1) == 2);  // a cluster
  CHECK(num_tiles(fp8_kernel(kStoreFast), 257, 257, 3) == 4 * 2 * 3);
}

void test_what_none_serves() {
  CHECK(store(kFloat8E4M3, kFloat8E4M3, kFloat16, true, 128, 128) == -1);
  CHECK(store(kFloat8E5M2, kFloat8E5M2, kBFloat16, true, 128, 128) == -1);
  CHECK(store(kBFloat16, kBFloat16, kBFloat16, true, 128, 128) == -1);
  // Fast sums are never used unasked.
  CHECK(choose_fp8_kernel(Fp8Epilogue::kRelu2, kFloat8E4M3, kFloat8E4M3, kFloat8E4M3, false, 128,
                          128, 1, kSms) == -1);
}

void test_strips() {
  CHECK(choose_strip(49152, 50304) == 8);
  CHECK(choose_strip(49152, 3072) == 1 && choose_strip(768, 50304) == 1);
}

}  // namespace
}  // namespace speedrun

int main() {
  speedrun::test_table();
  speedrun::test_record_shapes();
  speedrun::test_weight_gradients();
  speedrun::test_small();
  speedrun::test_what_none_serves();
  speedrun::test_strips();
  std::puts("fp8_matmul: tile choice as expected");
}
