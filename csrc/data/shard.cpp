#include "shard.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <utility>

namespace speedrun {
namespace {

static_assert(std::endian::native == std::endian::little,
              "shards are read as they lie in the file");

constexpr int64_t kHeaderBytes = 1024;
constexpr int32_t kMagic = 20240520;
constexpr int32_t kVersion = 1;
constexpr int64_t kBlockTokens = 64;       // small beside a document, whole SIMD registers
constexpr int64_t kChunkTokens = 1 << 16;  // between two looks at the file's size: microseconds
constexpr char kRefetch[] =
    "fetch the shard again (speedrun data fetch) or write it again (speedrun data tokenize)";

std::string text(int64_t number) { return std::to_string(number); }

uint16_t largest(const uint16_t* tokens, int64_t count) {
  uint16_t result = 0;
  for (int64_t i = 0; i < count; ++i) result = std::max(result, tokens[i]);
  return result;
}

bool contains(const uint16_t* tokens, int64_t count, uint16_t wanted) {
  uint16_t found = 0;  // no early exit, so that the loop is one of SIMD compares
  for (int64_t i = 0; i < count; ++i) found |= tokens[i] == wanted;
  return found != 0;
}

}  // namespace

Shard::Shard(std::string path, DataFormat format)
    : path_(std::move(path)), format_(std::move(format)) {
  // Non-blocking, because opening a named pipe would wait for its writer for ever.
  file_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file_ < 0 && errno == ENOENT) throw DataError(path_ + ": no such file; " + kRefetch);
  if (file_ < 0) {
    throw DataError(path_ + ": cannot be opened (" + std::strerror(errno) + "); check its rights");
  }
  try {
    verify_header();
    mapping_ = ::mmap(nullptr, static_cast<size_t>(num_bytes_), PROT_READ, MAP_SHARED, file_, 0);
    if (mapping_ == MAP_FAILED) {
      throw DataError(path_ + ": cannot be mapped (" + std::strerror(errno) +
                      "); copy it to a local disk or use the NumPy loader");
    }
  } catch (...) {
    ::close(file_);
    throw;
  }
  ::madvise(mapping_, static_cast<size_t>(num_bytes_), MADV_WILLNEED);  // a hint: may fail
  tokens_ = reinterpret_cast<const uint16_t*>(static_cast<const char*>(mapping_) + kHeaderBytes);
}

Shard::~Shard() {
  ::munmap(mapping_, static_cast<size_t>(num_bytes_));
  ::close(file_);
}

void Shard::verify_header() {
  struct stat info;
  if (::fstat(file_, &info) != 0 || !S_ISREG(info.st_mode)) {
    throw DataError(path_ + ": not a regular file; give the path of a .bin shard");
  }
  int32_t header[3];  // magic, version, token count
  if (info.st_size < kHeaderBytes || ::pread(file_, header, sizeof header, 0) != sizeof header) {
    throw DataError(path_ + ": " + text(info.st_size) + " bytes, less than the header's " +
                    text(kHeaderBytes) + "; " + kRefetch);
  }
  const auto [magic, version, count] = header;
  if (magic != kMagic) {
    throw DataError(path_ + ": magic number " + text(magic) + ", not " + text(kMagic) +
                    ": not a shard; " + kRefetch);
  }
  if (version != kVersion) {
    throw DataError(path_ + ": version " + text(version) + ", not " + text(kVersion) + "; " +
                    kRefetch);
  }
  if (count < 1) {
    throw DataError(path_ + ": token count " + text(count) + " in the header, not 1 or more; " +
                    kRefetch);
  }
  num_tokens_ = count;
  num_bytes_ = kHeaderBytes + 2 * num_tokens_;
  check_size();
}

void Shard::check_size() const {
  struct stat info;
  const int64_t size = ::fstat(file_, &info) == 0 ? info.st_size : -1;
  if (size != num_bytes_) {
    throw DataError(path_ + ": " + text(size) + " bytes, but " + text(num_tokens_) +
                    " tokens in the header make " + text(num_bytes_) + ": truncated or changed; " +
                    kRefetch);
  }
}

void Shard::check_vocabulary(int64_t begin, int64_t end) const {
  const uint16_t* first = tokens_ + begin;
  if (largest(first, end - begin) < format_.vocab_size) return;
  const auto* bad = std::find_if(first, tokens_ + end,
                                 [this](uint16_t token) { return token >= format_.vocab_size; });
  throw DataError(path_ + ": token " + text(*bad) + " at offset " + text(bad - tokens_) +
                  ", outside the " + format_.tokenizer + " vocabulary of " +
                  text(format_.vocab_size) + "; " + kRefetch);
}

std::vector<int64_t> Shard::find_documents(bool at_least_one, const std::atomic<bool>& stop) const {
  std::vector<int64_t> starts;
  const auto bos = static_cast<uint16_t>(format_.bos_id);
  for (int64_t chunk = 0; chunk < num_tokens_; chunk += kChunkTokens) {
    if (stop) throw DataError(path_ + ": the loader was closed during the scan; make a new one");
    const int64_t chunk_end = std::min(chunk + kChunkTokens, num_tokens_);
    check_size();
    for (int64_t block = chunk; block < chunk_end; block += kBlockTokens) {
      const int64_t count = std::min(kBlockTokens, chunk_end - block);
      // The second look at a block comes out of the first-level cache.
      if (largest(tokens_ + block, count) >= format_.vocab_size) {
        check_vocabulary(block, block + count);
      }
      if (!contains(tokens_ + block, count, bos)) continue;
      for (int64_t i = block; i < block + count; ++i) {
        if (tokens_[i] == bos) starts.push_back(i);
      }
    }
  }
  if (at_least_one && starts.empty()) {
    throw DataError(path_ + ": no document start (token " + text(format_.bos_id) + ") among " +
                    text(num_tokens_) + " tokens; was it written with another tokenizer than " +
                    format_.tokenizer + "? " + kRefetch);
  }
  return starts;
}

}  // namespace speedrun
