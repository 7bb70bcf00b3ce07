"""The logits of our model and of transformers', for the same samples."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from sft_fast.constants import ceil_div, round_up
from sft_fast.megatron.forward_step import packed_samples
from sft_fast.megatron.hf import gather_shards
from sft_fast.megatron.model import DTYPES, SFTModel
from sft_fast.megatron.parallel import Parallel
from sft_fast.megatron.transformer_engine import without_fp8
from sft_fast.models.architecture import Architecture
from sft_fast.models.flops import num_parameters
from sft_fast.packing.micro_batch import fill_micro_batch

MOST_PARAMETERS = 4 * 10**9
# Of the root mean square of the logits; rounding alone stays a factor of ten below.
TOLERANCE = {"fp32": 1e-3, "fp16": 3e-2, "bf16": 0.2}


@dataclass(frozen=True)
class ProbeStore:
    """A token store without targets: uint32 [total] tokens, int64 [num_samples + 1] offsets."""

    tokens: NDArray[np.uint32]
    offsets: NDArray[np.int64]
    weights: None = None

    @classmethod
    def of(cls, samples: Sequence[Sequence[int] | NDArray[np.uint32]]) -> "ProbeStore":
        """A store of these samples, [tokens] each."""
        offsets = np.cumsum([0, *map(len, samples)], dtype=np.int64)
        return cls(np.concatenate([np.asarray(ids, dtype=np.uint32) for ids in samples]), offsets)

    @property
    def supervised_bits(self) -> NDArray[np.uint8]:
        """uint8 [ceil(tokens / 8)]: nothing is a target."""
        return np.zeros(ceil_div(len(self.tokens), 8), dtype=np.uint8)

    @property
    def samples(self) -> list[Tensor]:
        """int64 [tokens] of each sample."""
        tokens = torch.from_numpy(self.tokens.astype(np.int64))
        return list(tokens.split(np.diff(self.offsets).tolist()))


def is_compared(
    verify: str, architecture: Architecture, parallel: Parallel, most: int = MOST_PARAMETERS
) -> bool:
    """Whether `verify` asks for a comparison; never where ranks share a sequence."""
    if parallel.cp_size > 1 or verify == "never":
        return False
    return verify == "always" or num_parameters(architecture) <= most


@torch.no_grad()
def our_logits(
    models: Sequence[SFTModel], store: ProbeStore, architecture: Architecture, parallel: Parallel
) -> Tensor:
    """fp32 [tokens, vocabulary or num_outputs] of one row with all samples, on every rank's CPU."""
    num_tokens = len(store.tokens)
    # Sequence parallelism splits the sequence evenly.
    seq_length = round_up(num_tokens, parallel.tp_size)
    numbers = list(range(len(store.offsets) - 1))
    batch = fill_micro_batch(store, numbers, seq_length).to(parallel.device)

    def step(data_iterator: Iterator[Any], model: Any) -> tuple[Tensor, Any]:
        """megatron's forward step: on the last stage logits [1, seq_length, vocabulary / tp], or
        outputs [1, seq_length, num_outputs]."""
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
    with without_fp8(models):
        reports = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iterators if len(models) > 1 else iterators[0],
            model=list(models),
            num_microbatches=count,
            seq_length=seq_length,
            micro_batch_size=1,
            forward_only=True,
        )
    for model in models:
        model.train(was_training)
    width = architecture.num_outputs or architecture.vocab_size
    logits = torch.empty(seq_length, width, device=parallel.device)
    if parallel.is_last_stage:
        own = reports[0]["logits"][0].float()
        shards = [own] if architecture.num_outputs else gather_shards(own, parallel)
        logits = torch.cat(shards, dim=-1)[:, :width].contiguous()
    if parallel.pp_size > 1:
        last_rank = dist.get_global_rank(parallel.pp_group, parallel.pp_size - 1)
        dist.broadcast(logits, src=last_rank, group=parallel.pp_group)
    return logits[:num_tokens].cpu()


@torch.no_grad()
def their_logits(folder: Path, store: ProbeStore, architecture: Architecture, dtype: str) -> Tensor:
    """What transformers computes of one sample at a time, on the CPU.

    Args:
        folder: of the model.
        store: the samples.
        architecture: of the model.
        dtype: as `model.dtype`.

    Returns: fp32 [tokens, vocabulary], or of a stage's head [samples, num_outputs].
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    has_head = architecture.num_outputs is not None
    kind = AutoModelForSequenceClassification if has_head else AutoModelForCausalLM
    # Not every other implementation has soft caps.
    options = {"dtype": DTYPES[dtype], "attn_implementation": "eager", "trust_remote_code": False}
    model = kind.from_pretrained(folder, **options).eval()
    # Packed, some families of transformers let a sample see the one before it.
    logits = [model(ids[None], use_cache=False).logits for ids in store.samples]
    return torch.cat([own if has_head else own[0] for own in logits]).float()


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Root mean square of the difference of logits [tokens, vocabulary], by that of ours."""
    return float((theirs - ours).square().mean().sqrt() / ours.square().mean().sqrt())


def mean_loss(logits: Tensor, store: ProbeStore) -> float:
    """Mean cross entropy in nats of every token but the first of each sample.

    Args:
        logits: fp32 [tokens, vocabulary].
        store: has the tokens.
    """
    samples = store.samples
    parts = logits.split([len(ids) for ids in samples])
    losses = [
        functional.cross_entropy(own[:-1], ids[1:], reduction="none")
        for own, ids in zip(parts, samples, strict=True)
    ]
    return float(torch.cat(losses).mean())
