// The stream of a rank's batches, and the thread that prepares them ahead.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "batcher.h"
#include "shard.h"

namespace speedrun {

// Where the next step starts. offset counts documents, or a lane's tokens with kSplit.
struct LoaderPosition {
  int64_t shard, offset, epoch;
};

struct LoaderOptions {
  std::vector<std::string> shards;  // paths, at least one
  std::vector<BatchShape> shapes;
  DataFormat format;
  LongDocuments long_documents;
  bool repeat;
  LoaderPosition start;                        // start.shard is an index into shards
  int rank, world_size;                        // world_size divides num_parts(world_size)
  int32_t bigram_table_rows, sign_table_rows;  // 0: no such array
};

// One rank's P = num_parts / world_size parts of a step: row p is part p * world_size + rank.
struct StepBatch {
  int64_t num_parts, tokens_per_part, cu_seqlens_entries;  // P, T, N
  std::unique_ptr<int32_t[]> inputs, targets;              // (P, T)
  std::unique_ptr<int32_t[]> cu_seqlens;                   // (P, N)
  std::unique_ptr<int32_t[]> bigram_rows, sign_rows;       // (P, T) or null
  LoaderPosition position;                                 // after this step
};

// Step after step in the calling thread. Once `stop` is set, a scan gives up.
class Stream {
 public:
  Stream(LoaderOptions options, const std::atomic<bool>& stop);
  // Throws DataError for a bad shard, for tokens that run out and after the last step.
  std::unique_ptr<StepBatch> next_step();

 private:
  const BatchShape& next_shape();
  StepRanges deal(const BatchShape& shape);
  void open_shard();
  void move_to_next_shard(const BatchShape& shape);
  std::string step_size(const BatchShape& shape) const;

  const LoaderOptions options_;
  const int64_t num_parts_;
  const std::atomic<bool>& stop_;
  LoaderPosition position_;
  std::unique_ptr<Shard> shard_;
  ShardIndex index_;
  size_t shape_ = 0;            // of the next step
  int64_t steps_of_shape_ = 0;  // dealt
  int64_t num_steps_dealt_ = 0;
};

// A Stream in a thread of its own, at most `prefetch_steps` batches ahead.
class Loader {
 public:
  Loader(LoaderOptions options, size_t prefetch_steps);
  ~Loader() { close(); }
  Loader(const Loader&) = delete;
  Loader& operator=(const Loader&) = delete;

  // The next batch, or null where it is not ready in time. Rethrows what ended the stream, after
  // the batches before it; DataError once closed.
  std::unique_ptr<StepBatch> take(std::chrono::milliseconds timeout);
  // Ends the thread, whatever it does. Any thread may call it, more than once.
  void close();

 private:
  void run();

  std::atomic<bool> closed_ = false;
  Stream stream_;
  const size_t capacity_;
  std::mutex mutex_;  // guards queue_, error_ and the changes of closed_
  std::condition_variable space_, ready_;
  std::deque<std::unique_ptr<StepBatch>> queue_;
  std::exception_ptr error_;
  std::mutex joining_;
  std::thread thread_;  // last: it uses all the others
};

}  // namespace speedrun
