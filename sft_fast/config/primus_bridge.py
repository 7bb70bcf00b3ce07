"""Primus files for Megatron-Bridge (`framework: megatron_bridge`) in the native trainer's names.

There a recipe of Bridge holds what the file does not say. Here the file says it, or a message names
what to add; weights and data of the presets are known by name.
"""

from typing import Any

from sft_fast.config.primus_translation import Translation
from sft_fast.errors import show

FRAMEWORK = "megatron_bridge"
TOP_KEYS = ("peft", "model")
"""Mappings beside `modules`: sizes of adapters, and arguments of the model."""
RENAMED = {
    "finetune_lr": "lr",
    "packed_sequence": "enable_packed_sequences",
    "dataset_name": "sft_dataset_name",
}
WITHOUT_EFFECT = ("comm_overlap_config", "pipeline_dtype")
PRECISIONS = {"bf16_mixed": "bf16", "fp16_mixed": "fp16"}
PACKED = ("dataset_type", "packed_train_data_path", "packed_val_data_path", "packed_metadata_path")
ADAPTERS = ("peft", "peft_dim", "peft_alpha")
KEYS = (*RENAMED, *WITHOUT_EFFECT, *PACKED, *ADAPTERS, "precision_config")
NEEDED = (
    *("train_iters", "global_batch_size", "micro_batch_size", "seq_length", "lr"),
    "lr_warmup_iters",
)
MODELS = {
    "llama3_8b": "NousResearch/Meta-Llama-3-8B",
    "llama31_70b": "meta-llama/Meta-Llama-3.1-70B",
    "qwen3_8b": "Qwen/Qwen3-8B",
    "qwen3_32b": "Qwen/Qwen3-32B",
    "qwen3_30b_a3b": "Qwen/Qwen3-30B-A3B",
}
"""Weights of the presets whose recipe is a model and this data."""
DATA = "rajpurkar/squad"


def as_native(file: Translation, module: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The arguments under the names of the native trainer; their lines go with them.

    Args:
        file: where problems and notes go; its `base` is that of the arguments.
        module: the file's module.
        given: the arguments as Bridge calls them.
    """
    native = {name: value for name, value in given.items() if name not in KEYS}
    for theirs, ours in RENAMED.items():
        if theirs in given:
            native[ours] = given[theirs]
            _same_line(file, theirs, ours)
    read = [f"{theirs} as {ours}" for theirs, ours in RENAMED.items() if theirs in given]
    if read:
        file.note(f"of Megatron-Bridge, read by the native names: {', '.join(read)}")
    unused = [name for name in WITHOUT_EFFECT if given.get(name) is not None]
    if unused:
        file.note(f"no effect on the weights, not used: {', '.join(unused)}")
    _read_precision(file, given, native)
    _read_adapters(file, given, native)
    _refuse_packed(file, given)
    more = file.document.data.get("model")
    if isinstance(more, dict):
        native |= more
    _add_preset(file, module, native)
    for name in NEEDED:
        if native.get(name) is None:
            theirs = "finetune_lr" if name == "lr" else name
            expected = "in the file: Megatron-Bridge's recipe, which is not read, holds it"
            file.problem((*file.base, theirs), "nothing", expected, f"add {theirs}")
    # A conversation is what its columns say; no recipe has Primus' prompts.
    native.setdefault("sft_conversation_format", "hf_chat")
    others = [name for name in ("weight_decay", "adam_beta2") if name not in native]
    if others:
        values = ", ".join(f"{name} {file.defaults[name]}" for name in others)
        file.note(f"not in the file, and of the recipe in Megatron-Bridge; here {values}")
    return native


def _same_line(file: Translation, theirs: str, ours: str) -> None:
    line = file.document.lines.get((*file.base, theirs))
    if line is not None:
        file.document.lines[(*file.base, ours)] = line


def _read_precision(file: Translation, given: dict[str, Any], native: dict[str, Any]) -> None:
    precision = given.get("precision_config")
    if precision is None:
        return
    if precision not in PRECISIONS:
        expected = " or ".join(PRECISIONS)
        file.problem((*file.base, "precision_config"), show(precision), expected)
        return
    native["bf16"], native["fp16"] = precision == "bf16_mixed", precision == "fp16_mixed"
    _same_line(file, "precision_config", PRECISIONS[precision])


def _read_adapters(file: Translation, given: dict[str, Any], native: dict[str, Any]) -> None:
    kind, sizes = given.get("peft"), file.document.data.get("peft") or {}
    if kind not in (None, "none", "lora"):
        file.problem((*file.base, "peft"), show(kind), "lora or none")
        return
    if not isinstance(sizes, dict) or sizes.keys() - {"dim", "alpha"}:
        file.problem(("peft",), show(sizes), "a mapping with dim and alpha")
        return
    dim, alpha = (given.get(f"peft_{name}", sizes.get(name)) for name in ("dim", "alpha"))
    if kind != "lora":
        if dim is not None or alpha is not None:
            file.note("peft is not lora, so the sizes of adapters have no effect")
        return
    if dim is None or alpha is None:
        expected = "with peft_dim and peft_alpha: Megatron-Bridge's recipe, which is not read, "
        expected += "holds them"
        file.problem((*file.base, "peft"), "lora", expected, "add peft_dim and peft_alpha")
        return
    native["lora"] = {"enabled": True, "dim": dim, "alpha": alpha}
    _same_line(file, "peft", "lora")


def _refuse_packed(file: Translation, given: dict[str, Any]) -> None:
    packed = [name for name in PACKED if given.get(name) is not None]
    if packed:
        found = f"{show(given[packed[0]])}, of data that is packed and tokenised already"
        expected = "the records themselves: they are tokenised and packed here"
        fix = f"remove {', '.join(packed)}; dataset_name: <file or hub id>"
        file.problem((*file.base, packed[0]), found, expected, fix)


def _add_preset(file: Translation, module: dict[str, Any], native: dict[str, Any]) -> None:
    name = str(module.get("model", "")).removesuffix(".yaml")
    hub_id = MODELS.get(name)
    for key, value in (("hf_path", hub_id), ("sft_dataset_name", DATA if hub_id else None)):
        if native.get(key) is None and value is not None:
            native[key] = value
            file.note(f"model: {name} says {key} {value}")
            file.document.lines[(*file.base, key)] = file.document.lines.get(
                (*file.module, "model"), 1
            )
    if native.get("hf_path") is None:
        expected = "hf_path: the weights are those that Megatron-Bridge's recipe names"
        file.problem((*file.module, "model"), show(module.get("model")), expected, "add hf_path")
        native["hf_path"] = name or "hf_path"
