"""Weights between Hugging Face safetensors and this rank's part of a megatron model.

One table says which Hugging Face tensors make up each megatron parameter and how the parameter is
split over tensor-parallel ranks. Import reads only this rank's slices; each pipeline stage exports
its own files.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sft_fast.architecture import Architecture
from sft_fast.megatron.model import SFTModel
from sft_fast.megatron.parallel import Parallel

Split = Literal["replicated", "vocab", "rows", "columns", "qkv"]
INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
ADAPTER_PREFIX = "lora_"  # of parameters that no Hugging Face tensor stands for


@dataclass(frozen=True)
class Rule:
    """How one megatron parameter is made of Hugging Face tensors."""

    sources: tuple[str, ...]
    split: Split


LAYER_RULES = {
    "input_layernorm.weight": Rule(("input_layernorm.weight",), "replicated"),
    "self_attention.linear_qkv.weight": Rule(
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"), "qkv"
    ),
    "self_attention.linear_proj.weight": Rule(("self_attn.o_proj.weight",), "columns"),
    "pre_mlp_layernorm.weight": Rule(("post_attention_layernorm.weight",), "replicated"),
    "mlp.linear_fc1.weight": Rule(("mlp.gate_proj.weight", "mlp.up_proj.weight"), "rows"),
    "mlp.linear_fc2.weight": Rule(("mlp.down_proj.weight",), "columns"),
    "self_attention.linear_qkv.bias": Rule(
        ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"), "qkv"
    ),
    "self_attention.q_layernorm.weight": Rule(("self_attn.q_norm.weight",), "replicated"),
    "self_attention.k_layernorm.weight": Rule(("self_attn.k_norm.weight",), "replicated"),
}
MODEL_RULES = {
    "embedding.word_embeddings.weight": Rule(("model.embed_tokens.weight",), "vocab"),
    "decoder.final_layernorm.weight": Rule(("model.norm.weight",), "replicated"),
    "output_layer.weight": Rule(("lm_head.weight",), "vocab"),
}


class WeightSource(Protocol):
    """Somewhere Hugging Face tensors come from, read in slices."""

    def read(self, name: str, rows: slice, columns: slice) -> Tensor:
        """Returns rows and columns of tensor `name`; 1-D tensors have only rows."""


def hf_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor of the Hugging Face checkpoint, with its shape."""
    hidden, ffn = architecture.hidden_size, architecture.ffn_hidden_size
    queries = architecture.num_attention_heads * architecture.head_dim
    keys = architecture.num_key_value_heads * architecture.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (architecture.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not architecture.tie_word_embeddings:
        shapes["lm_head.weight"] = (architecture.vocab_size, hidden)
    layer_shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
    }
    if architecture.qkv_bias:
        layer_shapes["self_attn.q_proj.bias"] = (queries,)
        layer_shapes["self_attn.k_proj.bias"] = layer_shapes["self_attn.v_proj.bias"] = (keys,)
    if architecture.qk_norm:
        head = (architecture.head_dim,)
        layer_shapes["self_attn.q_norm.weight"] = layer_shapes["self_attn.k_norm.weight"] = head
    for layer in range(architecture.num_layers):
        for name, shape in layer_shapes.items():
            shapes[f"model.layers.{layer}.{name}"] = shape
    return shapes


class SafetensorsSource:
    """The *.safetensors of a model directory, opened lazily.

    Raises:
        ValueError: tensors are missing, unexpected, or of another shape than config.json says.
    """

    def __init__(self, folder: Path, architecture: Architecture):
        self.file_of = tensor_files(folder)
        self.folder = folder
        self.open_files: dict[str, Any] = {}
        expected = hf_shapes(architecture)
        # A tied checkpoint may still carry lm_head; old ones carry rotary buffers.
        optional = {"lm_head.weight"} if architecture.tie_word_embeddings else set()
        found = {name for name in self.file_of if not name.endswith("rotary_emb.inv_freq")}
        missing, unexpected = expected.keys() - found, found - expected.keys() - optional
        if missing or unexpected:
            raise ValueError(
                f"{folder}: the weights do not match config.json: missing "
                f"{shorten(missing)}; unexpected {shorten(unexpected)}"
            )
        for name, shape in expected.items():
            actual = tuple(self.slice_of(name).get_shape())
            if actual != shape:
                raise ValueError(
                    f"{folder / self.file_of[name]}: {name} has shape {actual}; config.json says "
                    f"{shape}"
                )

    def slice_of(self, name: str) -> Any:
        file = self.file_of[name]
        if file not in self.open_files:
            self.open_files[file] = safe_open(self.folder / file, framework="pt")
        return self.open_files[file].get_slice(name)

    def read(self, name: str, rows: slice, columns: slice) -> Tensor:
        tensor = self.slice_of(name)
        return tensor[rows] if len(tensor.get_shape()) == 1 else tensor[rows, columns]


