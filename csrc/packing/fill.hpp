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
  std::span<const uint16_t> weights;         // [total], bits of the fp16 factor of a token's loss;
                                             // empty: all 1
};

// How samples lie in a sequence. Each is padded to a multiple of the alignment. Under context
// parallelism a padded sample is cut into 2 * cp_size equal chunks, and a rank's share holds chunks
// cp_rank and 2 * cp_size - 1 - cp_rank of each: with causal attention all ranks do the same.
struct SequenceLayout {
  int64_t alignment;  // a multiple of 2 * cp_size where cp_size > 1
  int64_t cp_size;
  int64_t cp_rank;
};

// One sequence: the padded samples one after another, then padding; `length` tokens of one rank.
template <typename Id>
struct MicroBatchView {
  std::span<Id> tokens;              // [length]; 0 on padding
  std::span<Id> labels;              // [length]: the next token of the same sample if supervised,
                                     // else ignore_index
  std::span<Id> position_ids;        // [length]: from 0 in each padded sample; 0 after the last
  std::span<int32_t> cu_seqlens;     // [num samples taken + 1]: where they begin, over all ranks
  std::span<int64_t> active_tokens;  // [length]; the first num_supervised are written: those with
                                     // a label, ascending
  std::span<float> weights;          // [length]: the label's on tokens with a label, else 0; empty
                                     // where the store's are
};

struct MicroBatchCounts {
  int64_t num_tokens;      // of this rank, without padding
  int64_t num_supervised;  // tokens of this rank with a label
  int64_t max_seqlen;      // the longest padded sample; 0 without samples
};

// Throws std::invalid_argument, before anything is written, if the samples do not exist, are empty,
// do not fit, or the store, the layout or the buffers are inconsistent. A token that Id cannot hold
// and a target's weight that is not positive and finite are found on the way.
template <typename Id>
MicroBatchCounts fill_micro_batch(const TokenStoreView& store, std::span<const int64_t> sample_ids,
                                  int64_t ignore_index, const SequenceLayout& layout,
                                  const MicroBatchView<Id>& out);

// Counts the targets of every sample, the first token of each aside: no token before it predicts
// it. counts is [num_samples]; weights, the sum of the targets' weights, is too, or empty. Throws
// std::invalid_argument if the store is inconsistent or a target's weight is not positive.
void count_targets(const TokenStoreView& store, std::span<int32_t> counts,
                   std::span<double> weights);

}  // namespace sft_fast
