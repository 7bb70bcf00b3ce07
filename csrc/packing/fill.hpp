// Turns the samples of a micro-batch into model inputs, in buffers that the caller owns.
#pragma once

#include <cstdint>
#include <span>

namespace sft_fast {

// A view of the token store. Sample i is tokens[offsets[i], offsets[i + 1]).
struct TokenStoreView {
  std::span<const uint32_t> tokens;          // [total]
  std::span<const uint8_t> supervised_bits;  // [ceil(total / 8)]: bit t % 8 of byte t / 8 is set
                                             // if token t is to be predicted
  std::span<const int64_t> offsets;          // [num_samples + 1], ascending from 0 to total
};

// One packed row of num_rows tokens: the samples one after another, then padding.
struct MicroBatchView {
  std::span<int64_t> tokens;        // [num_rows]; 0 on padding
  std::span<int64_t> labels;        // [num_rows]: the next token of the same sample if supervised,
                                    // else ignore_index
  std::span<int64_t> position_ids;  // [num_rows]: from 0 in each sample; 0 on padding
  std::span<int32_t> cu_seqlens;    // [num samples taken + 1]; padding comes after the last
  std::span<int64_t> active_rows;   // [num_rows]; the first num_supervised are written: the rows
                                    // with a label, ascending
};

struct MicroBatchCounts {
  int64_t num_tokens;      // without padding
  int64_t num_supervised;  // rows with a label
  int64_t max_seqlen;      // the longest sample; 0 without samples
};

// Throws std::invalid_argument, before anything is written, if the samples do not exist, are empty,
// do not fit, or the store or the buffers are inconsistent.
MicroBatchCounts fill_micro_batch(const TokenStoreView& store, std::span<const int64_t> sample_ids,
                                  int64_t ignore_index, const MicroBatchView& out);

}  // namespace sft_fast
