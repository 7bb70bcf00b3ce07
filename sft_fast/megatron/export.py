"""The trained model as a Hugging Face directory: weights, config, tokenizer, template, generation."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sft_fast.architecture import Architecture, architecture_to_hf
from sft_fast.megatron.hf import export_weights
from sft_fast.megatron.model import DTYPES, SFTModel
from sft_fast.megatron.parallel import Parallel

TORCH_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def export_model(
    model: SFTModel,
    folder: Path,
    architecture: Architecture,
    source_config: dict[str, Any] | None,
    tokenizer: Any,
    dtype: str,
    parallel: Parallel,
) -> None:
    """Writes a directory that `AutoModelForCausalLM.from_pretrained` loads; every rank calls it.

    Args:
        folder: replaced when it exists, in one rename after everything is written.
        source_config: config.json of the model that training began with, None for a new model.
        tokenizer: the transformers tokenizer of the run, chat template included.
        dtype: bf16, fp16 or fp32.
    """
    temporary = folder.with_name(f".incomplete_{folder.name}")
    if parallel.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    if parallel.dp_rank == 0:
        export_weights(model, temporary, architecture, parallel, DTYPES[dtype])
    dist.barrier()
    if parallel.is_main:
        tokenizer.save_pretrained(temporary)
        write_json(temporary / "config.json", hf_config(architecture, source_config, dtype, tokenizer))
        write_json(temporary / "generation_config.json", generation_config(tokenizer))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    dist.barrier()


def hf_config(
    architecture: Architecture, source: dict[str, Any] | None, dtype: str, tokenizer: Any
) -> dict[str, Any]:
    """The config.json: the source's own keys where there is one, with this run's dtype."""
    config = dict(source) if source is not None else architecture_to_hf(architecture)
    config.pop("torch_dtype", None)
    config["dtype"] = TORCH_NAMES[dtype]
    if source is None:
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            config[key] = getattr(tokenizer, key)
    return config


def generation_config(tokenizer: Any) -> dict[str, Any]:
    """Greedy by default; generation stops at the token that ends a turn."""
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {key: getattr(tokenizer, key) for key in keys if getattr(tokenizer, key) is not None}


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
