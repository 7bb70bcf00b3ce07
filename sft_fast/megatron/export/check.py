"""Whether an exported model computes what the trained one does."""

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

from sft_fast.config.sections import ExportConfig, ModelConfig
from sft_fast.constants import ceil_div, round_up
from sft_fast.megatron.forward_step import packed_samples
from sft_fast.megatron.hf import gather_shards
from sft_fast.megatron.load_inputs import ExportSource
from sft_fast.megatron.model import DTYPES, SFTModel
from sft_fast.megatron.parallel import Parallel
from sft_fast.megatron.transformer_engine import without_fp8
from sft_fast.models.architecture import Architecture
from sft_fast.models.weights import hf_shapes
from sft_fast.packing.micro_batch import fill_micro_batch

PROBE = "What is the capital of France? It is Paris, on the Seine; 2 million people live there."
MOST_PROBE_TOKENS = 32
MOST_PARAMETERS = 4 * 10**9
# Of the root mean square of the logits; rounding alone stays a factor of ten below.
TOLERANCE = {"fp32": 1e-3, "fp16": 3e-2, "bf16": 0.2}


@dataclass(frozen=True)
class ProbeStore:
    """A token store of one sample."""

    tokens: NDArray[np.uint32]
    weights: None = None

    @property
    def supervised_bits(self) -> NDArray[np.uint8]:
        """uint8 [ceil(tokens / 8)]: nothing is a target."""
        return np.zeros(ceil_div(len(self.tokens), 8), dtype=np.uint8)

    @property
    def offsets(self) -> NDArray[np.int64]:
        """int64 [2], of the one sample."""
        return np.array([0, len(self.tokens)])


def probe(origin: ExportSource) -> ProbeStore:
    """A sentence, so that no data is needed; or some ids, of a tokenizer that knows no word."""
    ids = origin.tokenizer(PROBE)["input_ids"] or [*range(origin.model.architecture.vocab_size)]
    return ProbeStore(np.array(ids[:MOST_PROBE_TOKENS], dtype=np.uint32))


def is_checked(origin: ExportSource, export: ExportConfig, parallel: Parallel) -> bool:
    """Whether `export.verify` asks for it; never where ranks share a sequence."""
    if parallel.cp_size > 1 or export.verify == "never":
        return False
    shapes = hf_shapes(origin.model.architecture).values()
    is_small = sum(int(np.prod(shape)) for shape in shapes) <= MOST_PARAMETERS
    return is_small or export.verify == "always"


def check_export(
    models: Sequence[SFTModel],
    folder: Path,
    origin: ExportSource,
    model: ModelConfig,
    export: ExportConfig,
    parallel: Parallel,
) -> None:
    """Compares the logits of a sentence; every rank calls it, the main one loads the export.

    Raises:
        ValueError: on the main rank, they differ by more than rounding.
    """
    architecture, store = origin.model.architecture, probe(origin)
    with without_fp8(models):
        logits = trained_logits(models, store, architecture, parallel)
    if not parallel.is_main:
        return
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    names = {model.dtype, export.dtype or model.dtype}
    dtype = DTYPES[export.dtype or model.dtype]
    tokens = torch.from_numpy(store.tokens.astype(np.int64))
    if architecture.num_outputs is None:
        exported = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    else:
        exported = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype)
        logits = logits[-1:]  # the class reads the last token
    with torch.no_grad():
        # [tokens, vocabulary], or [1, num_outputs]
        exported_logits = exported(tokens[None]).logits.float().view(logits.shape)
    error = float((exported_logits - logits).square().mean().sqrt() / logits.square().mean().sqrt())
    tolerance = max(TOLERANCE[name] for name in names)
    if not error <= tolerance:
        raise ValueError(
            f"export: the logits of the exported model are off by {error:.2g} of their size, more "
            f"than {tolerance}; the checkpoint is fine, export.verify=never writes it all the same"
        )


@torch.no_grad()
def trained_logits(
    models: Sequence[SFTModel], store: ProbeStore, architecture: Architecture, parallel: Parallel
) -> Tensor:
    """fp32 [tokens, vocabulary or num_outputs] of one sample, on the CPU of every rank."""
    num_tokens = len(store.tokens)
    # Sequence parallelism splits the sequence evenly.
    seq_length = round_up(num_tokens, parallel.tp_size)
    batch = fill_micro_batch(store, [0], seq_length).to(parallel.device)

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
