/* Masked cross-entropy on one GPU: plain C, no torch. The maths is in kernels/README.md.

   Every function enqueues work on a stream and returns 0, or an error code of the GPU runtime that
   sft_fast_masked_ce_error explains. Pointers are device pointers, but for `options`: doubles on
   the host in the order of sft_fast_masked_ce_options. A token whose label is ignore_index is not
   read: its statistics are not written, its loss and gradient are 0. */
#ifndef SFT_FAST_MASKED_CE_H
#define SFT_FAST_MASKED_CE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum SftFastDtype { SFT_FAST_BF16 = 0, SFT_FAST_FP16 = 1, SFT_FAST_FP32 = 2 };

/* Logits [num_tokens, width], last stride 1, of which num_columns count and the rest is padding. */
struct SftFastLogits {
  const void* data;
  int64_t row_stride;    /* elements */
  const int64_t* labels; /* [num_tokens] global ids */
  int64_t num_tokens;
  int64_t width;
  int64_t num_columns;
  int64_t vocab_start_index; /* global id of column 0 */
  int64_t vocab_size;        /* columns that count, over all ranks */
  int64_t ignore_index;
  int dtype; /* SftFastDtype */
};

/* Statistics [num_parts, S, num_tokens] of every part of a vocabulary; S as below. */
struct SftFastStatistics {
  const float* statistics;
  const int64_t* labels; /* [num_tokens] global ids */
  int64_t num_parts;
  int64_t num_tokens;
  int64_t vocab_size; /* columns that count, over all ranks */
  int64_t ignore_index;
  int with_outputs; /* S counts two more numbers, and there are 4 outputs instead of 1 */
};

/* Names of the options of the loss, in their order, with spaces between them. An option of 0 is
 * off. */
const char* sft_fast_masked_ce_options(void);

/* Into how many parts a row of logits is cut; depends on the shape alone, so that all ranks agree.
 */
int64_t sft_fast_masked_ce_num_splits(int64_t num_tokens, int64_t width);

/* statistics [num_splits, S, num_tokens] fp32, where S is 3, and more by 1 if label_smoothing > 0
   and by 2 if with_outputs. */
int sft_fast_masked_ce_statistics(const struct SftFastLogits* logits, const double* options,
                                  float* statistics, int with_outputs, void* stream);

/* outputs [1 or 4, num_tokens]: loss; log probability, entropy, 1 where the label is the argmax. */
int sft_fast_masked_ce_losses(const struct SftFastStatistics* statistics, const double* options,
                              float* outputs, void* stream);

/* gradient [num_tokens, width], may be the logits; statistics [num_parts, num_statistics,
   num_tokens]; grads [2, num_tokens]: upstream gradients of loss and log probability. */
int sft_fast_masked_ce_gradient(const struct SftFastLogits* logits, const double* options,
                                void* gradient, int64_t gradient_stride, const float* statistics,
                                int64_t num_parts, int64_t num_statistics, const float* grads,
                                void* stream);

/* The longest row that sft_fast_masked_ce_one_pass takes; 0 if rows are not 16-byte aligned. */
int64_t sft_fast_masked_ce_one_pass_width(const struct SftFastLogits* logits);

/* For a vocabulary that is whole: reads each row once, writes loss [num_tokens] fp32 and puts the
   gradient of sum(weights * loss), weights [num_tokens], in place of the logits. */
int sft_fast_masked_ce_one_pass(const struct SftFastLogits* logits, const double* options,
                                float* loss, const float* weights, void* stream);

const char* sft_fast_masked_ce_error(int code);

#ifdef __cplusplus
}
#endif

#endif
