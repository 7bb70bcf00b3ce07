"""Hugging Face tensors and this rank's part of a megatron model: how they correspond, and import.

sft_fast.models.families has the tables: which Hugging Face tensors make up each megatron parameter,
and how it is split over tensor-parallel ranks. Import reads only this rank's slices, one at a time,
into the parameters; export/weights.py goes the other way.
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from sft_fast.megatron.exchange import StoreExchange
from sft_fast.megatron.model import SFTModel
from sft_fast.megatron.parallel import Parallel
from sft_fast.models.architecture import Architecture
from sft_fast.models.families import EXPERT_BIAS, HEAD, MODEL, OUTPUT_HEAD, Rule
from sft_fast.models.weight_files import open_safetensors, tensor_records
from sft_fast.models.weights import check_records, head_rule, hf_rules, hf_shapes, initial_value
from sft_fast.runtime.phases import no_report
from sft_fast.runtime.remembered import recall, remember, signature

ADAPTER_PREFIX = "lora_"  # of parameters that no Hugging Face tensor stands for
ALL = slice(None)
HASHED_BYTES = 16 << 20
LOCAL_RANKS = (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))
ROWS_AT_A_TIME = 4096


class WeightSource(Protocol):
    """Somewhere Hugging Face tensors come from, read in slices."""

    def read(self, name: str, rows: slice, columns: slice) -> Tensor:
        """The rows and columns of a matrix [rows, columns], or the rows of a vector [rows]."""

    def digest(self) -> str:
        """Names the numbers that are read; every rank calls it, and each machine reads them."""


class SafetensorsSource:
    """The *.safetensors of a model directory, opened lazily.

    Raises:
        ValueError: tensors are missing, unexpected, or of another shape than config.json says.
    """

    def __init__(self, folder: Path, architecture: Architecture):
        self.records = tensor_records(folder)
        check_records(folder, self.records, architecture)
        self.folder, self.names = folder, sorted(hf_shapes(architecture))
        self.open_files: dict[Path, Any] = {}

    def slice_of(self, name: str) -> Any:
        """A tensor that is read by slices; its file stays open."""
        path = self.records[name].path
        if path not in self.open_files:
            self.open_files[path] = open_safetensors(path, "pt")
        return self.open_files[path].get_slice(name)

    def read(self, name: str, rows: slice, columns: slice) -> Tensor:
        """The rows and columns of a matrix [rows, columns], or the rows of a vector [rows]."""
        tensor = self.slice_of(name)
        return tensor[rows] if len(tensor.get_shape()) == 1 else tensor[rows, columns]

    def digest(self) -> str:
        """A hash of all tensors, however they are divided among files.

        The ranks of a machine share the reading, and remember it until the files change.
        """
        files = signature(sorted({record.path for record in self.records.values()}))
        known = recall(self.folder, files)
        exchange = StoreExchange("digest of the weights", math.inf)
        if all(exchange.all_gather("known", known is not None)):
            assert known is not None
            return known
        node = int(os.environ.get("GROUP_RANK", "0"))
        local, num_local = (int(os.environ.get(key, default)) for key, default in LOCAL_RANKS)
        own = {name: self.digest_of(name) for name in self.names[local::num_local]}
        shares = exchange.all_gather("hashes", [node, own])
        hashes = {name: h for other, share in shares if other == node for name, h in share.items()}
        assert sorted(hashes) == self.names, "the ranks of a machine have shared the tensors"
        found = xxhash.xxh3_128_hexdigest(json.dumps(sorted(hashes.items())).encode())
        if local == 0:
            remember(self.folder, files, found)
        return found

    def digest_of(self, name: str) -> str:
        """A hash of one tensor, of which a part is in memory at a time."""
        record = self.records[name]
        hasher = xxhash.xxh3_128(f"{name} {record.dtype} {record.shape}".encode())
        for start in range(0, record.num_bytes, HASHED_BYTES):
            hasher.update(record.read(start, HASHED_BYTES))
        return hasher.hexdigest()


class RandomSource:
    """Random weights as a checkpoint: a tensor depends on its name and the seed, not the layout.

    Normal with the architecture's standard deviation; what is added to the residual stream has it
    divided by sqrt(2 * layers), as in GPT-2 and megatron.
    """

    def __init__(self, architecture: Architecture, seed: int):
        self.tensors = hf_rules(architecture)
        self.std = architecture.initializer_range
        self.residual_std = self.std / math.sqrt(2 * architecture.num_layers)
        self.architecture = architecture
        self.seed = seed

    def read(self, name: str, rows: slice, columns: slice) -> Tensor:
        """The rows and columns of a random matrix [rows, columns]; a vector [rows] is constant."""
        rule, shape = self.tensors[name]
        if len(shape) == 1:
            return torch.full(shape, initial_value(rule, self.architecture))[rows]
        seed = xxhash.xxh64_intdigest(name.encode(), seed=self.seed) >> 1
        generator = torch.Generator().manual_seed(seed)
        # What is split by columns writes to the residual stream.
        std = self.residual_std if rule.split == "columns" else self.std
        return torch.randn(shape, generator=generator).mul_(std)[rows, columns]

    def digest(self) -> str:
        """Which numbers they are."""
        shapes = sorted((name, shape) for name, (_, shape) in self.tensors.items())
        values = [self.seed, self.std, shapes]
        return f"random {xxhash.xxh3_64_hexdigest(json.dumps(values).encode())}"


class GrownSource:
    """A checkpoint with more tokens than it was trained with: the rows of the new ones, in the
    embedding and the LM head, are the mean of the old rows, so that they are as likely as any.
    Some may have had rows, which were never used.

    Source: Hewitt 2021, "Initializing new word embeddings for pretrained language models".
    """

    def __init__(self, source: WeightSource, num_rows: int, new: range):
        """Args:
        source: the checkpoint.
        num_rows: of its embedding.
        new: ids of the new tokens; the old ones are those below.
        """
        self.source, self.num_rows, self.new = source, num_rows, new
        self.means: dict[str, Tensor] = {}

    def read(self, name: str, rows: slice, columns: slice) -> Tensor:
        """As the source's, [rows, columns]; rows of new tokens are the mean of the old ones."""
        if name not in ("model.embed_tokens.weight", "lm_head.weight"):
            return self.source.read(name, rows, columns)
        first, end = self.new.start, self.new.stop
        start, stop, _ = rows.indices(max(self.num_rows, end))
        old = self.source.read(name, slice(min(start, first), min(stop, first)), columns)
        num_new = max(0, min(stop, end) - max(start, first))
        new = self.mean(name)[columns].to(old.dtype).expand(num_new, -1) if num_new else old[:0]
        if stop <= end:
            return torch.cat([old, new])
        return torch.cat([old, new, self.source.read(name, slice(max(start, end), stop), columns)])

    def digest(self) -> str:
        """The source's, and which tokens are new."""
        return f"{self.source.digest()} with tokens {self.new.start} to {self.new.stop}"

    def mean(self, name: str) -> Tensor:
        """fp32 [hidden], the same on every rank; few rows are in memory at a time."""
        if name not in self.means:
            total = torch.zeros((), dtype=torch.float64)
            for start in range(0, self.new.start, ROWS_AT_A_TIME):
                rows = slice(start, min(start + ROWS_AT_A_TIME, self.new.start))
                total = total + self.source.read(name, rows, ALL).sum(0, dtype=torch.float64)
            self.means[name] = (total / self.new.start).float()
        return self.means[name]


