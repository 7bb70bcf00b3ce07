"""What a checkpoint's weights and data position depend on, and what of it has changed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import xxhash

from sft_fast.config.sections import ModelConfig
from sft_fast.data.stream import TrainingData
from sft_fast.data.tokenizer import tokenizer_digest
from sft_fast.models.architecture import Architecture
from sft_fast.packing.bins import VERSION
from sft_fast.packing.steps import StepPlan
from sft_fast.packing.streaming import StreamPlan

DATA_ORDER_FIELDS = {"data", "tokenizer", "template", "seed", "packing", "batch"}
# Of a store's fingerprint; these have fields of their own.
FIELDS_LISTED_APART = ("tokenizer", "template")


def run_fields(
    model: ModelConfig,
    seed: int,
    data: TrainingData,
    tokenizer: Any,
    plan: StepPlan | StreamPlan,
    architecture: Architecture,
    adapter: str,
) -> dict[str, str]:
    """Field -> readable value or digest; names are those of `checkpoint.allow_change`."""
    # The texts are compared with those of a checkpoint: another wording would refuse its resume.
    parts = {name: part for name, part in data.parts.items() if name not in FIELDS_LISTED_APART}
    return {
        "data": digest(parts),
        "seed": str(seed),
        "packing": f"{plan.strategy}, capacity {plan.capacity}, {plan.options} version={VERSION}",
        "batch": f"{plan.global_batch_size} rows per step",
        **model_fields(model, tokenizer, architecture, adapter),
    }


def model_fields(
    model: ModelConfig, tokenizer: Any, architecture: Architecture, adapter: str
) -> dict[str, str]:
    """Those of `run_fields` that an export depends on as well."""
    return {
        "tokenizer": tokenizer_digest(tokenizer),
        "template": digest(tokenizer.chat_template),
        "model": f"{model.dtype} {digest(own_values(architecture))}",
        "adapter": adapter or "none",
    }


def own_values(architecture: Architecture) -> dict[str, Any]:
    """Without defaults, so that an option added later does not change the digest."""
    defaults = {field.name: field.default for field in fields(architecture)}
    return {key: v for key, v in asdict(architecture).items() if v != defaults[key]}


def digest(value: Any) -> str:
    """A hash of any value that JSON can say."""
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True, default=str).encode())


def changed_fields(
    saved: Mapping[str, str],
    present: Mapping[str, str],
    allowed: Sequence[str],
    checkpoint: Path,
    fix: str = "choose another output_dir, or --allow-change {}",
) -> set[str]:
    """The fields that differ, all of them allowed to.

    Args:
        saved: field -> fingerprint, of the checkpoint.
        present: the same of this run.
        allowed: fields that may differ.
        checkpoint: named in the message.
        fix: what helps besides restoring them; {} = their names.

    Raises:
        ValueError: names each field that differs and is not in `allowed`, with both values.
    """
    changed = {name for name in present if saved.get(name) != present[name]}
    refused = sorted(changed - set(allowed))
    if refused:
        lines = [f"  {name}: was {saved.get(name)}, is {present[name]}" for name in refused]
        raise ValueError(
            f"checkpoint.resume: {checkpoint} was saved with different settings:\n"
            + "\n".join(lines)
            + f"\nrestore it, {fix.format(','.join(refused))}"
        )
    return changed
