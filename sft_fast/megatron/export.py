"""The trained model as a Hugging Face directory: weights, configs, tokenizer, chat template."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sft_fast.config import Config
from sft_fast.curves import draw_curves, png
from sft_fast.manifest import staged_directory
from sft_fast.megatron.exchange import StoreExchange
from sft_fast.megatron.export_check import check_export, is_checked
from sft_fast.megatron.hf import export_weights
from sft_fast.megatron.inputs import Inputs
from sft_fast.megatron.model import DTYPES, SFTModel
from sft_fast.megatron.parallel import Parallel
from sft_fast.model_card import CURVES_FILE, model_card
from sft_fast.run_files import read_run

TORCH_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
NUM_SAMPLES_READ = 1000
EXPORT_TIMEOUT_S = 3600


def export_model(
    models: Sequence[SFTModel], folder: Path, inputs: Inputs, config: Config, parallel: Parallel
) -> None:
    """Writes a directory that `AutoModelForCausalLM.from_pretrained` loads; every rank calls it.

    `folder` is replaced when it exists, after everything is written; see manifest.py.
    """
    dtype = config.export.dtype or config.model.dtype
    exchange = StoreExchange(f"export/{folder.name}", EXPORT_TIMEOUT_S)
    with staged_directory(folder, exchange) as stage:
        export_weights(models, stage.path, inputs.model.architecture, parallel, DTYPES[dtype])
        if parallel.is_main:
            inputs.tokenizer.save_pretrained(stage.path)
            write_json(stage.path / "config.json", hf_config(inputs, dtype))
            write_json(stage.path / "generation_config.json", generation_config(inputs))
            write_card(stage.path, inputs, config, parallel.world_size)
        if is_checked(inputs, config, parallel):
            dist.barrier()  # the weights are there
            check_export(models, stage.path, inputs, config, parallel)


def write_card(folder: Path, inputs: Inputs, config: Config, world_size: int) -> None:
    """Adds README.md and, where matplotlib is there, the curves to an export of a run."""
    output = Path(config.output_dir)
    if not (output / "metrics.jsonl").is_file():
        return
    found = read_run(output)
    card = model_card(config, found, inputs.store.fingerprint, world_size)
    try:
        (folder / CURVES_FILE).write_bytes(png(draw_curves(found)))
    except ValueError:
        # Nothing was trained, or matplotlib is missing: a card without a picture.
        card = card.replace(f"![training curves]({CURVES_FILE})\n\n", "")
    (folder / "README.md").write_text(card, encoding="utf-8")


def hf_config(inputs: Inputs, dtype: str) -> dict[str, Any]:
    """The config.json: the source model's own where there is one, with the exported dtype."""
    config = dict(inputs.model.hf_config)
    config.pop("torch_dtype", None)
    config["dtype"] = TORCH_NAMES[dtype]
    if inputs.model.folder is None:
        config.update(special_token_ids(inputs.tokenizer))
    return config


def special_token_ids(tokenizer: Any) -> dict[str, int]:
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {key: getattr(tokenizer, key) for key in keys if getattr(tokenizer, key) is not None}


def generation_config(inputs: Inputs) -> dict[str, Any]:
    """The source's generation config, made to stop at the tokens that end a trained turn too."""
    generation: dict[str, Any] = special_token_ids(inputs.tokenizer)
    if inputs.model.folder is not None:
        path = inputs.model.folder / "generation_config.json"
        if path.is_file():
            generation |= json.loads(path.read_text(encoding="utf-8"))
    stops = generation.get("eos_token_id", [])
    stops = set(stops if isinstance(stops, list) else [stops]) | end_of_turn_ids(inputs)
    if stops:
        generation["eos_token_id"] = sorted(stops)
    return generation


def end_of_turn_ids(inputs: Inputs) -> set[int]:
    """The special tokens that the first samples end with."""
    special = set(inputs.tokenizer.all_special_ids) | set(inputs.tokenizer.added_tokens_decoder)
    ends = inputs.store.offsets[1 : NUM_SAMPLES_READ + 1] - 1
    return special & {int(token) for token in inputs.store.tokens[ends]}


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
