// Launches every Hopper kernel at the record's shapes and at edges, without a GPU, on the runtime
// of tests/fake_cuda.h, and looks whether the tensor maps are the matrices'.
#include <cstdint>
#include <cstdio>
#include <vector>

#include "kernels/fp8_matmul.h"
#include "kernels/head_logits.h"
#include "kernels/polar_chain.h"
#include "kernels/relu2_mlp.h"
#include "kernels/softcap_ce.h"
#include "kernels/sym_matmul.h"
#include "kernels/sym_matmul_tiles.h"
#include "tests/check.h"
#include "tests/fake_cuda.h"

namespace speedrun {
namespace {

constexpr DType kE4M3 = DType::kFloat8E4M3, kE5M2 = DType::kFloat8E5M2;
constexpr DType kBF16 = DType::kBFloat16, kFP32 = DType::kFloat32;

Fp8Operands operands(DType a, DType b, int64_t batch, int64_t m, int64_t n, int64_t k, bool fast) {
  return {at(kA), at(kB), number(kScale), number(kScale), batch, m, n, k, m * k, k, n * k, k, a,
          b,      fast};
}

void test_store(DType a, DType b, DType out, int64_t batch, int64_t m, int64_t n, int64_t k,
                bool fast, bool rows) {
  const bool fp8 = out == kE4M3;
  const uint64_t bytes = fp8 ? 1 : 2, um = m, un = n, uk = k;
  const Fp8MatmulParams params{operands(a, b, batch, m, n, k, fast),
                               rows ? number(kRowScale) : nullptr,
                               fp8 ? number(kScale) : nullptr,
                               at(kOut),
                               m * n,
                               n,
                               out,
                               false};
  CHECK(launch_fp8_matmul(params, nullptr) == cudaSuccess);
  Sizes size_a{uk, um}, size_b{uk, un}, size_out{un, um};
  if (batch > 1) {
    for (Sizes* sizes : {&size_a, &size_b, &size_out}) sizes->push_back(batch);
  }
  expect(at(kA), size_a, {uk, um * uk});
  expect(at(kB), size_b, {uk, un * uk});
  expect(at(kOut), size_out, {un * bytes, um * un * bytes});
  CHECK(maps.size() == 3);
  expect_launches(1);
}

// `parts`: how many of K are added on their own.
void test_add(DType a, DType b, int64_t m, int64_t n, int64_t k, bool add, uint64_t parts) {
  const Fp8MatmulParams params{
      operands(a, b, 1, m, n, k, false), nullptr, nullptr, at(kOut), m * n, n, kFP32, add};
  CHECK(launch_fp8_matmul(params, nullptr) == cudaSuccess);
  const uint64_t um = m, un = n, uk = k, part = uk / parts;
  Sizes size_a{part, um}, size_b{part, un};
  if (parts > 1) {
    size_a.push_back(parts);
    size_b.push_back(parts);
  }
  expect(at(kA), size_a, {uk, part});
  expect(at(kB), size_b, {uk, part});
  expect(at(kOut), {un, um}, {4 * un});  // no dimension of parts: all of them to one matrix
  CHECK(maps[at(kOut)].sizes.size() == 2 && maps.size() == 3);
  CHECK(zeroed == (add ? 0 : 1));
  expect_launches(1);
}

void test_relu2(int64_t m, int64_t n, int64_t k, bool keep, bool transposed) {
  const Fp8MatmulRelu2Params params{operands(kE4M3, kE4M3, 1, m, n, k, true),
                                    number(kScale),
                                    keep ? at(kPost) : nullptr,
                                    at(kOut),
                                    transposed ? at(kTransposed) : nullptr,
                                    number(kAmax)};
  CHECK(launch_fp8_matmul_relu2(params, nullptr) == cudaSuccess);
  const uint64_t um = m, un = n;
  expect(at(kOut), {un, um}, {un});
  if (keep) expect(at(kPost), {un, um}, {2 * un});
  if (transposed) expect(at(kTransposed), {um, un}, {um});
  CHECK(maps.size() == 3u + keep + transposed);
  expect_launches(1);
}

void test_drelu2(int64_t m, int64_t n, int64_t k, bool fp8, bool transposed) {
  const Fp8MatmulDrelu2Params params{operands(kE5M2, kE4M3, 1, m, n, k, false),
                                     at(kPost),
                                     fp8 ? number(kScale) : nullptr,
                                     fp8 ? number(kScale) : nullptr,
                                     at(kOut),
                                     transposed ? at(kTransposed) : nullptr,
                                     fp8 ? number(kAmax) : nullptr};
  CHECK(launch_fp8_matmul_drelu2(params, nullptr) == cudaSuccess);
  const uint64_t um = m, un = n, bytes = fp8 ? 1 : 2;
  expect(at(kOut), {un, um}, {un * bytes});
  expect(at(kPost), {un, um}, {un * bytes});
  if (transposed) expect(at(kTransposed), {um, un}, {um});
  CHECK(maps.size() == 4u + transposed);
  expect_launches(1);
}

void test_relu2_mlp(int64_t tokens, int64_t hidden, int64_t dim) {
  const uint64_t t = tokens, f = hidden, d = dim;
  CHECK(launch_relu2_up({at(kA), at(kB), at(kOut), tokens, dim, hidden, dim, dim, hidden},
                        nullptr) == cudaSuccess);
  expect(at(kA), {d, t}, {2 * d});
  expect(at(kB), {d, f}, {2 * d});
  expect(at(kOut), {f, t}, {2 * f});
  expect_launches(1);
  CHECK(launch_drelu2(
            {at(kA), at(kB), at(kPost), at(kOut), tokens, dim, hidden, dim, dim, hidden, hidden},
            nullptr) == cudaSuccess);
  expect(at(kPost), {f, t}, {2 * f});
  expect(at(kOut), {f, t}, {2 * f});
  CHECK(maps.size() == 4);
  expect_launches(1);
}

// A product of a matrix with itself, or (two) with another.
void test_sym_matmul(DType dtype, int64_t batch, int64_t n, int64_t k, bool transposed, bool two,
                     bool with_c) {
  const int64_t row = transposed ? n : k;
  const SymMatmulParams params{at(kA),
                               two ? at(kB) : at(kA),
                               with_c ? at(kC) : nullptr,
                               at(kOut),
                               batch,
                               n,
                               k,
                               n * k,
                               row,
                               n * k,
                               row,
                               n * n,
                               n,
                               n * n,
                               n,
                               dtype,
                               transposed,
                               1.f,
                               with_c ? 1.f : 0.f};
  CHECK(launch_sym_matmul(params, nullptr) == cudaSuccess);
  const uint64_t un = n, uk = k;
  Sizes size_a{transposed ? un : uk, transposed ? uk : un}, size_out{un, un};
  if (batch > 1) {
    for (Sizes* sizes : {&size_a, &size_out}) sizes->push_back(batch);
  }
  expect(at(kA), size_a, {2 * static_cast<uint64_t>(row), 2 * un * uk});
  if (two) expect(at(kB), size_a, {2 * uk, 2 * un * uk});
  if (with_c) expect(at(kC), size_out, {2 * un, 2 * un * un});
  expect(at(kOut), size_out, {2 * un, 2 * un * un});  // its mirror image has the same map
  CHECK(maps.size() == 2u + two + with_c);
  const uint64_t squares = triangle_size(squares_per_side(n)) * batch;
  const uint64_t work = squares * (choose_half_squares(n, batch, kSms) ? 2 : 1);
  CHECK(blocks == (work < kSms ? work : kSms));
  CHECK(mirrors == two);
  expect_launches(1);
}

void test_sym_matmuls() {
  for (const DType dtype : {kBF16, DType::kFloat16}) {
    for (const int64_t gpus : {1, 8}) {
      // The banks' products over their short side, and those of the short sides themselves.
      test_sym_matmul(dtype, 64 / gpus, 256, 768, false, false, false);
      test_sym_matmul(dtype, 24 / gpus, 768, 3072, true, false, false);
      test_sym_matmul(dtype, 64 / gpus, 256, 256, false, false, true);
      test_sym_matmul(dtype, 48 / gpus, 768, 768, false, true, true);
    }
    test_sym_matmul(dtype, 1, 8, 8, true, false, true);
    test_sym_matmul(dtype, 3, 136, 72, false, true, false);
    test_sym_matmul(dtype, 100000, 8, 8, false, true, false);  // more than a grid is high
  }
  SymMatmulParams params{};
  params.a = params.b = at(kA);
  params.out = at(kOut);
  params.batch = 1;
  params.n = params.k = params.a_row_stride = params.b_row_stride = params.out_row_stride = 64;
  params.dtype = kBF16;
  CHECK(launch_sym_matmul(params, nullptr) == cudaSuccess);
  expect_launches(1);
  for (const auto& spoil : std::vector<void (*)(SymMatmulParams&)>{
           [](SymMatmulParams& p) { p.a = at(kA) + 8; },
           [](SymMatmulParams& p) { p.a_row_stride = 68; },
           [](SymMatmulParams& p) { p.out_row_stride = 66; },
           [](SymMatmulParams& p) { p.n = int64_t{1} << 31; }, [](SymMatmulParams& p) { p.k = 0; },
           [](SymMatmulParams& p) { p.beta = 1.f; }, [](SymMatmulParams& p) { p.dtype = kFP32; },
           [](SymMatmulParams& p) { p.transposed = true, p.b = at(kB); }}) {
    SymMatmulParams bad = params;
    spoil(bad);
    CHECK(launch_sym_matmul(bad, nullptr) == cudaErrorInvalidValue);
  }
  params.batch = 0;
  CHECK(launch_sym_matmul(params, nullptr) == cudaSuccess);
  expect_launches(0);
}

// One map serves A and B: all slots' matrices, one after another.
void test_polar_chain(int64_t batch, int64_t n, int num_steps) {
  PolarChainParams params{};
  params.work = at(kA);
  params.counters = reinterpret_cast<uint32_t*>(at(kB));
  params.batch = batch;
  params.n = n;
  params.num_steps = num_steps;
  CHECK(launch_polar_chain(params, nullptr) == cudaSuccess);
  const uint64_t un = n, slots = chain_slots(num_steps), side = squares_per_side(n);
  expect(at(kA), {un, un, slots * batch}, {2 * un, 2 * un * un});
  CHECK(maps.size() == 1 && cleared_bytes == 4 * slots * batch * side);
  const uint64_t items = chain_products(num_steps) * batch * triangle_size(side);
  CHECK(blocks == (items < kSms ? items : kSms));
  expect_launches(1);
}

void test_polar_chains() {
  for (const int64_t gpus : {1, 8}) {
    for (const int num_steps : {2, 3}) {
      test_polar_chain(64 / gpus, 256, num_steps);
      test_polar_chain(24 / gpus, 768, num_steps);
    }
  }
  test_polar_chain(1, 128, 1);
  test_polar_chain(2, 2048, kMaxChainSteps);
  PolarChainParams params{};
  params.work = at(kA);
  params.counters = reinterpret_cast<uint32_t*>(at(kB));
  params.batch = 1;
  params.n = 128;
  params.num_steps = 1;
  for (const auto& spoil : std::vector<void (*)(PolarChainParams&)>{
           [](PolarChainParams& p) { p.work = at(kA) + 8; }, [](PolarChainParams& p) { p.n = 192; },
           [](PolarChainParams& p) { p.num_steps = 0; },
           [](PolarChainParams& p) { p.num_steps = kMaxChainSteps + 1; },
           [](PolarChainParams& p) { p.batch = int64_t{1} << 31; },
           [](PolarChainParams& p) { p.n = 2 * kMaxChainN; }}) {
    PolarChainParams bad = params;
    spoil(bad);
    CHECK(launch_polar_chain(bad, nullptr) == cudaErrorInvalidValue);
  }
  blocks_per_sm = 0;
  CHECK(launch_polar_chain(params, nullptr) == cudaErrorCooperativeLaunchTooLarge);
  blocks_per_sm = 1;
  params.batch = 0;
  CHECK(launch_polar_chain(params, nullptr) == cudaSuccess);
  expect_launches(0);
}

// `in_clusters`: whether a cluster's shared memory holds the rows' factors; else a block has a row.
void test_softcap_ce(int64_t rows, int64_t cols, bool transposed, bool in_clusters) {
  for (const bool rounded : {false, true}) {
    SoftcapCeParams params{};
    params.z = at(kA);
    params.dz = reinterpret_cast<uint8_t*>(at(kOut));
    params.dz_t = transposed ? reinterpret_cast<uint8_t*>(at(kTransposed)) : nullptr;
    params.rows = rows;
    params.cols = cols;
    params.num_targets = 3;
    params.a = 23, params.b = 5, params.c = 7.5;
    params.round_sigmoid = rounded;
    CHECK(launch_softcap_ce(params, nullptr) == cudaSuccess);
    if (in_clusters) {
      CHECK(blocks == static_cast<uint64_t>(rows) / 16 * 8 && mirrors == 0);
      const int64_t width = ceil_div(cols / 16, 8) * 16;  // of a block's columns
      CHECK(cluster_bytes == static_cast<size_t>(16 * 2 * width));
      expect_launches(1);
    } else {  // and a transpose behind it
      CHECK(mirrors == (transposed ? 2 : 1));
      expect_launches(0);
    }
  }
}

void test_softcap_ces() {
  for (const int64_t tokens : {16384, 32768, 49152}) {
    test_softcap_ce(tokens, 50304, true, true);
    test_softcap_ce(tokens, 50304, false, false);
  }
  test_softcap_ce(16, 16, true, true);    // seven of eight blocks have no columns
  test_softcap_ce(17, 272, true, false);  // rows that no cluster takes
  test_softcap_ce(16, 65536, true, false);
  test_softcap_ce(2, 120000, true, false);  // nor does a block hold one row's factors
  ptx_version = 80;                         // code without clusters, as on other GPUs
  test_softcap_ce(16, 272, true, false);
  ptx_version = 90;
  SoftcapCeParams params{};
  params.z = at(kA);
  params.dz = reinterpret_cast<uint8_t*>(at(kOut));
  params.rows = params.cols = 16;
  params.a = 23, params.b = 5, params.c = 7.5;
  for (const auto& spoil : std::vector<void (*)(SoftcapCeParams&)>{
           [](SoftcapCeParams& p) { p.z = at(kA) + 8; }, [](SoftcapCeParams& p) { p.cols = 24; },
           [](SoftcapCeParams& p) { p.a = 2 * kLargestSoftcap; },
           [](SoftcapCeParams& p) { p.c = 0; }, [](SoftcapCeParams& p) { p.rows = -1; }}) {
    SoftcapCeParams bad = params;
    spoil(bad);
    CHECK(launch_softcap_ce(bad, nullptr) == cudaErrorInvalidValue);
  }
  params.rows = 0;
  CHECK(launch_softcap_ce(params, nullptr) == cudaSuccess);
  expect_launches(0);
}

void test_head_logits(int64_t rows, int64_t cols, int64_t dim) {
  HeadLogitsParams params{at(kA),        at(kB),   number(kScale),  number(kScale),
                          number(kAmax), at(kOut), at(kTransposed), rows,
                          cols,          dim,      {23, 5, 7.5}};
  CHECK(launch_head_logits(params, nullptr) == cudaSuccess);
  const uint64_t ur = rows, uc = cols, ud = dim;
  expect(at(kA), {ud, ur}, {ud});
  expect(at(kB), {ud, uc}, {ud});
  expect(at(kOut), {uc, ur}, {uc});
  expect(at(kTransposed), {ur, uc}, {ur});
  CHECK(maps.size() == 4);
  expect_launches(1);
}

// A block for eight rows; for the columns, of 32 each, one for either half of the model's dim.
void test_head_targets(int64_t rows, int64_t cols, int64_t dim, int64_t num_targets) {
  HeadTargetTermsParams terms{};
  terms.rows = rows, terms.cols = cols, terms.dim = dim, terms.num_targets = num_targets;
  terms.softcap = {23, 5, 7.5};
  HeadTargetRowsParams of_rows{};
  of_rows.rows = rows, of_rows.cols = cols, of_rows.dim = dim, of_rows.num_targets = num_targets;
  HeadTargetColumnsParams of_columns{};
  of_columns.rows = rows, of_columns.cols = cols, of_columns.dim = dim;
  of_columns.num_targets = num_targets;
  const auto ok = cudaSuccess;
  CHECK(launch_head_target_terms(terms, nullptr) == ok && plain_blocks == ceil_div(rows, 8));
  CHECK(launch_head_add_target_rows(of_rows, nullptr) == ok && plain_blocks == ceil_div(rows, 8));
  CHECK(launch_head_add_target_columns(of_columns, nullptr) == ok);
  CHECK(plain_blocks == 2 * ceil_div(cols, 32) && mirrors == 3);
  expect_launches(0);
}

void test_head() {
  for (const int64_t tokens : {16384, 32768, 49152}) {
    test_head_logits(tokens, 50304, 768);
    test_head_targets(tokens, 50304, 768, 4);
  }
  test_head_logits(16, 16, 16);
  test_head_logits(144, 272, 80);
  test_head_targets(1, 8, 8, 1);
  HeadLogitsParams params{};
  params.x = at(kA), params.w = at(kB), params.g = at(kOut), params.g_t = at(kTransposed);
  params.rows = params.cols = params.dim = 64;
  params.softcap = {23, 5, 7.5};
  CHECK(launch_head_logits(params, nullptr) == cudaSuccess);
  expect_launches(1);
  for (const auto& spoil : std::vector<void (*)(HeadLogitsParams&)>{
           [](HeadLogitsParams& p) { p.x = at(kA) + 8; }, [](HeadLogitsParams& p) { p.rows = 72; },
           [](HeadLogitsParams& p) { p.cols = 72; }, [](HeadLogitsParams& p) { p.dim = 72; },
           [](HeadLogitsParams& p) { p.g_t = at(kTransposed) + 8; },
           [](HeadLogitsParams& p) { p.rows = int64_t{1} << 31; },
           [](HeadLogitsParams& p) { p.dim = 0; }, [](HeadLogitsParams& p) { p.softcap.a = 33; },
           [](HeadLogitsParams& p) { p.softcap.c = 0; }}) {
    HeadLogitsParams bad = params;
    spoil(bad);
    CHECK(launch_head_logits(bad, nullptr) == cudaErrorInvalidValue);
  }
  params.rows = 0;
  CHECK(launch_head_logits(params, nullptr) == cudaSuccess);
  HeadTargetRowsParams targets{};
  targets.rows = targets.cols = targets.dim = 64;
  for (const int64_t num_targets : {0, kMaxHeadTargets + 1}) {
    targets.num_targets = num_targets;
    CHECK(launch_head_add_target_rows(targets, nullptr) == cudaErrorInvalidValue);
  }
  targets.num_targets = 1;
  targets.dim = 68;
  CHECK(launch_head_add_target_rows(targets, nullptr) == cudaErrorInvalidValue);
  expect_launches(0);
}

void test_record_shapes() {
  constexpr int64_t kDim = 768, kHidden = 3072, kVocab = 50304;
  for (const int64_t tokens : {16384, 32768, 49152}) {
    // The head: logits, gradients of its input and of its weights.
    test_store(kE4M3, kE4M3, kBF16, 1, tokens, kVocab, kDim, true, false);
    test_store(kE5M2, kE4M3, kBF16, 1, tokens, kDim, kVocab, false, true);
    test_add(kE4M3, kE5M2, kDim, kVocab, tokens, false, 1);
    test_add(kE5M2, kE4M3, kVocab, kDim, tokens, true, 1);
    // The MLP, all of it in FP8.
    for (const bool transposed : {false, true}) {
      test_relu2(tokens, kHidden, kDim, true, transposed);
      test_drelu2(tokens, kHidden, kDim, true, transposed);
    }
    test_drelu2(tokens, kHidden, kDim, false, false);
    test_store(kE4M3, kE4M3, kBF16, 1, tokens, kDim, kHidden, true, false);
    test_store(kE5M2, kE4M3, kBF16, 1, tokens, kDim, kHidden, false, false);
    test_add(kE5M2, kE4M3, kHidden, kDim, tokens, false, 4);
    test_add(kE4M3, kE5M2, kHidden, kDim, tokens, true, 4);
    test_relu2_mlp(tokens, kHidden, kDim);
  }
}

void test_edges() {
  for (const bool fast : {false, true}) {
    test_store(kE4M3, kE4M3, kBF16, 1, 1, 16, 16, fast, true);
    test_store(kE5M2, kE4M3, kBF16, 3, 200, 208, 144, fast, false);
    test_store(kE4M3, kE4M3, kE4M3, 2, 200, 208, 784, fast, true);
  }
  test_add(kE4M3, kE5M2, 208, 224, 4112, false, 1);  // not in whole steps of K
  test_relu2(1, 16, 16, false, false);
  test_relu2(16, 16, 16, false, true);
  test_drelu2(272, 400, 784, true, true);
  test_relu2_mlp(1, 8, 8);
}

void test_refusals() {
  Fp8MatmulParams params{operands(kE4M3, kE4M3, 1, 64, 64, 64, true),
                         nullptr,
                         nullptr,
                         at(kOut),
                         64 * 64,
                         64,
                         kBF16,
                         false};
  CHECK(launch_fp8_matmul(params, nullptr) == cudaSuccess);
  expect_launches(1);
  for (const auto& spoil : std::vector<void (*)(Fp8MatmulParams&)>{
           [](Fp8MatmulParams& p) { p.in.a = at(kA) + 8; },
           [](Fp8MatmulParams& p) { p.in.a_row_stride = 72; },
           [](Fp8MatmulParams& p) { p.out = at(kOut) + 2; },
           [](Fp8MatmulParams& p) { p.out_row_stride = 68; },
           [](Fp8MatmulParams& p) { p.in.m = int64_t{1} << 31; },
           [](Fp8MatmulParams& p) { p.in.k = 0; }, [](Fp8MatmulParams& p) { p.in.a_dtype = kBF16; },
           [](Fp8MatmulParams& p) { p.out_scale = number(kScale); },
           [](Fp8MatmulParams& p) { p.accumulate = true; }}) {
    Fp8MatmulParams bad = params;
    spoil(bad);
    CHECK(launch_fp8_matmul(bad, nullptr) == cudaErrorInvalidValue);
  }
  params.in.m = 0;
  CHECK(launch_fp8_matmul(params, nullptr) == cudaSuccess);
  expect_launches(0);
}

}  // namespace
}  // namespace speedrun

int main() {
  speedrun::test_record_shapes();
  speedrun::test_edges();
  speedrun::test_sym_matmuls();
  speedrun::test_polar_chains();
  speedrun::test_softcap_ces();
  speedrun::test_head();
  speedrun::test_refusals();
  std::puts("launch: tensor maps and launches as a driver takes them");
}
