// The token loader without Python: remainders, verification of shards, dealing, the thread.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "data/bigram.h"
#include "data/loader.h"
#include "tests/check.h"

namespace speedrun {
namespace {

constexpr int32_t kBos = 256;
const DataFormat kBytes = {"bytes", 257, kBos};
constexpr std::chrono::milliseconds kLong{60'000};
const std::atomic<bool> kGoOn = false;

std::filesystem::path folder() {
  return std::filesystem::temp_directory_path() / ("data_test_" + std::to_string(::getpid()));
}

std::string write_shard(const std::string& name, const std::vector<uint16_t>& tokens,
                        std::vector<int32_t> header = {}) {
  if (header.empty()) header = {20240520, 1, static_cast<int32_t>(tokens.size())};
  header.resize(256);
  const std::string path = folder() / name;
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(header.data()), 1024);
  file.write(reinterpret_cast<const char*>(tokens.data()),
             static_cast<std::streamsize>(2 * tokens.size()));
  return path;
}

// Documents of 1 to 40 tokens.
std::vector<uint16_t> random_tokens(size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<uint16_t> tokens(count);
  for (size_t i = 0, next_start = 3; i < count; ++i) {
    tokens[i] = static_cast<uint16_t>(i == next_start ? kBos : random() % 256);
    if (i == next_start) next_start += 1 + random() % 40;
  }
  return tokens;
}

LoaderOptions options(std::vector<std::string> shards, std::vector<BatchShape> shapes,
                      LongDocuments long_documents = LongDocuments::kCut) {
  return {std::move(shards), std::move(shapes), kBytes,           long_documents, /*repeat=*/true,
          {0, 0, 0},         /*rank=*/0,        /*world_size=*/1, 1000,           64};
}

// The message of the DataError that `action` throws; empty if it throws none.
template <typename Action>
std::string error_of(Action action) {
  try {
    action();
  } catch (const DataError& error) {
    return error.what();
  }
  return "";
}

bool says(const std::string& message, const std::string& wanted) {
  if (message.find(wanted) != std::string::npos) return true;
  std::fprintf(stderr, "'%s' does not say '%s'\n", message.c_str(), wanted.c_str());
  return false;
}

void test_floor_mod() {
  std::mt19937 random(1);
  std::vector<int32_t> divisors = {1, 2, 3, 7, 8192, 377'279, (1 << 30) - 1, 1 << 30};
  for (int i = 0; i < 200; ++i) {
    divisors.push_back(1 + static_cast<int32_t>(random() >> (2 + random() % 29)));
  }
  for (const int32_t divisor : divisors) {
    const FloorMod mod(divisor);
    const auto check = [&](int64_t value) {
      if (value < INT32_MIN || value > INT32_MAX) return;
      const int64_t exact = ((value % divisor) + divisor) % divisor;
      CHECK(mod(static_cast<int32_t>(value)) == exact);
    };
    for (const int64_t edge : {int64_t{0}, int64_t{INT32_MIN}, int64_t{INT32_MAX}}) {
      for (int64_t near = -3; near <= 3; ++near) check(edge + near);
    }
    for (int i = 0; i < 2000; ++i) {
      check(static_cast<int32_t>(random()));
      const int64_t multiple = static_cast<int32_t>(random()) / divisor * int64_t{divisor};
      for (int64_t near = -1; near <= 1; ++near) check(multiple + near);
    }
  }
}

void test_row_formulas() {
  const int32_t inputs[3] = {50256, 11, 50000};
  int32_t rows[3];
  bigram_rows(inputs, 3, 377'280, rows);
  const auto wrapped = static_cast<int32_t>(static_cast<uint32_t>(27191ll * 377'279));
  CHECK(rows[0] == 377'279);
  CHECK(rows[1] == ((36313 * 11 ^ wrapped) % 377'279 + 377'279) % 377'279);
  CHECK(rows[2] == (1'815'650'000 ^ 299'101) % 377'279);
  sign_rows(inputs, 3, 8192, rows);
  CHECK(rows[0] == 0 && rows[1] == (50256 ^ 11) % 8192 && rows[2] == (11 ^ 50000) % 8192);
}

void test_shard_verification() {
  const std::vector<uint16_t> tokens = random_tokens(1000, 1);
  const auto open = [](const std::string& path) {
    return error_of([&] { Shard(path, kBytes).find_documents(true, kGoOn); });
  };
  CHECK(open(write_shard("good.bin", tokens)).empty());
  CHECK(says(open(folder() / "absent.bin"), "no such file"));
  CHECK(says(open(folder()), "not a regular file"));
  CHECK(says(open(write_shard("bad.bin", tokens, {1, 1, 1000})), "magic number 1,"));
  CHECK(says(open(write_shard("bad.bin", tokens, {20240520, 2, 1000})), "version 2"));
  for (const int32_t count : {-5, 0}) {
    CHECK(says(open(write_shard("bad.bin", tokens, {20240520, 1, count})), "token count"));
  }
  for (const int32_t count : {999, 1001, INT32_MAX}) {
    CHECK(says(open(write_shard("bad.bin", tokens, {20240520, 1, count})), "3024 bytes"));
  }
  for (const size_t at : {0u, 63u, 64u, 500u, 999u}) {
    std::vector<uint16_t> bad = tokens;
    bad[at] = 257;
    CHECK(says(open(write_shard("bad.bin", bad)), "token 257 at offset " + std::to_string(at)));
  }
  CHECK(says(open(write_shard("bad.bin", std::vector<uint16_t>(100, 7))), "no document start"));
  std::filesystem::resize_file(folder() / "bad.bin", 1000);
  CHECK(says(open(folder() / "bad.bin"), "1000 bytes"));
}

void test_documents_found() {
  const std::vector<uint16_t> tokens = random_tokens(5000, 2);
  std::vector<int64_t> expected;
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] == kBos) expected.push_back(static_cast<int64_t>(i));
  }
  const Shard shard(write_shard("documents.bin", tokens), kBytes);
  CHECK(shard.find_documents(true, kGoOn) == expected);
  const std::atomic<bool> stop = true;
  CHECK(says(error_of([&] { shard.find_documents(true, stop); }), "closed"));
}

void test_dealing() {
  const ShardIndex index = {{2, 5, 6, 20, 24}, 40};  // documents of 3, 1, 14, 4 and 16 tokens
  int64_t offset = 0;
  auto step = deal_step(index, LongDocuments::kCut, {1, 1, 2, 8}, 8, &offset);
  CHECK(!step && offset == 0);  // five documents can't make eight parts

  ShardIndex many = {{}, 2 + 4 * 16};
  for (int64_t start = 2; start < many.num_tokens; start += 4) many.documents.push_back(start);
  // 3 tokens, and 1 of the next
  step = deal_step(many, LongDocuments::kCut, {1, 3, 3, 8}, 8, &offset);
  CHECK(step && offset == 16);
  for (int64_t p = 0; p < 8; ++p) {
    const auto& [ranges, starts] = (*step)[p];
    CHECK(starts == std::vector<int64_t>({0}));  // the second document is only a target
    CHECK(ranges.size() == 2);
    CHECK(ranges[0].begin == 2 + 8 * p && ranges[0].end == 5 + 8 * p);
    CHECK(ranges[1].begin == 6 + 8 * p && ranges[1].end == 7 + 8 * p);
  }
  CHECK(!deal_step(many, LongDocuments::kCut, {1, 3, 3, 8}, 8, &offset) && offset == 16);

  offset = 0;
  step = deal_step(index, LongDocuments::kSplit, {1, 4, 3, 8}, 8, &offset);
  CHECK(step && offset == 4);  // lanes of 5 tokens, from 0, 4, 9, 14, 19, 24, 29 and 34 on
  CHECK((*step)[0].starts == std::vector<int64_t>({0, 2}));     // document at 2
  CHECK((*step)[1].starts == std::vector<int64_t>({0, 1, 2}));  // documents at 5 and 6
  CHECK((*step)[2].starts == std::vector<int64_t>({0, 3}));     // cut after max_seq_len
  CHECK((*step)[7].ranges[0].begin == 34 && (*step)[7].ranges[0].end == 39);
  step = deal_step(index, LongDocuments::kSplit, {1, 4, 3, 8}, 8, &offset);
  CHECK(step && offset == 5);  // reaches back to use the lanes' last token
  CHECK((*step)[7].ranges[0].begin == 35 && (*step)[7].ranges[0].end == 40);
  CHECK(!deal_step(index, LongDocuments::kSplit, {1, 4, 3, 8}, 8, &offset) && offset == 5);
}

void test_thread_gives_the_same_stream() {
  const std::vector<std::string> shards = {write_shard("a.bin", random_tokens(9000, 3)),
                                           write_shard("b.bin", random_tokens(7000, 4))};
  const std::vector<BatchShape> shapes = {{5, 64, 16, 65}, {0, 1, 1, 2}, {20, 100, 30, 101}};
  for (const auto mode : {LongDocuments::kCut, LongDocuments::kSplit}) {
    Stream stream(options(shards, shapes, mode), kGoOn);
    Loader loader(options(shards, shapes, mode), 3);
    int64_t epoch = 0;
    for (int step = 0; step < 25; ++step) {
      const auto a = stream.next_step();
      const auto b = loader.take(kLong);
      const auto same = [&](const auto& x, const auto& y, int64_t columns) {
        return std::equal(x.get(), x.get() + a->num_parts * columns, y.get());
      };
      CHECK(b && a->position.offset == b->position.offset);
      CHECK(same(a->inputs, b->inputs, a->tokens_per_part));
      CHECK(same(a->targets, b->targets, a->tokens_per_part));
      CHECK(same(a->cu_seqlens, b->cu_seqlens, a->cu_seqlens_entries));
      CHECK(same(a->bigram_rows, b->bigram_rows, a->tokens_per_part));
      CHECK(same(a->sign_rows, b->sign_rows, a->tokens_per_part));
      epoch = b->position.epoch;
    }
    CHECK(epoch == 1);
    CHECK(says(error_of([&] { loader.take(kLong); }), "all 25 steps"));
    CHECK(says(error_of([&] { loader.take(kLong); }), "all 25 steps"));
  }
}

void test_errors_come_through_the_thread() {
  const std::string good = write_shard("good.bin", random_tokens(3000, 5));
  const std::string bad = write_shard("bad.bin", random_tokens(3000, 6), {20240520, 1, 3001});
  Loader loader(options({good, bad}, {{100, 100, 30, 101}}), 64);
  std::this_thread::sleep_for(
      std::chrono::milliseconds(100));  // the error is there; steps go first
  int64_t steps = 0;
  const std::string message = error_of([&] {
    while (loader.take(kLong)) ++steps;
  });
  CHECK(steps >= 2 && says(message, "bad.bin: 7024 bytes"));

  const std::string short_shard = write_shard("short.bin", random_tokens(50, 7));
  Loader hopeless(options({short_shard}, {{1, 100, 30, 101}}), 2);
  CHECK(says(error_of([&] { hopeless.take(kLong); }), "no shard of 1 holds one step"));

  const std::string shrinking = write_shard("shrinking.bin", random_tokens(100'000, 8));
  Loader cut_short(options({shrinking}, {{1000, 100, 30, 101}}), 2);
  CHECK(cut_short.take(kLong));
  std::filesystem::resize_file(shrinking, 4096);
  CHECK(says(error_of([&] {
               while (cut_short.take(kLong)) continue;
             }),
             "4096 bytes"));
}

void test_close_races() {
  const std::string path = write_shard("race.bin", random_tokens(200'000, 9));
  const auto race_options = [&] { return options({path}, {{1 << 20, 100, 30, 101}}); };
  for (int round = 0; round < 200; ++round) {
    Loader loader(race_options(), 1 + round % 3);
    std::thread taker([&] {
      error_of([&] {
        for (;;) loader.take(std::chrono::milliseconds(1));
      });
    });
    if (round % 2) std::this_thread::sleep_for(std::chrono::microseconds(50 * (round % 20)));
    std::thread closer([&] { loader.close(); });
    loader.close();
    closer.join();
    taker.join();
    CHECK(says(error_of([&] { loader.take(kLong); }), "closed"));
  }
  for (int round = 0; round < 50; ++round) {
    const Loader unused(race_options(), 1);  // destroyed in the scan or with a full queue
    if (round % 2) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

int run() {
  std::filesystem::create_directory(folder());
  test_floor_mod();
  test_row_formulas();
  test_shard_verification();
  test_documents_found();
  test_dealing();
  test_thread_gives_the_same_stream();
  test_errors_come_through_the_thread();
  test_close_races();
  std::filesystem::remove_all(folder());
  std::puts("data_test: all passed");
  return 0;
}

}  // namespace
}  // namespace speedrun

int main() { return speedrun::run(); }