class HeadSource:
    """A checkpoint of a model with an LM head, with a random linear head in place of that."""

    def __init__(self, source: WeightSource, architecture: Architecture, seed: int):
        self.source, self.head = source, RandomSource(architecture, seed)
        self.own = set(OUTPUT_HEAD.sources)

    def read(self, name: str, rows: slice, columns: slice) -> Tensor:
        """As the source's; the head [num_outputs, hidden] is normal, from its name and the seed."""
        source = self.head if name in self.own else self.source
        return source.read(name, rows, columns)

    def digest(self) -> str:
        """The source's, and the head's."""
        return f"{self.source.digest()} with a head, {self.head.digest()}"


def named_tensors(model: SFTModel) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) of each parameter of this rank, and of each bias of experts."""
    yield from model.named_parameters()
    yield from (named for named in model.named_buffers() if named[0].endswith(EXPERT_BIAS))


def named_rules(model: SFTModel, architecture: Architecture) -> Iterator[tuple[str, Rule]]:
    """Yields (name, rule with full Hugging Face names) for each base tensor of this rank, or for
    each of its matrices where it is of experts."""
    for name, _ in named_tensors(model):
        if name.rpartition(".")[2].startswith(ADAPTER_PREFIX):
            continue
        if not name.startswith("decoder.layers."):
            yield name, head_rule(architecture) if name == HEAD else MODEL[name]
            continue
        _, _, local_index, rest = name.split(".", 3)
        layer: Any = model.decoder.layers[int(local_index)]
        number = layer.layer_number - 1
        rule = architecture.layer_rules(number)[rest]
        prefix = f"model.layers.{number}."
        sources = {prefix + key: dims for key, dims in rule.sources.items()}
        if not rule.is_expert:
            yield name, replace(rule, sources=sources)
            continue
        for matrix, expert in enumerate(layer.mlp.local_expert_indices):
            own = {key.replace("*", str(expert)): dims for key, dims in sources.items()}
            yield name, Rule(rule.split, own, is_expert=True, matrix=matrix)


def matrix_of(rule: Rule, parameter: Tensor) -> Tensor:
    """What the rule is about of its parameter, or of a tensor of the same shape."""
    return parameter if rule.matrix is None else parameter[rule.matrix]


@torch.no_grad()
def load_hf_weights(
    model: SFTModel,
    source: WeightSource,
    architecture: Architecture,
    parallel: Parallel,
    tensor_done: Callable[[], None] = no_report,
) -> None:
    """Fills every parameter of this rank from `source`, slice by slice, in its own dtype.

    Args:
        model: the chunk to fill.
        source: the Hugging Face tensors.
        architecture: of both.
        parallel: this rank's place.
        tensor_done: called after each slice, see runtime.phases.

    Raises:
        ValueError: a weight is not finite.
    """
    tensors = dict(named_tensors(model))
    for name, rule in named_rules(model, architecture):
        parameter = matrix_of(rule, tensors[name])
        if rule.split == "vocab":
            parameter.zero_()  # the rows that pad the vocabulary
        for shard in shard_slices(rule, parameter, architecture, *shard_of(rule, parallel)):
            shape = shard.view.shape
            # Not kept in a variable, or it would still be there while the next one is read.
            shard.view.copy_(source.read(shard.source, shard.rows, shard.columns).reshape(shape))
            tensor_done()
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(
                f"model.path: {', '.join(rule.sources)}: NaN or infinity among the weights, as "
                f"{parameter.dtype}; the model is damaged, or its numbers do not fit model.dtype"
            )


def part(total: int, size: int, rank: int) -> slice:
    """The rank's share of `total` rows or columns."""
    assert total % size == 0, (total, size)
    return slice(rank * (total // size), (rank + 1) * (total // size))


def shard_of(rule: Rule, parallel: Parallel) -> tuple[int, int]:
    """(size, rank) of the group that the rule's parameter is split over."""
    if rule.is_expert:
        return parallel.etp_size, parallel.etp_rank
    return parallel.tp_size, parallel.tp_rank


@dataclass(frozen=True)
class ShardSlice:
    """Part of a Hugging Face tensor, and the part of a parameter that holds the same numbers.

    Attributes:
        source: name of the Hugging Face tensor.
        rows: of the tensor.
        columns: of the tensor; a vector has none.
        view: part of the parameter, with as many numbers in the same order.
    """

    source: str
    rows: slice
    columns: slice
    view: Tensor


def shard_slices(
    rule: Rule, parameter: Tensor, architecture: Architecture, size: int, rank: int
) -> Iterator[ShardSlice]:
    """What the parameter [rows, ...] of rank `rank` of `size` is made of, padding left out."""
    source = next(iter(rule.sources))
    if rule.split == "replicated":
        yield ShardSlice(source, ALL, ALL, parameter)
    elif rule.split == "columns":
        yield ShardSlice(source, ALL, part(parameter.shape[1] * size, size, rank), parameter)
    elif rule.split == "vocab":
        rows = part(len(parameter) * size, size, rank)
        stop = min(rows.stop, architecture.vocab_size)
        start = min(rows.start, stop)
        yield ShardSlice(source, slice(start, stop), ALL, parameter[: stop - start])
    else:
        # Blocks alternate: once per query group, or not at all.
        groups = architecture.num_key_value_heads if rule.split == "qkv" else size
        mine = part(groups, size, rank)
        grouped = parameter.unflatten(0, (groups // size, -1))
        width_before = 0
        for source, start, num_rows in blocks(rule, architecture):
            width = num_rows // groups
            rows = slice(start + mine.start * width, start + mine.stop * width)
            yield ShardSlice(source, rows, ALL, grouped[:, width_before : width_before + width])
            width_before += width


def blocks(rule: Rule, architecture: Architecture) -> Iterator[tuple[str, int, int]]:
    """(source, first row, number of rows) of each block of a parameter split by rows."""
    for source, dims in rule.sources.items():
        start = 0
        for block in dims[0].split("+"):
            size = architecture.size_of(block)
            yield source, start, size
            start += size


def merge_shards(rule: Rule, shards: list[Tensor], architecture: Architecture) -> list[Tensor]:
    """Shards [rows, ...] of all ranks -> the rule's Hugging Face tensors; inverse of loading."""
    merged = {
        name: shards[0].new_empty(architecture.shape_of(dims))
        for name, dims in rule.sources.items()
    }
    for rank, shard in enumerate(shards):
        for block in shard_slices(rule, shard, architecture, len(shards), rank):
            rows = merged[block.source][block.rows]
            target = rows if rows.dim() == 1 else rows[:, block.columns]
            target.copy_(block.view.reshape(target.shape))
        if rule.split == "replicated":
            break
    return list(merged.values())


def merge_rows(rule: Rule, shards: list[Tensor], architecture: Architecture) -> Tensor:
    """Shards of all ranks, [rows, ...] in the order of the rule's parameter -> [all rows, ...] in
    that of its only Hugging Face tensor."""
    (dims,) = rule.sources.values()
    merged = shards[0].new_empty((*architecture.shape_of(dims[:1]), *shards[0].shape[1:]))
    for rank, shard in enumerate(shards):
        for block in shard_slices(rule, shard, architecture, len(shards), rank):
            rows = merged[block.rows]
            rows.copy_(block.view.reshape(rows.shape))
    return merged


def qkv_widths(architecture: Architecture) -> tuple[int, int, int]:
    """Rows that one query group has in q, k and v."""
    queries = architecture.num_attention_heads // architecture.num_key_value_heads
    return queries * architecture.head_dim, architecture.head_dim, architecture.head_dim


def gather_shards(shard: Tensor, parallel: Parallel, is_expert: bool = False) -> list[Tensor]:
    """The shards of all tensor-parallel ranks, each of the shape of `shard`."""
    group = parallel.etp_group if is_expert else parallel.tp_group
    shards = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(shards, shard.contiguous(), group=group)
    return shards
