// Rows of the bigram table and of the sign table for each token of a part.
#pragma once

#include <cstdint>

namespace speedrun {

// value mod divisor, never negative; exact for every int32 value and 1 <= divisor <= 2^30.
class FloorMod {
 public:
  explicit FloorMod(int32_t divisor) : divisor_(divisor), reciprocal_(1.0 / divisor) {}

  // Free of branches and of hardware division, so that loops over it become SIMD code.
  int32_t operator()(int32_t value) const {
    // |value * reciprocal_| <= 2^31 / divisor is off by less than 1 / divisor, so the quotient is
    // wrong by one at most where divisor divides value: the rest lies in [-divisor, divisor].
    const auto quotient = static_cast<int32_t>(value * reciprocal_);
    auto rest =
        static_cast<int32_t>(static_cast<uint32_t>(value) -
                             static_cast<uint32_t>(quotient) * static_cast<uint32_t>(divisor_));
    rest += divisor_ & (rest >> 31);
    rest -= divisor_;
    return rest + (divisor_ & (rest >> 31));
  }

 private:
  int32_t divisor_;
  double reciprocal_;
};

// Signed 32-bit arithmetic that wraps, hence computed unsigned.
inline int32_t mix_bigram(int32_t token, int32_t previous) {
  return static_cast<int32_t>((36313u * static_cast<uint32_t>(token)) ^
                              (27191u * static_cast<uint32_t>(previous)));
}

// inputs, rows: (num_tokens). table_rows in [2, 2^30].
inline void bigram_rows(const int32_t* inputs, int64_t num_tokens, int32_t table_rows,
                        int32_t* rows) {
  const FloorMod mod(table_rows - 1);
  rows[0] = table_rows - 1;
  if (num_tokens > 1) rows[1] = mod(mix_bigram(inputs[1], table_rows - 1));
  for (int64_t t = 2; t < num_tokens; ++t) rows[t] = mod(mix_bigram(inputs[t], inputs[t - 1]));
}

// inputs, rows: (num_tokens). table_rows in [1, 2^30].
inline void sign_rows(const int32_t* inputs, int64_t num_tokens, int32_t table_rows,
                      int32_t* rows) {
  const FloorMod mod(table_rows);
  rows[0] = 0;
  for (int64_t t = 1; t < num_tokens; ++t) rows[t] = mod(inputs[t] ^ inputs[t - 1]);
}

}  // namespace speedrun
