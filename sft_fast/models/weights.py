"""Whether the weights of a model directory are those that its config.json describes, and trained.

Nothing here imports torch, so `check` says of weights what the trainer says.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft_fast.models.architecture import Architecture
from sft_fast.models.families import HEAD, MODEL, OUTPUT_HEAD, Rule
from sft_fast.models.weight_files import TensorRecord, shorten, tensor_records

EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
NUMPY_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""Types of weights that can be trained as they are."""
OTHER_TYPES = ("BOOL", "I64")  # of masks and counts, which are no weights
SCALES = (
    *("weight_scale", "weight_scale_inv", "input_scale", "weight_packed", "weight_shape"),
    *("qweight", "qzeros", "scales", "g_idx", "SCB", "absmax", "quant_map"),
)
"""Last parts of the names of tensors that stand beside quantised weights."""
COMPARED_BYTES = 16 << 20
PROBED_ROWS = 256


def check_weights(folder: Path, config: dict[str, Any], architecture: Architecture) -> None:
    """Looks at the weights of a directory that a run is to start from.

    Args:
        folder: the directory.
        config: its config.json.
        architecture: what that describes.

    Raises:
        ValueError: they are quantised, not those of config.json, or not trained; or there are two
            LM heads.
        DamageError: a file is not whole.
    """
    records = tensor_records(folder)
    if kind := quantisation(config, records):
        raise ValueError(
            f"model.path: {folder} is quantised ({kind}), and quantised weights cannot be trained; "
            "take the checkpoint in bf16, fp16 or fp32, or dequantise this one"
        )
    check_records(folder, records, architecture)
    if architecture.tie_word_embeddings and has_own_head(records):
        raise ValueError(
            f"model.path: config.json of {folder} says tie_word_embeddings, but {LM_HEAD} is there "
            f"and differs from {EMBEDDING}; transformers 5 computes with it, 4 does not: set "
            "tie_word_embeddings to false in config.json, or remove the tensor"
        )
    if is_fresh(records, architecture):
        raise ValueError(
            f"model.path: the weights of {folder} look freshly initialised: every norm has its "
            f"initial value, and the embeddings the deviation {architecture.initializer_range} of "
            "initializer_range. transformers makes such weights where tensors of a checkpoint have "
            "other names than the class it is loaded with; look for the trained ones, or say "
            "model.random_init=true"
        )


def head_rule(architecture: Architecture) -> Rule:
    """The rule of the parameter HEAD."""
    if architecture.num_outputs is not None:
        return OUTPUT_HEAD
    return MODEL["embedding.word_embeddings.weight" if architecture.tie_word_embeddings else HEAD]


def hf_rules(architecture: Architecture) -> dict[str, tuple[Rule, tuple[int, ...]]]:
    """Every tensor of the Hugging Face checkpoint: the rule it belongs to, and its shape."""
    tensors = {}

    def add(rule: Rule, prefix: str) -> None:
        for name, dims in rule.sources.items():
            shape = architecture.shape_of(dims)
            for expert in range(architecture.num_experts) if rule.is_expert else (0,):
                tensors[prefix + name.replace("*", str(expert))] = rule, shape

    for name, rule in MODEL.items():
        if name != HEAD:
            add(rule, "")
        elif not architecture.tie_word_embeddings:
            add(head_rule(architecture), "")
    for layer in range(architecture.num_layers):
        for rule in architecture.layer_rules(layer).values():
            add(rule, f"model.layers.{layer}.")
    return tensors


