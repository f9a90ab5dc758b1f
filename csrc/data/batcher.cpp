#include "batcher.h"

#include <algorithm>

#include "bigram.h"

namespace speedrun {
namespace {

bool deal_documents(const ShardIndex& index, const BatchShape& shape, int64_t* offset,
                    PartRanges* part) {
  const auto num_documents = static_cast<int64_t>(index.documents.size());
  const int64_t wanted = shape.tokens_per_part + 1;
  int64_t filled = 0;
  while (filled < wanted) {
    if (*offset >= num_documents) return false;
    const int64_t begin = index.documents[*offset];
    const int64_t end =
        *offset + 1 < num_documents ? index.documents[*offset + 1] : index.num_tokens;
    const int64_t length = std::min({end - begin, shape.max_seq_len, wanted - filled});
    part->ranges.push_back({begin, begin + length});
    // A document of which only the last target is here has no input, hence no start.
    if (filled < shape.tokens_per_part) part->starts.push_back(filled);
    filled += length;
    ++*offset;
  }
  return true;
}

// The document pieces of the T + 1 tokens from `begin` on.
PartRanges cut_to_pieces(const ShardIndex& index, const BatchShape& shape, int64_t begin) {
  const int64_t end = begin + shape.tokens_per_part;
  PartRanges part;
  part.ranges.push_back({begin, end + 1});
  auto document = std::upper_bound(index.documents.begin(), index.documents.end(), begin);
  for (int64_t start = begin; start < end;) {
    part.starts.push_back(start - begin);
    start += shape.max_seq_len;
    if (document != index.documents.end() && *document <= start) start = *document++;
  }
  return part;
}

// Part p reads lane p of the shard: as many places of a text at once, where neighbouring pieces
// would be about the same thing. Lanes overlap by less than a token a part, and a lane's last part
// reaches back, so that every token is used.
std::optional<StepRanges> deal_lanes(const ShardIndex& index, const BatchShape& shape,
                                     int64_t num_parts, int64_t* offset) {
  const int64_t lane = lane_tokens(index, num_parts), spare = index.num_tokens - 1 - lane;
  if (*offset >= lane || shape.tokens_per_part > lane) return std::nullopt;
  const int64_t begin = std::min(*offset, lane - shape.tokens_per_part);
  StepRanges step;
  for (int64_t p = 0; p < num_parts; ++p) {
    step.push_back(cut_to_pieces(index, shape, p * spare / (num_parts - 1) + begin));
  }
  *offset = begin + shape.tokens_per_part;
  return step;
}

}  // namespace

std::optional<StepRanges> deal_step(const ShardIndex& index, LongDocuments long_documents,
                                    const BatchShape& shape, int64_t num_parts, int64_t* offset) {
  if (long_documents == LongDocuments::kSplit) return deal_lanes(index, shape, num_parts, offset);
  StepRanges step(num_parts);
  int64_t next = *offset;
  for (PartRanges& part : step) {
    if (!deal_documents(index, shape, &next, &part)) return std::nullopt;
  }
  *offset = next;
  return step;
}

void fill_part(const uint16_t* shard_tokens, const PartRanges& part, const BatchShape& shape,
               int32_t bigram_table_rows, int32_t sign_table_rows, const PartArrays& arrays) {
  const int64_t num_tokens = shape.tokens_per_part;
  int32_t* input = arrays.inputs;
  for (const TokenRange& range : part.ranges) {
    // The part's last token is only a target.
    const int64_t room = arrays.inputs + num_tokens - input;
    const int64_t count = std::min(range.end - range.begin, room);
    input = std::copy_n(shard_tokens + range.begin, count, input);
  }
  std::copy_n(arrays.inputs + 1, num_tokens - 1, arrays.targets);
  arrays.targets[num_tokens - 1] = shard_tokens[part.ranges.back().end - 1];

  int32_t* padding = std::copy(part.starts.begin(), part.starts.end(), arrays.cu_seqlens);
  std::fill(padding, arrays.cu_seqlens + shape.cu_seqlens_entries,
            static_cast<int32_t>(num_tokens));

  if (arrays.bigram_rows) {
    bigram_rows(arrays.inputs, num_tokens, bigram_table_rows, arrays.bigram_rows);
  }
  if (arrays.sign_rows) {
    sign_rows(arrays.inputs, num_tokens, sign_table_rows, arrays.sign_rows);
  }
}

}  // namespace speedrun
