/* Masked cross-entropy on one GPU: plain C, no torch. The maths is in kernels/README.md.

   Every function enqueues work on a stream and returns 0, or an error code of the GPU runtime that
   sft_fast_masked_ce_error explains. Pointers are device pointers. A row whose label is
   ignore_index is not read: its statistics are not written, its loss and gradient are 0. */
#ifndef SFT_FAST_MASKED_CE_H
#define SFT_FAST_MASKED_CE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum SftFastDtype { SFT_FAST_BF16 = 0, SFT_FAST_FP16 = 1, SFT_FAST_FP32 = 2 };

/* Logits [num_rows, width], last stride 1, of which num_columns count and the rest is padding. */
struct SftFastLogits {
  const void* data;
  int64_t row_stride;    /* elements */
  const int64_t* labels; /* [num_rows] global ids */
  int64_t num_rows;
  int64_t width;
  int64_t num_columns;
  int64_t vocab_start_index; /* global id of column 0 */
  int64_t ignore_index;
  float softcap; /* 0: none */
  int dtype;     /* SftFastDtype */
};

struct SftFastLossOptions {
  float label_smoothing;
  float uniform; /* label_smoothing / columns of the whole vocabulary */
  float z_loss;
};

/* Statistics [num_parts, S, num_rows] of every part of a vocabulary, where S counts the sum of the
   logits if label_smoothing > 0. */
struct SftFastStatistics {
  const float* statistics;
  const int64_t* labels; /* [num_rows] global ids */
  int64_t num_parts;
  int64_t num_rows;
  int64_t vocab_size; /* columns that count, over all ranks */
  int64_t ignore_index;
  int with_outputs; /* S counts two more numbers, and there are 4 outputs instead of 1 */
};

/* Into how many parts a row is cut; depends on the shape alone, so that all ranks agree. */
int64_t sft_fast_masked_ce_num_splits(int64_t num_rows, int64_t width);

/* statistics [num_splits, 3 + with_logit_sum + 2 * with_outputs, num_rows] fp32. */
int sft_fast_masked_ce_statistics(const struct SftFastLogits* logits, float* statistics,
                                  int with_logit_sum, int with_outputs, void* stream);

/* outputs [1 or 4, num_rows]: loss; log probability, entropy, 1 where the label is the argmax. */
int sft_fast_masked_ce_losses(const struct SftFastStatistics* statistics, float* outputs,
                              const struct SftFastLossOptions* options, void* stream);

/* gradient [num_rows, width], may be the logits; statistics [num_parts, num_statistics, num_rows];
   grads [2, num_rows]: upstream gradients of loss and log probability. */
int sft_fast_masked_ce_gradient(const struct SftFastLogits* logits, void* gradient,
                                int64_t gradient_stride, const float* statistics, int64_t num_parts,
                                int64_t num_statistics, const float* grads,
                                const struct SftFastLossOptions* options, void* stream);

/* The longest row that sft_fast_masked_ce_one_pass takes; 0 if rows are not 16-byte aligned. */
int64_t sft_fast_masked_ce_one_pass_width(const struct SftFastLogits* logits);

/* For a vocabulary that is whole: reads each row once, writes loss [num_rows] fp32 and puts the
   gradient of sum(weights * loss), weights [num_rows], in place of the logits. */
int sft_fast_masked_ce_one_pass(const struct SftFastLogits* logits, float* loss,
                                const float* weights, const struct SftFastLossOptions* options,
                                void* stream);

const char* sft_fast_masked_ce_error(int code);

#ifdef __cplusplus
}
#endif

#endif