def tensor_files(folder: Path) -> dict[str, str]:
    """Maps each tensor name of a model directory to the file that holds it."""
    index = folder / INDEX_FILE
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        for file in set(weight_map.values()):
            if Path(file).name != file or not (folder / file).is_file():
                raise ValueError(f"{index}: weight_map names {file!r}, not a file of {folder}")
        return weight_map
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"model.path: {folder} holds no *.safetensors; convert the model first")
    file_of = {}
    for file in files:
        with safe_open(folder / file, framework="pt") as opened:
            file_of.update(dict.fromkeys(opened.keys(), file))
    return file_of


def shorten(names: set[str], limit: int = 5) -> str:
    listed = ", ".join(sorted(names)[:limit]) or "none"
    return listed if len(names) <= limit else f"{listed} and {len(names) - limit} more"


class RandomSource:
    """Random weights as a checkpoint: a tensor depends on its name and the seed, not the layout.

    Normal with the architecture's standard deviation; what is added to the residual stream has it
    divided by sqrt(2 * layers), as in GPT-2 and megatron.
    """

    def __init__(self, architecture: Architecture, seed: int):
        self.shapes = hf_shapes(architecture)
        self.std = architecture.initializer_range
        self.residual_std = self.std / math.sqrt(2 * architecture.num_layers)
        self.seed = seed

    def read(self, name: str, rows: slice, columns: slice) -> Tensor:
        shape = self.shapes[name]
        if len(shape) == 1:
            value = 0.0 if name.endswith(".bias") else 1.0
            return torch.full(shape, value)[rows]
        seed = xxhash.xxh64_intdigest(name.encode(), seed=self.seed) >> 1
        generator = torch.Generator().manual_seed(seed)
        is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = self.residual_std if is_residual else self.std
        return torch.randn(shape, generator=generator).mul_(std)[rows, columns]


def named_rules(model: SFTModel, architecture: Architecture) -> Iterator[tuple[str, Rule]]:
    """Yields (name, rule with full Hugging Face names) for each base parameter of this rank."""
    for name, _ in model.named_parameters():
        if name.rpartition(".")[2].startswith(ADAPTER_PREFIX):
            continue
        if not name.startswith("decoder.layers."):
            rule = MODEL_RULES[name]
            if name == "output_layer.weight" and architecture.tie_word_embeddings:
                rule = MODEL_RULES["embedding.word_embeddings.weight"]
            yield name, rule
            continue
        _, _, local_index, rest = name.split(".", 3)
        layer = model.decoder.layers[int(local_index)].layer_number - 1
        rule = LAYER_RULES[rest]
        sources = tuple(f"model.layers.{layer}.{source}" for source in rule.sources)
        yield name, Rule(sources, rule.split)


@torch.no_grad()
def load_weights(
    model: SFTModel, source: WeightSource, architecture: Architecture, parallel: Parallel
) -> None:
    """Fills every parameter of this rank from `source`, slice by slice, in its own dtype."""
    parameters = dict(model.named_parameters())
    for name, rule in named_rules(model, architecture):
        target = parameters[name]
        shard = read_shard(source, rule, architecture, parallel, target.shape)
        assert shard.shape == target.shape, (name, shard.shape, target.shape)
        target.copy_(shard)


def part(total: int, parallel: Parallel) -> slice:
    size = total // parallel.tp_size
    return slice(parallel.tp_rank * size, (parallel.tp_rank + 1) * size)


