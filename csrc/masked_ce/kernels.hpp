// The kernels of the masked cross-entropy; kernels/README.md has the maths.
#pragma once

#include "masked_ce/elements.hpp"
#include "masked_ce/masked_ce.h"
#include "masked_ce/platform.hpp"

namespace sft_fast {

constexpr int kThreads = 512;
constexpr int kLossThreads = 128;
constexpr int kOnePassThreads = 1024;
constexpr int kPacksInFlight = 4;
constexpr float kLog2e = 1.4426950408889634f;
// In place of -inf as a maximum: subtracting it from -inf does not give NaN.
constexpr float kLowest = -3.4028234663852886e38f;
constexpr float kMinusInfinity = -__builtin_huge_valf();

// The options of the loss, in the order in which sft_fast_masked_ce_options names them.
struct LossOptions {
  float label_smoothing;
  float uniform;  // label_smoothing / columns of the whole vocabulary
  float z_loss;
  float softcap;  // 0: none
};

constexpr const char* kOptionNames = "label_smoothing z_loss logit_softcap";

inline LossOptions make_options(const double* values, int64_t vocab_size) {
  const double uniform = values[0] / static_cast<double>(vocab_size);
  return {static_cast<float>(values[0]), static_cast<float>(uniform), static_cast<float>(values[1]),
          static_cast<float>(values[2])};
}

// Which launches need kernels of kFull.
inline bool is_full_read(const LossOptions& options, bool with_outputs) {
  return options.label_smoothing > 0.0f || options.softcap > 0.0f || with_outputs;
}

inline bool is_full_gradient(const LossOptions& options) { return options.softcap > 0.0f; }

__device__ inline float exp_fast(float value) { return exp2_fast(value * kLog2e); }

// 16 bytes of logits where rows are aligned, else a single one.
template <int kDtype, bool kAligned>
struct Pack {
  static constexpr int kSize = !kAligned ? 1 : kDtype == SFT_FAST_FP32 ? 4 : 8;
  using Bits = typename ConditionalBits<kDtype == SFT_FAST_FP32>::Type;
  using Raw = typename ConditionalRaw<kAligned, Bits>::Type;

  __device__ static void decode(const Raw& raw, float (&values)[kSize]) {
    Bits bits[kSize];
    __builtin_memcpy(bits, &raw, sizeof(raw));
    SFT_FAST_UNROLL
    for (int i = 0; i < kSize; ++i) values[i] = to_float<kDtype>(bits[i]);
  }

