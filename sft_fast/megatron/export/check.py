"""Whether an exported model computes what the trained one does."""

from collections.abc import Sequence
from pathlib import Path

from sft_fast.config.sections import ExportConfig, ModelConfig
from sft_fast.megatron.compare import (
    TOLERANCE,
    ProbeStore,
    our_logits,
    relative_error,
    their_logits,
)
from sft_fast.megatron.load_inputs import ExportSource
from sft_fast.megatron.model import SFTModel
from sft_fast.megatron.parallel import Parallel

PROBE = "What is the capital of France? It is Paris, on the Seine; 2 million people live there."
MOST_PROBE_TOKENS = 32


def probe(origin: ExportSource) -> ProbeStore:
    """A sentence, so that no data is needed; or some ids, of a tokenizer that knows no word."""
    ids = origin.tokenizer(PROBE)["input_ids"] or [*range(origin.model.architecture.vocab_size)]
    return ProbeStore.of([ids[:MOST_PROBE_TOKENS]])


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
    dtype = export.dtype or model.dtype
    logits = our_logits(models, store, architecture, parallel)
    if not parallel.is_main:
        return
    if architecture.num_outputs is not None:
        logits = logits[-1:]  # the class reads the last token
    error = relative_error(logits, their_logits(folder, store, architecture, dtype))
    tolerance = max(TOLERANCE[model.dtype], TOLERANCE[dtype])
    if not error <= tolerance:
        raise ValueError(
            f"export: the logits of the exported model are off by {error:.2g} of their size, more "
            f"than {tolerance}; the checkpoint is fine, export.verify=never writes it all the same"
        )