def read_shard(
    source: WeightSource,
    rule: Rule,
    architecture: Architecture,
    parallel: Parallel,
    shape: torch.Size,
) -> Tensor:
    """Reads this tensor-parallel rank's part of a parameter of local `shape`."""
    everything = slice(None)
    if rule.split == "replicated":
        return source.read(rule.sources[0], everything, everything)
    if rule.split == "columns":
        columns = part(shape[1] * parallel.tp_size, parallel)
        return source.read(rule.sources[0], everything, columns)
    if rule.split == "rows":
        rows = part(shape[0] // len(rule.sources) * parallel.tp_size, parallel)
        return torch.cat([source.read(name, rows, everything) for name in rule.sources])
    if rule.split == "vocab":
        rows = part(shape[0] * parallel.tp_size, parallel)
        stop = min(rows.stop, architecture.vocab_size)
        start = min(rows.start, stop)
        weight = source.read(rule.sources[0], slice(start, stop), everything)
        return torch.cat([weight, weight.new_zeros(shape[0] - len(weight), shape[1])])
    groups = part(architecture.num_key_value_heads, parallel)
    num_groups = groups.stop - groups.start
    blocks = []
    for name, width in zip(rule.sources, qkv_widths(architecture), strict=True):
        rows = slice(groups.start * width, groups.stop * width)
        blocks.append(source.read(name, rows, everything).view(num_groups, width, -1))
    return torch.cat(blocks, dim=1).reshape(shape)  # per query group: its queries, key, value


def qkv_widths(architecture: Architecture) -> tuple[int, int, int]:
    """Rows that one query group has in q, k and v."""
    queries = architecture.num_attention_heads // architecture.num_key_value_heads
    return queries * architecture.head_dim, architecture.head_dim, architecture.head_dim


def merge_shards(rule: Rule, shards: list[Tensor], architecture: Architecture) -> list[Tensor]:
    """The inverse of read_shard: all tensor-parallel shards -> the rule's Hugging Face tensors."""
    if rule.split == "replicated":
        return [shards[0]]
    if rule.split == "columns":
        return [torch.cat(shards, dim=1)]
    if rule.split == "vocab":
        return [torch.cat(shards)[: architecture.vocab_size]]
    if rule.split == "rows":
        chunks = [shard.chunk(len(rule.sources)) for shard in shards]
        return [torch.cat(pieces) for pieces in zip(*chunks, strict=True)]
    widths = qkv_widths(architecture)
    merged = torch.cat(shards)
    groups = merged.view(architecture.num_key_value_heads, sum(widths), *merged.shape[1:])
    return [block.flatten(0, 1) for block in groups.split(widths, dim=1)]


def export_weights(
    models: Sequence[SFTModel],
    folder: Path,
    architecture: Architecture,
    parallel: Parallel,
    dtype: torch.dtype,
) -> None:
    """Writes *.safetensors and their index to `folder`; every rank of one replica must call it.

    Args:
        models: what `build_model` returned.

    The first tensor-parallel rank of each pipeline stage writes that stage's files, so `folder`
    must be on a file system that all stages share.
    """
    writer = ShardWriter(folder, f"stage{parallel.pp_rank + 1:02d}")
    owned = [(model, *named) for model in models for named in named_rules(model, architecture)]
    for model, name, rule in owned:
        shards = gather_shards(merged_parameter(model, name), parallel)
        is_tied_copy = name == "output_layer.weight" and architecture.tie_word_embeddings
        if parallel.tp_rank != 0 or is_tied_copy:
            continue
        tensors = merge_shards(rule, shards, architecture)
        for source, tensor in zip(rule.sources, tensors, strict=True):
            writer.add(source, tensor.to("cpu", dtype))
    if parallel.tp_rank == 0:
        writer.flush()
    write_index(writer, folder, parallel)


def merged_parameter(model: SFTModel, name: str) -> Tensor:
    """The parameter; the weight of a matrix with LoRA adapters has them added, in fp32."""
    module_name, _, attribute = name.rpartition(".")
    module: Any = model.get_submodule(module_name)
    if attribute == "weight" and hasattr(module, "merged_weight"):
        return module.merged_weight()
    return model.get_parameter(name).detach()


def gather_shards(shard: Tensor, parallel: Parallel) -> list[Tensor]:
    shards = [torch.empty_like(shard) for _ in range(parallel.tp_size)]
    dist.all_gather(shards, shard.contiguous(), group=parallel.tp_group)
    return shards


class ShardWriter:
    """Collects tensors and writes a safetensors file whenever SHARD_BYTES are full."""

    def __init__(self, folder: Path, prefix: str):
        self.folder, self.prefix = folder, prefix
        self.pending: dict[str, Tensor] = {}
        self.file_of: dict[str, str] = {}
        self.total_bytes = 0
        self.num_files = 0

    def add(self, name: str, tensor: Tensor) -> None:
        num_bytes = tensor.numel() * tensor.element_size()
        pending_bytes = sum(t.numel() * t.element_size() for t in self.pending.values())
        if self.pending and pending_bytes + num_bytes > SHARD_BYTES:
            self.flush()
        self.pending[name] = tensor.contiguous()
        self.total_bytes += num_bytes

    def flush(self) -> None:
        self.num_files += 1
        file = f"model-{self.prefix}-{self.num_files:05d}.safetensors"
        save_file(self.pending, self.folder / file, metadata={"format": "pt"})
        self.file_of.update(dict.fromkeys(self.pending, file))
        self.pending = {}


def write_index(writer: ShardWriter, folder: Path, parallel: Parallel) -> None:
    """The first stage collects what each stage wrote; a lone file needs no index."""
    parts: list[Any] = [None] * parallel.pp_size
    dist.all_gather_object(parts, (writer.file_of, writer.total_bytes), group=parallel.pp_group)
    if parallel.tp_rank != 0 or not parallel.is_first_stage:
        return
    weight_map = {name: file for file_of, _ in parts for name, file in file_of.items()}
    if len(set(weight_map.values())) == 1:
        (folder / next(iter(weight_map.values()))).rename(folder / "model.safetensors")
        return
    total_bytes = sum(num_bytes for _, num_bytes in parts)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