  __device__ static Raw encode(const float (&values)[kSize]) {
    Raw raw;
    if constexpr (kAligned && kDtype != SFT_FAST_FP32) {
      uint32_t words[kSize / 2];
      SFT_FAST_UNROLL
      for (int i = 0; i < kSize / 2; ++i) {
        words[i] = from_pair<kDtype>(values[2 * i], values[2 * i + 1]);
      }
      __builtin_memcpy(&raw, words, sizeof(raw));
    } else {
      Bits bits[kSize];
      SFT_FAST_UNROLL
      for (int i = 0; i < kSize; ++i) bits[i] = static_cast<Bits>(from_float<kDtype>(values[i]));
      __builtin_memcpy(&raw, bits, sizeof(raw));
    }
    return raw;
  }
};

// Calls use(raw, first column) for packs first, first + step, ...; loads several before it uses
// the first, because a store that follows may not be moved behind a load.
template <typename P, typename Raw, typename Use>
__device__ inline void for_each_pack(const Raw* packs, int first, int step, int num_packs,
                                     Use use) {
  int pack = first;
  for (; pack < num_packs - (kPacksInFlight - 1) * step; pack += kPacksInFlight * step) {
    Raw raw[kPacksInFlight];
    SFT_FAST_UNROLL
    for (int i = 0; i < kPacksInFlight; ++i) raw[i] = packs[pack + i * step];
    SFT_FAST_UNROLL
    for (int i = 0; i < kPacksInFlight; ++i) use(raw[i], pack + i * step);
  }
  for (; pack < num_packs; pack += step) use(packs[pack], pack);
}

// softcap * tanh(value / softcap), from an exponential that cannot overflow.
__device__ inline float cap(float value, float softcap) {
  const float small = exp_fast(-2.0f / softcap * __builtin_fabsf(value));
  return __builtin_copysignf(softcap * ((1.0f - small) / (1.0f + small)), value);
}

// What has been read of a row so far.
struct RowState {
  float max = kLowest;
  float sum = 0.0f;       // of exp(logit - max)
  float logits = 0.0f;    // sum
  float weighted = 0.0f;  // sum of exp(logit - max) * (logit - max)
  float argmax = 0.0f;
};

// kFull: collects more than max and sum, and caps logits if asked to. kWhole: all columns count.
template <bool kFull, bool kWhole, int kSize>
__device__ inline void add_columns(RowState& state, float (&values)[kSize], int first,
                                   const SftFastLogits& logits, const LossOptions& options) {
  SFT_FAST_UNROLL
  for (int i = 0; i < kSize; ++i) {
    const bool counts = kWhole || first + i < logits.num_columns;
    if (kFull && options.softcap > 0.0f) values[i] = cap(values[i], options.softcap);
    if (kFull && counts) state.logits += values[i];
    if (!counts) values[i] = kMinusInfinity;
  }
  float max = state.max;
  SFT_FAST_UNROLL
  for (int i = 0; i < kSize; ++i) {
    const auto id = static_cast<float>(logits.vocab_start_index + first + i);
    if (kFull) state.argmax = values[i] > max ? id : state.argmax;
    max = __builtin_fmaxf(max, values[i]);
  }
  const float distance = state.max - max;
  const float ratio = exp_fast(distance);
  if (kFull) state.weighted = (state.weighted + state.sum * distance) * ratio;
  state.sum *= ratio;
  state.max = max;
  SFT_FAST_UNROLL
  for (int i = 0; i < kSize; ++i) {
    const float exponential = exp_fast(values[i] - max);
    state.sum += exponential;
    // Clamped, because exp(-inf) * -inf is NaN where it should add nothing.
    if (kFull) state.weighted += exponential * __builtin_fmaxf(values[i] - max, kLowest);
  }
}

template <bool kFull, int kSize>
__device__ inline void add(RowState& state, float (&values)[kSize], int first,
                           const SftFastLogits& logits, const LossOptions& options) {
  if (first + kSize <= logits.num_columns) {
    add_columns<kFull, true>(state, values, first, logits, options);
  } else {
    add_columns<kFull, false>(state, values, first, logits, options);
  }
}

template <bool kFull>
__device__ inline RowState merge(RowState a, RowState b) {
  RowState both;
  both.max = __builtin_fmaxf(a.max, b.max);
  const float a_ratio = exp_fast(a.max - both.max), b_ratio = exp_fast(b.max - both.max);
  both.sum = a.sum * a_ratio + b.sum * b_ratio;
  if (kFull) {
    both.logits = a.logits + b.logits;
    both.weighted = (a.weighted + a.sum * (a.max - both.max)) * a_ratio +
                    (b.weighted + b.sum * (b.max - both.max)) * b_ratio;
    const bool take_a = a.max > b.max || (a.max == b.max && a.argmax < b.argmax);
    both.argmax = take_a ? a.argmax : b.argmax;
  }
  return both;
}

// Field by field: a compiler may put whole structs into memory to choose between them.
__device__ inline RowState choose(bool first, RowState a, RowState b) {
  return {first ? a.max : b.max, first ? a.sum : b.sum, first ? a.logits : b.logits,
          first ? a.weighted : b.weighted, first ? a.argmax : b.argmax};
}

// Merges groups of kWidth neighbouring threads; all of them get the same bits.
template <bool kFull, int kWidth>
__device__ inline RowState merge_threads(RowState state) {
  SFT_FAST_UNROLL
  for (int mask = kWidth / 2; mask > 0; mask /= 2) {
    RowState other;
    other.max = shuffle_xor(state.max, mask);
    other.sum = shuffle_xor(state.sum, mask);
    if (kFull) {
      other.logits = shuffle_xor(state.logits, mask);
      other.weighted = shuffle_xor(state.weighted, mask);
      other.argmax = shuffle_xor(state.argmax, mask);
    }
    const bool is_upper = (thread_x() & static_cast<unsigned>(mask)) != 0;
    state = merge<kFull>(choose(is_upper, other, state), choose(is_upper, state, other));
  }
  return state;
}

template <bool kFull, int kBlockThreads>
__device__ inline RowState merge_block(RowState state) {
  constexpr int kWaves = kBlockThreads / kWaveSize;
  static_assert(kWaves <= kWaveSize);
  __shared__ float waves[5][kWaves];
  state = merge_threads<kFull, kWaveSize>(state);
  const unsigned wave = thread_x() / kWaveSize, lane = thread_x() % kWaveSize;
  if (lane == 0) {
    waves[0][wave] = state.max;
    waves[1][wave] = state.sum;
    waves[2][wave] = state.logits;
    waves[3][wave] = state.weighted;
    waves[4][wave] = state.argmax;
  }
  __syncthreads();
  const unsigned source = lane % kWaves;
  state = {waves[0][source], waves[1][source], waves[2][source], waves[3][source],
           waves[4][source]};
  return merge_threads<kFull, kWaves>(state);
}

// A label's column in this shard, or -1.
__device__ inline int target_column(const SftFastLogits& logits, int64_t label) {
  const int64_t target = label - logits.vocab_start_index;
  return target >= 0 && target < logits.num_columns ? static_cast<int>(target) : -1;
}

// The logit at the label, 0 where another shard holds it.
template <int kDtype, bool kFull>
__device__ inline float target_logit(const SftFastLogits& logits, const LossOptions& options,
                                     int64_t token, int target) {
  if (target < 0) return 0.0f;
  using Bits = typename Pack<kDtype, false>::Bits;
  const Bits bits = static_cast<const Bits*>(logits.data)[token * logits.row_stride + target];
  const float value = to_float<kDtype>(bits);
  return kFull && options.softcap > 0.0f ? cap(value, options.softcap) : value;
}

template <int kDtype, bool kAligned>
__device__ inline const typename Pack<kDtype, kAligned>::Raw* row_packs(const SftFastLogits& logits,
                                                                        int64_t token) {
  using P = Pack<kDtype, kAligned>;
  const auto* bits = static_cast<const typename P::Bits*>(logits.data) + token * logits.row_stride;
  return reinterpret_cast<const typename P::Raw*>(bits);
}

template <int kDtype, bool kAligned, bool kFull>
__global__ void __launch_bounds__(kThreads)
    statistics_kernel(SftFastLogits logits, LossOptions options, float* statistics, int num_splits,
                      bool with_outputs) {
  using P = Pack<kDtype, kAligned>;
  const int64_t token = block_x(), split = block_y();
  const int64_t label = logits.labels[token];
  if (label == logits.ignore_index) return;
  const auto* packs = row_packs<kDtype, kAligned>(logits, token);
  const int num_packs = static_cast<int>(logits.width / P::kSize);
  RowState state;
  const int first_pack = static_cast<int>(split) * kThreads + static_cast<int>(thread_x());
  const auto read = [&](const typename P::Raw& raw, int pack) {
    float values[P::kSize];
    P::decode(raw, values);
    add<kFull>(state, values, pack * P::kSize, logits, options);
  };
  for_each_pack<P>(packs, first_pack, num_splits * kThreads, num_packs, read);
  state = merge_block<kFull, kThreads>(state);
  if (thread_x() != 0) return;
  const bool with_logit_sum = options.label_smoothing > 0.0f;
  const int64_t num_statistics = 3 + with_logit_sum + 2 * with_outputs;
  float* out = statistics + split * num_statistics * logits.num_tokens + token;
  const int target = split == 0 ? target_column(logits, label) : -1;
  out[0] = state.max;
  out[logits.num_tokens] = state.sum;
  out[2 * logits.num_tokens] = target_logit<kDtype, kFull>(logits, options, token, target);
  if (with_logit_sum) out[3 * logits.num_tokens] = state.logits;
  if (with_outputs) {
    out[(num_statistics - 2) * logits.num_tokens] = state.weighted;
    out[(num_statistics - 1) * logits.num_tokens] = state.argmax;
  }
}

// The gradient of a row is scale * exp(logit - max) - uniform, plus `at_target` at the label.
struct RowGradient {
  float max, scale, uniform, at_target;
};

__device__ inline RowGradient row_gradient(const RowState& state, float grad_loss,
                                           float grad_logprob, const LossOptions& options) {
  const float lse = state.max + log_fast(state.sum);
  // z_loss 0 must not turn an infinite lse into NaN.
  const float z_factor = options.z_loss > 0.0f ? 1.0f + 2.0f * options.z_loss * lse : 1.0f;
  return {state.max, (grad_loss * z_factor - grad_logprob) / state.sum, grad_loss * options.uniform,
          grad_logprob - (1.0f - options.label_smoothing) * grad_loss};
}

template <bool kFull, bool kWhole, int kSize>
__device__ inline void differentiate_columns(float (&values)[kSize], int first, int target,
                                             const RowGradient& row, const SftFastLogits& logits,
                                             const LossOptions& options) {
  SFT_FAST_UNROLL
  for (int i = 0; i < kSize; ++i) {
    float value = values[i];
    if (kFull && options.softcap > 0.0f) value = cap(value, options.softcap);
    float gradient = exp_fast(value - row.max) * row.scale - row.uniform;
    // Before the rounding to 16 bits: after it, probability - 1 would be mostly rounding error.
    if (first + i == target) gradient += row.at_target;
    if (kFull && options.softcap > 0.0f) {
      gradient *= 1.0f - (value / options.softcap) * (value / options.softcap);
    }
    values[i] = kWhole || first + i < logits.num_columns ? gradient : 0.0f;
  }
}

template <bool kFull, int kSize>
__device__ inline void differentiate(float (&values)[kSize], int first, int target,
                                     const RowGradient& row, const SftFastLogits& logits,
                                     const LossOptions& options) {
  if (first + kSize <= logits.num_columns) {
    differentiate_columns<kFull, true>(values, first, target, row, logits, options);
  } else {
    differentiate_columns<kFull, false>(values, first, target, row, logits, options);
  }
}

template <int kDtype, bool kAligned, bool kFull>
__global__ void __launch_bounds__(kThreads)
    gradient_kernel(SftFastLogits logits, void* gradient, int64_t gradient_stride,
                    const float* statistics, int num_parts, int64_t num_statistics,
                    const float* grads, LossOptions options, int num_splits) {
  using P = Pack<kDtype, kAligned>;
  const int64_t token = block_x();
  SftFastLogits output = logits;
  output.data = gradient;
  output.row_stride = gradient_stride;
  const auto* packs = row_packs<kDtype, kAligned>(logits, token);
  auto* out = const_cast<typename P::Raw*>(row_packs<kDtype, kAligned>(output, token));
  const int num_packs = static_cast<int>(logits.width / P::kSize);
  const int first_pack = static_cast<int>(block_y() * kThreads + thread_x());
  const int step = num_splits * kThreads;
  const int64_t label = logits.labels[token];
  if (label == logits.ignore_index) {
    for (int pack = first_pack; pack < num_packs; pack += step) out[pack] = typename P::Raw{};
    return;
  }
  RowState state;
  for (int part = thread_x() % kWaveSize; part < num_parts; part += kWaveSize) {
    const float* source = statistics + part * num_statistics * logits.num_tokens + token;
    state = merge<false>(state, {source[0], source[logits.num_tokens], 0.0f, 0.0f, 0.0f});
  }
  state = merge_threads<false, kWaveSize>(state);
  const RowGradient row_grad =
      row_gradient(state, grads[token], grads[logits.num_tokens + token], options);
  const int target = target_column(logits, label);
  const auto write = [&](const typename P::Raw& raw, int pack) {
    float values[P::kSize];
    P::decode(raw, values);
    differentiate<kFull>(values, pack * P::kSize, target, row_grad, logits, options);
    out[pack] = P::encode(values);
  };
  for_each_pack<P>(packs, first_pack, step, num_packs, write);
}

__device__ inline float row_loss(const RowState& state, float target_logit, float columns,
                                 const LossOptions& options) {
  const float log_sum = log_fast(state.sum);
  float loss = log_sum - (target_logit - state.max);
  if (options.label_smoothing > 0.0f) {
    const float mean_loss = log_sum - (state.logits / columns - state.max);
    loss = (1.0f - options.label_smoothing) * loss + options.label_smoothing * mean_loss;
  }
  if (options.z_loss > 0.0f) {
    const float lse = state.max + log_sum;
    loss += options.z_loss * lse * lse;
  }
  return loss;
}

// A thread joins the parts of a token; its neighbours read the next tokens' numbers.
__global__ void __launch_bounds__(kLossThreads)
    losses_kernel(SftFastStatistics parts, float* outputs, LossOptions options) {
  const int64_t num_tokens = parts.num_tokens;
  const int64_t token = block_x() * kLossThreads + thread_x();
  if (token >= num_tokens) return;
  const int64_t label = parts.labels[token];
  const int num_outputs = parts.with_outputs ? 4 : 1;
  if (label == parts.ignore_index) {
    for (int i = 0; i < num_outputs; ++i) outputs[i * num_tokens + token] = 0.0f;
    return;
  }
  const bool has_logit_sum = options.label_smoothing > 0.0f;
  const int64_t part_size = (3 + has_logit_sum + 2 * (parts.with_outputs != 0)) * num_tokens;
  const auto load = [&](int64_t part, float& target_logit) {
    const float* source = parts.statistics + part * part_size + token;
    RowState state{source[0], source[num_tokens], 0.0f, 0.0f, 0.0f};
    target_logit += source[2 * num_tokens];
    source += 3 * num_tokens;
    if (has_logit_sum) state.logits = source[0], source += num_tokens;
    if (parts.with_outputs) state.weighted = source[0], state.argmax = source[num_tokens];
    return state;
  };
  float target_logit = 0.0f;
  RowState state = load(0, target_logit);
  for (int64_t part = 1; part < parts.num_parts; ++part) {
    state = merge<true>(state, load(part, target_logit));
  }
  const bool is_known = label >= 0 && label < parts.vocab_size;
  if (!is_known) target_logit = __builtin_nanf("");
  outputs[token] = row_loss(state, target_logit, static_cast<float>(parts.vocab_size), options);
  if (!parts.with_outputs) return;
  const float log_sum = log_fast(state.sum);
  outputs[num_tokens + token] = (target_logit - state.max) - log_sum;
  outputs[2 * num_tokens + token] = log_sum - state.weighted / state.sum;
  outputs[3 * num_tokens + token] = state.argmax == static_cast<float>(label) ? 1.0f : 0.0f;
}

// The row stays on chip between its one read and its one write: its first packs in registers, the
// rest in shared memory.
template <int kDtype, bool kFull>
__global__ void __launch_bounds__(kOnePassThreads)
    one_pass_kernel(SftFastLogits logits, float* loss, const float* weights, LossOptions options) {
  using P = Pack<kDtype, true>;
  constexpr int kInRegisters = kRegisterPacks * kOnePassThreads;
  const int64_t token = block_x();
  const int64_t label = logits.labels[token];
  const auto* packs = row_packs<kDtype, true>(logits, token);
  auto* out = const_cast<uint4*>(packs);
  const int num_packs = static_cast<int>(logits.width / P::kSize);
  const int thread = static_cast<int>(thread_x());
  if (label == logits.ignore_index) {
    for (int pack = thread; pack < num_packs; pack += kOnePassThreads) out[pack] = uint4{};
    if (thread == 0) loss[token] = 0.0f;
    return;
  }
  uint4 kept[kRegisterPacks];
  uint4* shared = dynamic_shared();
  SFT_FAST_UNROLL
  for (int i = 0; i < kRegisterPacks; ++i) {
    const int pack = i * kOnePassThreads + thread;
    kept[i] = pack < num_packs ? packs[pack] : uint4{};
  }
  for (int pack = kInRegisters + thread; pack < num_packs; pack += kOnePassThreads) {
    shared[pack - kInRegisters] = packs[pack];
  }
  // Read by everybody before the barrier that comes before the first write.
  const int target = target_column(logits, label);
  const float at_target = target_logit<kDtype, kFull>(logits, options, token, target);

  RowState state;
  const auto read = [&](const uint4& raw, int pack) {
    float values[P::kSize];
    P::decode(raw, values);
    add<kFull>(state, values, pack * P::kSize, logits, options);
  };
  SFT_FAST_UNROLL
  for (int i = 0; i < kRegisterPacks; ++i) {
    const int pack = i * kOnePassThreads + thread;
    if (pack < num_packs) read(kept[i], pack);
    keep_order();
  }
  for (int pack = kInRegisters + thread; pack < num_packs; pack += kOnePassThreads) {
    read(shared[pack - kInRegisters], pack);
  }
  SFT_FAST_UNROLL
  for (int i = 0; i < kRegisterPacks; ++i) {
    forget(kept[i].x), forget(kept[i].y), forget(kept[i].z), forget(kept[i].w);
  }
  state = merge_block<kFull, kOnePassThreads>(state);

  if (thread == 0) {
    const float columns = static_cast<float>(logits.num_columns);
    loss[token] = target >= 0 ? row_loss(state, at_target, columns, options) : __builtin_nanf("");
  }
  const RowGradient row_grad = row_gradient(state, weights[token], 0.0f, options);
  const auto write = [&](const uint4& raw, int pack) {
    float values[P::kSize];
    P::decode(raw, values);
    differentiate<kFull>(values, pack * P::kSize, target, row_grad, logits, options);
    out[pack] = P::encode(values);
  };
  SFT_FAST_UNROLL
  for (int i = 0; i < kRegisterPacks; ++i) {
    const int pack = i * kOnePassThreads + thread;
    if (pack < num_packs) write(kept[i], pack);
    keep_order();
  }
  for (int pack = kInRegisters + thread; pack < num_packs; pack += kOnePassThreads) {
    write(shared[pack - kInRegisters], pack);
  }
}

}  // namespace sft_fast
