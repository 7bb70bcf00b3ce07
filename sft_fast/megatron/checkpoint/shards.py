"""megatron's sharded state dicts as safetensors and JSON, readable at any layout.

megatron-core's own files keep their index and their common state in pickles, load when they are
damaged, and are written by forked processes that can hang. Here each rank writes the shards it is
the main replica of into one safetensors file, whose header says where they belong; a reader copies
what overlaps the shard it wants. Nothing on this path unpickles.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    is_main_replica,
)
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from torch import Tensor

from sft_fast.megatron.checkpoint.host_snapshot import HostCopier
from sft_fast.runtime.manifest import HashedFile, StagedDirectory

COMMON_FILE = "common.json"
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """A block of a global tensor. A layer's tensor has its layer number as first dimension."""

    key: str
    offset: Sizes
    shape: Sizes
    global_shape: Sizes

    @staticmethod
    def of(sharded: ShardedTensor) -> "Shard":
        """The shard that megatron describes."""
        shape = (1,) * sharded.prepend_axis_num + tuple(sharded.local_shape)
        return Shard(sharded.key, tuple(sharded.global_offset), shape, tuple(sharded.global_shape))

    @property
    def name(self) -> str:
        """Its name in a safetensors file."""
        return f"{self.key}@{','.join(map(str, self.offset))}"

    def overlap(self, other: "Shard") -> tuple[Sizes, Sizes] | None:
        """First and last + 1 global index of what both hold."""
        first = tuple(map(max, self.offset, other.offset))
        ends = (a + n for a, n in zip(self.offset, self.shape, strict=True))
        other_ends = (a + n for a, n in zip(other.offset, other.shape, strict=True))
        last = tuple(map(min, ends, other_ends))
        if any(a >= b for a, b in zip(first, last, strict=True)):
            return None
        return first, last

    def slices(self, first: Sizes, last: Sizes) -> tuple[slice, ...]:
        """This shard's own indices of a global block."""
        places = zip(self.offset, first, last, strict=True)
        return tuple(slice(a - start, b - start) for start, a, b in places)


@dataclass(frozen=True)
class Snapshot:
    """This rank's share of a state dict."""

    tensors: list[tuple[Shard, Tensor]]
    objects: dict[str, Any]
    """Sharded values that are no tensors."""
    common: dict[str, Any]
    """What is equal on every rank."""

    @property
    def num_bytes(self) -> int:
        """Size of all tensors, in bytes."""
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self.tensors)


def own_share(state: dict[str, Any]) -> Snapshot:
    """What this rank has to write of a sharded state dict, its tensors as they are."""
    sharded, common = save_preprocess(state, validate_access_integrity=False)
    tensors, objects = [], {}
    for value in nested_values(sharded):
        if not is_main_replica(value.replica_id):
            continue
        if isinstance(value, ShardedObject):
            objects[value.unique_key] = value.data
        else:
            tensors.append((Shard.of(value), value.data.detach()))
    return Snapshot(tensors, objects, common)


def take_snapshot(state: dict[str, Any], copier: HostCopier) -> Snapshot:
    """What this rank has to write, in host memory, so that training may go on."""
    share = own_share(state)
    copies = copier.copy([tensor for _, tensor in share.tensors])
    shards = [shard for shard, _ in share.tensors]
    objects, common = decode(encode(share.objects)), decode(encode(share.common))
    return Snapshot(list(zip(shards, copies, strict=True)), objects, common)


def write_snapshot(snapshot: Snapshot, stage: StagedDirectory, rank: int) -> None:
    """Writes this rank's file, and on rank 0 the common state.

    Raises:
        OSError: the disk is full or not writable.
    """
    if snapshot.tensors or snapshot.objects:
        with stage.create(f"rank_{rank:05d}.safetensors") as file:
            write_tensors(snapshot, file)
    if rank == 0:
        stage.write_text(COMMON_FILE, json.dumps(encode(snapshot.common), allow_nan=False))


def write_tensors(snapshot: Snapshot, file: HashedFile) -> None:
    """The safetensors layout, tensor by tensor, so that a GPU's are on the host one at a time."""
    shards = {
        shard.name: [shard.key, shard.offset, shard.shape, shard.global_shape]
        for shard, _ in snapshot.tensors
    }
    assert len(shards) == len(snapshot.tensors), "one shard twice"
    texts = {"shards": json.dumps(shards), "objects": json.dumps(encode(snapshot.objects))}
    header: dict[str, Any] = {"__metadata__": texts}
    end = 0
    for shard, tensor in snapshot.tensors:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[shard.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": shard.shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for _, tensor in snapshot.tensors:
        if tensor.numel():
            file.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def volume(first: Sizes, last: Sizes) -> int:
    """Number of elements between two corners."""
    return math.prod(b - a for a, b in zip(first, last, strict=True))


def read_common(folder: Path) -> dict[str, Any]:
    """What was equal on every rank."""
    common: dict[str, Any] = decode(json.loads((folder / COMMON_FILE).read_text()))
    return common


def encode(value: Any) -> Any:
    """As JSON, which has no tensors, tuples, numbers as keys, infinities: those become one-key
    mappings."""
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [encode(item) for item in value]}
    if isinstance(value, Tensor):
        tensor = value.detach().cpu()
        return {"tensor": [DTYPE_NAMES[tensor.dtype], encode(tensor.tolist())]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"a {type(value).__name__} in the state; expected numbers, texts and tensors")


def decode(value: Any) -> Any:
    """The inverse of `encode`."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "dict":
        return {decode(key): decode(item) for key, item in content}
    if kind == "tuple":
        return tuple(decode(item) for item in content)
    if kind == "tensor":
        dtypes = {name: dtype for dtype, name in DTYPE_NAMES.items()}
        return torch.tensor(decode(content[1]), dtype=dtypes[content[0]])
    assert kind == "float", kind
    return float(content)