def hf_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor of the Hugging Face checkpoint, with its shape."""
    return {name: shape for name, (_, shape) in hf_rules(architecture).items()}


def initial_value(rule: Rule, architecture: Architecture) -> float:
    """Of all elements of a vector before training; a norm begins by changing nothing."""
    if rule.initial is not None:
        return rule.initial
    return 0.0 if architecture.has_zero_centered_norms else 1.0


def quantisation(config: dict[str, Any], records: Mapping[str, TensorRecord]) -> str:
    """How the weights are quantised, in words; "" if they are not."""
    found = []
    for key in ("quantization_config", "compression_config"):
        if entry := config.get(key):
            method = entry.get("quant_method", "quantised") if isinstance(entry, dict) else entry
            found.append(f"{key} of config.json: {method}")
    kinds = {record.dtype for record in records.values()} - {*NUMPY_TYPES, *OTHER_TYPES}
    names = [
        name
        for name, record in records.items()
        if record.dtype in kinds or name.rpartition(".")[2] in SCALES
    ]
    if names:
        types = f" of type {', '.join(sorted(kinds))}" if kinds else ""
        found.append(f"{len(names)} tensors{types} such as {min(names)}")
    return "; ".join(found)


def check_records(
    folder: Path, records: Mapping[str, TensorRecord], architecture: Architecture
) -> None:
    """Raises ValueError for tensors that are missing, unexpected, of another shape, or no
    numbers."""
    expected = hf_shapes(architecture)
    # A tied checkpoint may still carry its head; old ones carry rotary buffers.
    optional = {LM_HEAD} if architecture.tie_word_embeddings else set()
    optional |= {name for name in records if is_carried(name, architecture)}
    present = {name for name in records if not name.endswith("rotary_emb.inv_freq")}
    missing, unexpected = expected.keys() - present, present - expected.keys() - optional
    if missing or unexpected:
        raise ValueError(
            f"model.path: the weights of {folder} do not match config.json: missing "
            f"{shorten(missing)}; unexpected {shorten(unexpected)}"
        )
    for name, shape in expected.items():
        if records[name].dtype not in NUMPY_TYPES:
            raise ValueError(
                f"model.path: {records[name].path}: {name} has type {records[name].dtype}; "
                f"expected one of {', '.join(NUMPY_TYPES)}"
            )
        if records[name].shape != shape:
            raise ValueError(
                f"model.path: {records[name].path}: {name} has shape {records[name].shape}; "
                f"config.json says {shape}"
            )


def is_carried(name: str, architecture: Architecture) -> bool:
    """Whether a tensor belongs to a layer that is not trained and stays as it is."""
    layer = name.removeprefix("model.layers.").partition(".")[0]
    if layer == name or not layer.isdecimal():
        return False
    return 0 <= int(layer) - architecture.num_layers < architecture.num_mtp_layers


def has_own_head(records: Mapping[str, TensorRecord]) -> bool:
    """Whether the LM head is there and differs from the embedding."""
    embedding, head = records[EMBEDDING], records.get(LM_HEAD)
    if head is None:
        return False
    if (head.dtype, head.shape) != (embedding.dtype, embedding.shape):
        return True
    return any(
        head.read(start, COMPARED_BYTES) != embedding.read(start, COMPARED_BYTES)
        for start in range(0, head.num_bytes, COMPARED_BYTES)
    )


def is_fresh(records: Mapping[str, TensorRecord], architecture: Architecture) -> bool:
    """Whether the weights are what transformers begins with: every norm at its initial value, and
    the embedding as wide as initializer_range says."""
    for name, (rule, shape) in hf_rules(architecture).items():
        is_norm = len(shape) == 1 and rule.initial is None
        if is_norm and (values(records[name]) != initial_value(rule, architecture)).any():
            return False
    rows = values(records[EMBEDDING], PROBED_ROWS).reshape(-1, architecture.hidden_size)
    rows = rows[rows.any(axis=1)]  # transformers has zeros for the padding token
    if not rows.size:
        return True
    deviation = float(np.sqrt(np.square(rows).mean()))
    # Five standard errors of a deviation, and the rounding of the type.
    tolerance = 5 / math.sqrt(2 * rows.size) + 1e-3
    return abs(deviation / architecture.initializer_range - 1) < tolerance


def values(record: TensorRecord, num_rows: int | None = None) -> NDArray[np.float64]:
    """The numbers [rows * columns] of a tensor, or of its first rows."""
    total = math.prod(record.shape)
    wanted = total if num_rows is None else min(total, num_rows * record.shape[-1])
    raw = np.frombuffer(record.read(0, wanted * record.num_bytes // total), record_type(record))
    if record.dtype == "BF16":
        raw = (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float64)


def record_type(record: TensorRecord) -> np.dtype[Any]:
    """What numpy reads its bytes as."""
    return np.dtype(NUMPY_TYPES[record.dtype])
