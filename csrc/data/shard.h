// A shard file: 256 little-endian int32 (magic, version, token count, zeros), then uint16 tokens.
#pragma once

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace speedrun {

// Bad or missing data. The message names the file, the value found and the fix.
class DataError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Token ids lie in [0, vocab_size); bos_id starts a document.
struct DataFormat {
  std::string tokenizer;
  int64_t vocab_size;
  int64_t bos_id;
};

// A verified file, memory-mapped. Every method throws DataError for a file that has gone bad.
class Shard {
 public:
  // Header and size are verified before anything is mapped or allocated.
  Shard(std::string path, DataFormat format);
  ~Shard();
  Shard(const Shard&) = delete;
  Shard& operator=(const Shard&) = delete;

  const std::string& path() const { return path_; }
  int64_t num_tokens() const { return num_tokens_; }
  // (num_tokens); touch it only after check_size(): a mapping of a truncated file is a SIGBUS.
  const uint16_t* tokens() const { return tokens_; }

  // The file still has the size it was mapped with.
  void check_size() const;
  // Every token of [begin, end) is in the vocabulary.
  void check_vocabulary(int64_t begin, int64_t end) const;
  // Token offsets of the documents' starts, and the check of every token, in one pass. Once `stop`
  // is set it gives up with a DataError.
  std::vector<int64_t> find_documents(bool at_least_one, const std::atomic<bool>& stop) const;

 private:
  void verify_header();

  std::string path_;
  DataFormat format_;
  int file_ = -1;
  int64_t num_tokens_ = 0;
  int64_t num_bytes_ = 0;
  void* mapping_ = nullptr;
  const uint16_t* tokens_ = nullptr;
};

}  // namespace speedrun
