"""Reading of shards: every file from front to end, straight into the tensors that want its parts.

First everything that is wanted is named, then each file is read once, in its own order, whatever
the order of the model is; a rank hashes what it reads, where that is its share of the hashing.
"""

import errno
import json
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, merge
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    apply_factory_merges,
)
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from torch import Tensor

from sft_fast.errors import DamageError
from sft_fast.megatron.checkpoint.shards import (
    COMMON_FILE,
    DTYPE_NAMES,
    Shard,
    Sizes,
    decode,
    volume,
)
from sft_fast.models.weight_files import TensorRecord, header, open_safetensors
from sft_fast.runtime.manifest import FileReader, FileRecord, read_manifest
from sft_fast.runtime.phases import no_report

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
Saved = tuple[Shard, TensorRecord]


@dataclass(frozen=True)
class Piece:
    """A part of a file that a tensor wants."""

    begin: int
    """Its first byte."""
    num_elements: int
    """Between its first and its last, those included that are not wanted."""
    strides: Sizes
    """Of the wanted elements, in elements."""
    dtype: torch.dtype
    """In the file."""
    target: Tensor
    """Takes the wanted elements; a view, of any device and dtype."""

    @staticmethod
    def of(saved: Saved, wanted: Shard, first: Sizes, last: Sizes, target: Tensor) -> "Piece":
        """The block from `first` to before `last`, of global indices.

        Args:
            saved: what a file has.
            wanted: what `target` is.
            first: lowest index.
            last: highest index + 1.
            target: the whole tensor, of the shape of `wanted`.
        """
        shard, record = saved
        strides = tuple(math.prod(shard.shape[axis + 1 :]) for axis in range(len(shard.shape)))
        places = list(zip(shard.offset, first, last, strides, strict=True))
        start = sum((a - offset) * stride for offset, a, _, stride in places)
        span = sum((b - 1 - a) * stride for _, a, b, stride in places) + 1
        dtype = DTYPES[record.dtype]
        begin = record.start + start * dtype.itemsize
        return Piece(begin, span, strides, dtype, target[wanted.slices(first, last)])

    def take_from(self, file: FileReader) -> None:
        """Reads it."""
        target = self.target
        if (
            target.is_cpu
            and target.dtype == self.dtype
            and target.is_contiguous()
            and target.numel() == self.num_elements
        ):
            file.read(self.begin, as_bytes(target))
            return
        buffer = torch.empty(self.num_elements, dtype=self.dtype)
        file.read(self.begin, as_bytes(buffer))
        target.copy_(buffer.as_strided(target.shape, self.strides))


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor, of any shape, on the host."""
    return tensor.detach().view(-1).view(torch.uint8).numpy().data


class ShardReader:
    """The shards of a checkpoint.

    Attributes:
        shards: key -> the shards in all files, and where they lie.
        objects: what is no tensor.
    """

    def __init__(self, folder: Path, tensor_done: Callable[[], None] = no_report):
        """Reads the headers.

        Args:
            folder: the directory.
            tensor_done: called after each tensor, see runtime.phases.

        Raises:
            ValueError: the manifest is damaged, or a file is no safetensors file of ours.
        """
        self.folder, self.tensor_done = folder, tensor_done
        self.shards: dict[str, list[Saved]] = {}
        self.objects: dict[str, Any] = {}
        self.wanted: dict[Path, list[Piece]] = defaultdict(list)
        for name in read_manifest(folder):
            if not name.endswith(".safetensors"):
                continue
            try:
                self.add(folder / name)
            except DamageError:
                raise
            except (AssertionError, LookupError, TypeError, ValueError, RecursionError) as error:
                raise ValueError(
                    f"{folder / name}: expected shards as this version writes them ({error!r})"
                ) from None

    def add(self, path: Path) -> None:
        """Takes in what the header of a file says, where that is what the file holds."""
        with open_safetensors(path) as file:
            metadata = file.metadata()
        records = header(path)
        self.objects |= decode(json.loads(metadata["objects"]))
        for name, (key, *sizes) in json.loads(metadata["shards"]).items():
            record = records.pop(name)
            shard = Shard(key, *map(tuple, sizes))
            num_bytes = math.prod(shard.shape) * DTYPES[record.dtype].itemsize
            if (name, record.shape, record.num_bytes) != (shard.name, shard.shape, num_bytes):
                raise TypeError(f"{name} has shape {list(record.shape)}, not {list(shard.shape)}")
            if not len(shard.offset) == len(shard.shape) == len(shard.global_shape):
                raise TypeError(f"{name} has {len(shard.shape)} dimensions")
            self.shards.setdefault(key, []).append((shard, record))
        if records:
            raise TypeError(f"nothing says what {sorted(records)[0]} is")

    def object(self, wanted: ShardedObject) -> Any:
        """A value that is no tensor; ValueError where it is not in the checkpoint."""
        if wanted.unique_key not in self.objects:
            raise ValueError(f"{self.folder}: there is no {wanted.unique_key}")
        return self.objects[wanted.unique_key]

    def want(self, wanted: ShardedTensor, target: Tensor) -> None:
        """Has `fill` put a tensor into a contiguous one of as many elements.

        Raises:
            ValueError: it is not in the checkpoint, or has another shape there.
        """
        shard = Shard.of(wanted)
        saved = self.shards.get(shard.key, [])
        if not saved:
            raise ValueError(f"{self.folder}: there is no tensor {shard.key}")
        shape = saved[0][0].global_shape
        if shape != shard.global_shape and not wanted.allow_shape_mismatch:
            raise ValueError(
                f"{self.folder}: {shard.key} has shape {list(shape)}, this run's model needs "
                f"{list(shard.global_shape)}"
            )
        whole = Shard(shard.key, (0,) * len(shape), shape, shape)
        inside = shard.overlap(whole)
        num_inside = volume(*inside) if inside is not None else 0
        found = list(overlaps(shard, saved))
        if sum(volume(first, last) for first, last, _ in found) != num_inside:
            raise ValueError(
                f"{self.folder}: a part of tensor {shard.key} is missing or twice there"
            )
        target = target.view(shard.shape)
        # Only padding of the vocabulary may differ in shape; new padding is zero.
        if num_inside < math.prod(shard.shape):
            target.zero_()
        for first, last, other in found:
            self.wanted[other[1].path].append(Piece.of(other, shard, first, last, target))

    def read(self, wanted: ShardedTensor | ShardedObject) -> Any:
        """The value in the place of `wanted`; `fill` fills a tensor. Raises as `want`."""
        if isinstance(wanted, ShardedObject):
            return self.object(wanted)
        result = torch.empty(wanted.local_shape, dtype=wanted.dtype)
        self.want(wanted, result)
        return result

    @torch.no_grad()
    def fill(self, hashed: Collection[str] = ()) -> list[FileRecord]:
        """Reads what is wanted, once for each file.

        Args:
            hashed: names of files to read wholly and hash.

        Returns: what these files are.
        """
        records = []
        # Ranks begin with different files: one disk, and one page cache, serves them all.
        own = [self.folder / name for name in hashed]
        for path in (*own, *(path for path in self.wanted if path not in own)):
            with FileReader(path, path.name, path in own) as file:
                for piece in sorted(self.wanted.get(path, []), key=lambda piece: piece.begin):
                    piece.take_from(file)
                    self.tensor_done()
                if path in own:
                    records.append(file.finish(self.tensor_done))
        self.wanted.clear()
        return records


def overlaps(shard: Shard, saved: list[Saved]) -> Iterator[tuple[Sizes, Sizes, Saved]]:
    """(first, last + 1 global index of what both hold, the saved one) for each overlap."""
    for other in saved:
        block = shard.overlap(other[0])
        if block is not None:
            yield *block, other


def check_complete(folder: Path) -> None:
    """Raises OSError unless the files of all ranks hold each tensor wholly, and once."""
    try:
        reader = ShardReader(folder)
    except ValueError as error:
        raise OSError(errno.EIO, str(error), str(folder)) from None
    for key, saved in reader.shards.items():
        shapes = {shard.global_shape for shard, _ in saved}
        held = sum(math.prod(shard.shape) for shard, _ in saved)
        if len(shapes) != 1 or held != math.prod(next(iter(shapes))):
            text = f"{held} values of tensor {key} were written, its shapes are {shapes}"
            raise OSError(errno.EIO, text, str(folder))


def read_common(folder: Path) -> dict[str, Any]:
    """What was equal on every rank."""
    common: dict[str, Any] = decode(json.loads((folder / COMMON_FILE).read_text()))
    return common


def request_state(
    reader: ShardReader, common: dict[str, Any], request: dict[str, Any]
) -> Callable[[], dict[str, Any]]:
    """Wants what a sharded state dict asks for, as dist_checkpointing.load does.

    Args:
        reader: of the checkpoint.
        common: from `read_common`; what is asked for goes into it.
        request: in dist_checkpointing's sharded form, its tensors without content.

    Returns: the state, to be called once the reader has filled it.

    Raises:
        ValueError: the checkpoint does not hold what is asked for.
    """
    sharded, local, factories = load_preprocess(request)
    merge(common, local)
    sharded, _ = extract_sharded_base(sharded)
    merge(common, dict_list_map_outplace(reader.read, sharded))
    return lambda: apply_factory_merges(common, factories)
