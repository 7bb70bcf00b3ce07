"""config.json and generation_config.json of an export, as transformers 4 and 5 read them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sft_fast.megatron.load_inputs import ExportSource

TORCH_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
MOVED_ROPE_KEYS = ("rope_theta", "partial_rotary_factor")  # beside the others in 5, above them in 4
PHI_KEYS = {"short_factor", "long_factor"}
PHI_OUTER_KEYS = ("type", "rope_type", "original_max_position_embeddings")


def hf_config(origin: ExportSource, dtype: str) -> dict[str, Any]:
    """The config.json: the source model's own where there is one, with the exported dtype."""
    config = with_old_keys(origin.model.hf_config)
    config["dtype"] = config["torch_dtype"] = TORCH_NAMES[dtype]
    if origin.model.folder is None:
        config.update(special_token_ids(origin.tokenizer))
    if origin.model.architecture.num_outputs is not None and config.get("pad_token_id") is None:
        # By which the class knows the last token of padded texts.
        config["pad_token_id"] = origin.tokenizer.pad_token_id
    return config


def with_old_keys(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json in which transformers 4 finds what 5 has given another key.

    4.57 takes a default for a key that it does not find, and says nothing.
    """
    return old_rope_keys(config) | old_expert_keys(config) | config


def old_rope_keys(config: dict[str, Any]) -> dict[str, Any]:
    """rope_theta, rope_scaling and their kin, as 4 spells `rope_parameters`."""
    rope: dict[str, Any] = config.get("rope_parameters") or {}
    old: dict[str, Any] = {}
    if "full_attention" in rope:
        local = rope.get("sliding_attention") or {}
        rope = rope["full_attention"] or {}
        if "rope_theta" in local:
            old["rope_local_base_freq"] = local["rope_theta"]
    if not rope:
        return old
    old |= {key: rope[key] for key in MOVED_ROPE_KEYS if key in rope}
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling = {key: value for key, value in rope.items() if key not in MOVED_ROPE_KEYS}
    original = scaling.get("original_max_position_embeddings")
    if kind == "default":
        return old | {"rope_scaling": None}
    if config.get("model_type") != "phi3":
        return old | {"rope_scaling": scaling | {"rope_type": kind}}
    # Phi 3 of 4.57 takes a kind and these keys, and no other.
    if original is not None:
        old["original_max_position_embeddings"] = original
    factors = {key: value for key, value in scaling.items() if key not in PHI_OUTER_KEYS}
    return old | ({"rope_scaling": {"type": kind} | factors} if set(factors) == PHI_KEYS else {})


def old_expert_keys(config: dict[str, Any]) -> dict[str, Any]:
    """num_experts of Qwen's mixtures."""
    if config.get("model_type") == "qwen3_moe" and "num_local_experts" in config:
        return {"num_experts": config["num_local_experts"]}
    return {}


def special_token_ids(tokenizer: Any) -> dict[str, int]:
    """The ids that a generation config names, where the tokenizer has them."""
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {key: getattr(tokenizer, key) for key in keys if getattr(tokenizer, key) is not None}


def generation_config(origin: ExportSource) -> dict[str, Any]:
    """The source's generation config, made to stop at the tokens that end a trained turn too."""
    generation: dict[str, Any] = special_token_ids(origin.tokenizer)
    if origin.model.folder is not None:
        path = origin.model.folder / "generation_config.json"
        if path.is_file():
            try:
                generation |= json.loads(path.read_text(encoding="utf-8"))
            except (TypeError, ValueError, RecursionError) as error:
                raise ValueError(f"{path}: expected a JSON object, found {error}") from None
    stops = generation.get("eos_token_id", [])
    stops = set(stops if isinstance(stops, list) else [stops]) | set(origin.data.end_ids)
    if stops:
        generation["eos_token_id"] = sorted(stops)
    return generation
