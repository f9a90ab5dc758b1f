#include "loader.h"

#include <utility>

namespace speedrun {
namespace {

std::string text(int64_t number) { return std::to_string(number); }

std::unique_ptr<int32_t[]> allocate(int64_t count) {
  return std::make_unique_for_overwrite<int32_t[]>(static_cast<size_t>(count));
}

// The last entry of cu_seqlens is always tokens_per_part.
void check_documents_fit(const Shard& shard, const PartRanges& part, const BatchShape& shape) {
  const auto num_documents = static_cast<int64_t>(part.starts.size());
  if (num_documents <= shape.cu_seqlens_entries - 1) return;
  throw DataError(shard.path() + ": " + text(num_documents) + " documents in one part of " +
                  text(shape.tokens_per_part) + " tokens, but cu_seqlens has room for " +
                  text(shape.cu_seqlens_entries - 1) +
                  ": --set data.cu_seqlens_entries=" + text(num_documents + 1) + " (or more)");
}

}  // namespace

Stream::Stream(LoaderOptions options, const std::atomic<bool>& stop)
    : options_(std::move(options)),
      num_parts_(num_parts(options_.world_size)),
      stop_(stop),
      position_(options_.start) {}

std::string Stream::step_size(const BatchShape& shape) const {
  return text(num_parts_) + " x " + text(shape.tokens_per_part) + " tokens";
}

void Stream::open_shard() {
  const bool cut = options_.long_documents == LongDocuments::kCut;
  shard_ = std::make_unique<Shard>(options_.shards[position_.shard], options_.format);
  index_ = {shard_->find_documents(/*at_least_one=*/cut, stop_), shard_->num_tokens()};
  const auto num_documents = static_cast<int64_t>(index_.documents.size());
  const int64_t end = cut ? num_documents : lane_tokens(index_, num_parts_);
  if (position_.offset > end) {
    throw DataError(shard_->path() + ": the position to start from is " + text(position_.offset) +
                    ", beyond the shard's end " + text(end) +
                    "; resume with the shards of the run that stored it");
  }
}

void Stream::move_to_next_shard(const BatchShape& shape) {
  LoaderPosition next = {position_.shard + 1, 0, position_.epoch};
  if (next.shard == static_cast<int64_t>(options_.shards.size())) {
    if (!options_.repeat) {
      throw DataError(options_.shards.back() + ": the last shard is used up after " +
                      text(num_steps_dealt_) + " steps, and the next needs " + step_size(shape) +
                      "; fetch more shards (speedrun data fetch) or use them again "
                      "(--repeat-data)");
    }
    next = {0, 0, position_.epoch + 1};
  }
  position_ = next;
  open_shard();
}

const BatchShape& Stream::next_shape() {
  while (shape_ < options_.shapes.size() && steps_of_shape_ == options_.shapes[shape_].steps) {
    ++shape_;
    steps_of_shape_ = 0;
  }
  if (shape_ == options_.shapes.size()) {
    throw DataError("all " + text(num_steps_dealt_) +
                    " steps of the schedule are dealt; give the loader the shapes of the steps to "
                    "come");
  }
  ++steps_of_shape_;
  return options_.shapes[shape_];
}

StepRanges Stream::deal(const BatchShape& shape) {
  if (!shard_) open_shard();
  // The first failure may be the rest of a shard; one more round means that none will do.
  for (size_t failures = 0; failures <= options_.shards.size(); ++failures) {
    if (auto step =
            deal_step(index_, options_.long_documents, shape, num_parts_, &position_.offset)) {
      for (const PartRanges& part : *step) check_documents_fit(*shard_, part, shape);
      ++num_steps_dealt_;
      return *std::move(step);
    }
    move_to_next_shard(shape);
  }
  throw DataError(options_.shards[0] + ": no shard of " + text(options_.shards.size()) +
                  " holds one step of " + step_size(shape) +
                  "; use fewer tokens a step or longer shards");
}

std::unique_ptr<StepBatch> Stream::next_step() {
  const BatchShape& shape = next_shape();
  const StepRanges step = deal(shape);
  auto batch = std::make_unique<StepBatch>();
  const int64_t tokens = shape.tokens_per_part, entries = shape.cu_seqlens_entries;
  const int64_t parts = num_parts_ / options_.world_size;
  batch->num_parts = parts;
  batch->tokens_per_part = tokens;
  batch->cu_seqlens_entries = entries;
  batch->inputs = allocate(parts * tokens);
  batch->targets = allocate(parts * tokens);
  batch->cu_seqlens = allocate(parts * entries);
  if (options_.bigram_table_rows) batch->bigram_rows = allocate(parts * tokens);
  if (options_.sign_table_rows) batch->sign_rows = allocate(parts * tokens);
  batch->position = position_;
  for (int64_t p = 0; p < parts; ++p) {
    const PartRanges& part = step[p * options_.world_size + options_.rank];
    shard_->check_size();
    for (const TokenRange& range : part.ranges) shard_->check_vocabulary(range.begin, range.end);
    const PartArrays arrays = {
        batch->inputs.get() + p * tokens,
        batch->targets.get() + p * tokens,
        batch->cu_seqlens.get() + p * entries,
        batch->bigram_rows ? batch->bigram_rows.get() + p * tokens : nullptr,
        batch->sign_rows ? batch->sign_rows.get() + p * tokens : nullptr,
    };
    fill_part(shard_->tokens(), part, shape, options_.bigram_table_rows, options_.sign_table_rows,
              arrays);
  }
  return batch;
}

Loader::Loader(LoaderOptions options, size_t prefetch_steps)
    : stream_(std::move(options), closed_), capacity_(prefetch_steps), thread_([this] { run(); }) {}

void Loader::run() {
  try {
    for (;;) {
      {
        std::unique_lock lock(mutex_);
        space_.wait(lock, [this] { return closed_ || queue_.size() < capacity_; });
        if (closed_) return;
      }
      auto batch = stream_.next_step();
      const std::lock_guard lock(mutex_);
      queue_.push_back(std::move(batch));
      ready_.notify_one();
    }
  } catch (...) {
    const std::lock_guard lock(mutex_);
    error_ = std::current_exception();
    ready_.notify_all();
  }
}

std::unique_ptr<StepBatch> Loader::take(std::chrono::milliseconds timeout) {
  std::unique_lock lock(mutex_);
  ready_.wait_for(lock, timeout, [this] { return closed_ || !queue_.empty() || error_; });
  if (closed_) throw DataError("the loader is closed; make a new one");
  if (!queue_.empty()) {
    auto batch = std::move(queue_.front());
    queue_.pop_front();
    space_.notify_one();
    return batch;
  }
  if (error_) std::rethrow_exception(error_);
  return nullptr;
}

void Loader::close() {
  {
    const std::lock_guard lock(mutex_);
    closed_ = true;
  }
  space_.notify_all();
  ready_.notify_all();
  const std::lock_guard lock(joining_);
  if (thread_.joinable()) thread_.join();
}

}  // namespace speedrun
