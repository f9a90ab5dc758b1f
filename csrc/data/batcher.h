// From an index of documents to token ranges, and from ranges to the arrays of a batch. No files.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

namespace speedrun {

// Parts of a step: eight, so that 1 to 8 ranks see the same, or one a rank where ranks are more.
constexpr int64_t num_parts(int world_size) { return std::max(8, world_size); }

// kCut: documents from their start, the tokens beyond max_seq_len dropped. kSplit: a shard is lanes
// of consecutive tokens, a lane for each part, cut into sequences of max_seq_len.
enum class LongDocuments { kCut, kSplit };

struct BatchShape {
  int64_t steps;
  int64_t tokens_per_part;
  int64_t max_seq_len;
  int64_t cu_seqlens_entries;
};

struct ShardIndex {
  std::vector<int64_t> documents;  // token offsets of their starts, ascending
  int64_t num_tokens;
};

struct TokenRange {
  int64_t begin, end;
};

// Where one part of T tokens lies in its shard.
struct PartRanges {
  std::vector<TokenRange> ranges;  // T + 1 tokens in all
  std::vector<int64_t> starts;     // of the documents, within the part, each below T
};
using StepRanges = std::vector<PartRanges>;  // of all parts

// Tokens of one of the shard's lanes (kSplit). The shard's last token is only a target.
constexpr int64_t lane_tokens(const ShardIndex& index, int64_t num_parts) {
  return (index.num_tokens - 1 + num_parts - 1) / num_parts;
}

// Deals the step that starts at *offset (a document's index, or a token of each lane with kSplit)
// and moves *offset behind it. Nothing, and *offset as it was, where the shard can't fill the step.
std::optional<StepRanges> deal_step(const ShardIndex& index, LongDocuments long_documents,
                                    const BatchShape& shape, int64_t num_parts, int64_t* offset);

// T = tokens_per_part, N = cu_seqlens_entries. A null pointer is left out.
struct PartArrays {
  int32_t* inputs;       // (T)
  int32_t* targets;      // (T)
  int32_t* cu_seqlens;   // (N)
  int32_t* bigram_rows;  // (T) or null
  int32_t* sign_rows;    // (T) or null
};

// Fills every element of the arrays. part.starts has at most N - 1 entries.
void fill_part(const uint16_t* shard_tokens, const PartRanges& part, const BatchShape& shape,
               int32_t bigram_table_rows, int32_t sign_table_rows, const PartArrays& arrays);

}  // namespace speedrun
