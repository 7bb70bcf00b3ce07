"""Whether an exported model computes what the trained one does."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from sft_fast.batch import fill_micro_batch
from sft_fast.config import Config
from sft_fast.megatron.engine import without_fp8
from sft_fast.megatron.forward_step import packed_samples
from sft_fast.megatron.hf import gather_shards, hf_shapes
from sft_fast.megatron.inputs import Inputs
from sft_fast.megatron.model import DTYPES, SFTModel
from sft_fast.megatron.parallel import Parallel

NUM_SAMPLES_SEEN = 1000
MOST_PARAMETERS = 4 * 10**9
# Of the root mean square of the logits; rounding alone stays a factor of ten below.
TOLERANCE = {"fp32": 1e-3, "fp16": 3e-2, "bf16": 0.2}


def is_checked(inputs: Inputs, config: Config, parallel: Parallel) -> bool:
    """True where `export.verify` asks for it, and the ranks do not share rows of tokens."""
    if parallel.cp_size > 1 or config.export.verify == "never":
        return False
    shapes = hf_shapes(inputs.model.architecture).values()
    is_small = sum(int(np.prod(shape)) for shape in shapes) <= MOST_PARAMETERS
    return is_small or config.export.verify == "always"


def check_export(
    models: Sequence[SFTModel], folder: Path, inputs: Inputs, config: Config, parallel: Parallel
) -> None:
    """Compares the logits of one sample; every rank calls it, the main one loads the export.

    Raises:
        ValueError: on the main rank, they differ by more than rounding.
    """
    lengths = inputs.store.lengths[:NUM_SAMPLES_SEEN]
    sample = int(np.argmin(np.where(lengths > 1, lengths, lengths.max() + 1)))
    num_tokens = int(lengths[sample])
    with without_fp8(models):
        logits = trained_logits(models, sample, num_tokens, inputs, parallel)[:num_tokens]
    if not parallel.is_main:
        return
    from transformers import AutoModelForCausalLM

    names = {config.model.dtype, config.export.dtype or config.model.dtype}
    dtype = DTYPES[config.export.dtype or config.model.dtype]
    exported = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    start = int(inputs.store.offsets[sample])
    tokens = inputs.store.tokens[start : start + num_tokens].astype(np.int64)
    with torch.no_grad():
        found = exported(torch.from_numpy(tokens)[None]).logits[0].float()
    error = float((found - logits).square().mean().sqrt() / logits.square().mean().sqrt())
    tolerance = max(TOLERANCE[name] for name in names)
    if not error <= tolerance:
        raise ValueError(
            f"export: the logits of the exported model are off by {error:.2g} of their size, more "
            f"than {tolerance}; the checkpoint is fine, export.verify=never writes it all the same"
        )


@torch.no_grad()
def trained_logits(
    models: Sequence[SFTModel], sample: int, num_tokens: int, inputs: Inputs, parallel: Parallel
) -> Tensor:
    """fp32 [rows, vocabulary] of one sample, on the CPU of every rank."""
    num_rows = -(-num_tokens // parallel.tp_size) * parallel.tp_size
    batch = fill_micro_batch(inputs.store, [sample], num_rows).to(parallel.device)

    def step(data_iterator: Iterator[Any], model: Any) -> tuple[Tensor, Any]:
        batch = next(data_iterator)
        samples = packed_samples(batch)
        output = model(batch.tokens, batch.position_ids, None, packed_seq_params=samples)
        return output, lambda logits: (logits.sum(), {"logits": logits.detach()})

    was_training = models[0].training
    for model in models:
        model.eval()
    # Interleaved stages want as many micro-batches as there are ranks.
    count = parallel.pp_size if len(models) > 1 else 1
    iterators = [iter([batch] * count) for _ in models]
    reports = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if len(models) > 1 else iterators[0],
        model=list(models),
        num_microbatches=count,
        seq_length=num_rows,
        micro_batch_size=1,
        forward_only=True,
    )
    for model in models:
        model.train(was_training)
    vocab_size = inputs.model.architecture.vocab_size
    logits = torch.empty(num_rows, vocab_size, device=parallel.device)
    if parallel.is_last_stage:
        shards = gather_shards(reports[0]["logits"][0].float(), parallel)
        logits = torch.cat(shards, dim=-1)[:, :vocab_size].contiguous()
    if parallel.pp_size > 1:
        last_rank = dist.get_global_rank(parallel.pp_group, parallel.pp_size - 1)
        dist.broadcast(logits, src=last_rank, group=parallel.pp_group)
    return logits.cpu()
