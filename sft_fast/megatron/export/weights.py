"""The trained weights as Hugging Face safetensors: each pipeline stage writes its own files."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sft_fast.megatron.hf import (
    gather_shards,
    matrix_of,
    merge_shards,
    named_rules,
    shard_of,
)
from sft_fast.megatron.model import SFTModel
from sft_fast.megatron.parallel import Parallel
from sft_fast.models.architecture import Architecture
from sft_fast.models.families import HEAD, Rule
from sft_fast.models.weight_files import (
    INDEX_FILE,
    WEIGHTS_FILE,
    open_safetensors,
    tensor_records,
)
from sft_fast.models.weights import is_carried
from sft_fast.runtime.phases import no_report

SHARD_BYTES = 5 * 10**9


def export_weights(
    models: Sequence[SFTModel],
    folder: Path,
    architecture: Architecture,
    parallel: Parallel,
    dtype: torch.dtype,
    tensor_done: Callable[[], None] = no_report,
    origin: Path | None = None,
) -> None:
    """Writes *.safetensors and their index to `folder`; every rank must call it.

    The first rank of each pipeline stage writes that stage's files, and one rank for each part of
    the experts, so `folder` must be on a file system that they share.

    Args:
        models: what `build_model` returned.
        folder: exists.
        architecture: of the models.
        parallel: this rank's place.
        dtype: of the files, but for what is fp32 in all of them.
        tensor_done: called after each tensor and each file, see runtime.phases.
        origin: directory of the weights that were trained, with layers that were not.
    """
    prefix = f"stage{parallel.pp_rank + 1:02d}-part{parallel.ep_rank + 1:02d}"
    writer = ShardWriter(folder, prefix, tensor_done)
    owned = [(model, *named) for model in models for named in named_rules(model, architecture)]
    for model, name, rule in owned:
        if not (parallel.edp_rank == 0 if rule.is_expert else parallel.is_first_replica):
            continue
        own = merged_matrix(model, name, rule)
        shards = gather_shards(own, parallel, rule.is_expert)
        is_tied_copy = name == HEAD and architecture.tie_word_embeddings
        tensor_done()
        if shard_of(rule, parallel)[1] != 0 or is_tied_copy:
            continue
        tensors = merge_shards(rule, shards, architecture)
        for source, tensor in zip(rule.sources, tensors, strict=True):
            writer.add(source, tensor.to("cpu", torch.float32 if rule.is_buffer else dtype))
    if origin is not None and parallel.is_main and architecture.num_mtp_layers:
        for name, record in tensor_records(origin).items():
            if is_carried(name, architecture):
                writer.add(name, open_safetensors(record.path, "pt").get_tensor(name))
                tensor_done()
    writer.flush()
    write_index(writer, folder, parallel)


def merged_matrix(model: SFTModel, name: str, rule: Rule) -> Tensor:
    """What the rule is about of a parameter or buffer, in its shape; with LoRA adapters the fp32
    sum with them [out, in]."""
    module_name, _, attribute = name.rpartition(".")
    module: Any = model.get_submodule(module_name)
    if attribute == "weight" and hasattr(module, "merged_weight"):
        return module.merged_weight()
    if rule.matrix is not None and hasattr(module, "merged_matrix"):
        return module.merged_matrix(attribute, rule.matrix)
    return matrix_of(rule, getattr(module, attribute).detach())


class ShardWriter:
    """Collects tensors and writes a safetensors file whenever SHARD_BYTES are full."""

    def __init__(self, folder: Path, prefix: str, tensor_done: Callable[[], None]):
        self.folder, self.prefix, self.tensor_done = folder, prefix, tensor_done
        self.pending: dict[str, Tensor] = {}
        self.pending_bytes = 0
        self.file_of: dict[str, str] = {}
        self.total_bytes = 0
        self.num_files = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes a tensor of any shape; writes a file when enough are there."""
        num_bytes = tensor.numel() * tensor.element_size()
        if self.pending_bytes + num_bytes > SHARD_BYTES:
            self.flush()
        self.pending[name] = tensor.contiguous()
        self.pending_bytes += num_bytes
        self.total_bytes += num_bytes

    def flush(self) -> None:
        """Writes the tensors that wait."""
        if not self.pending:
            return
        self.num_files += 1
        file = f"model-{self.prefix}-{self.num_files:05d}.safetensors"
        save_tensors(self.pending, self.folder / file)
        self.tensor_done()
        self.file_of.update(dict.fromkeys(self.pending, file))
        self.pending, self.pending_bytes = {}, 0


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes tensors, of any shape, to one file; raises OSError where that fails."""
    path.touch()
    mode = path.stat().st_mode  # as the umask says; safetensors would leave it to its owner alone
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error
    path.chmod(mode)


def write_index(writer: ShardWriter, folder: Path, parallel: Parallel) -> None:
    """The main rank collects what each rank wrote; a lone file needs no index."""
    parts: list[Any] = [None] * parallel.world_size
    dist.all_gather_object(parts, (writer.file_of, writer.total_bytes))
    if not parallel.is_main:
        return
    weight_map = {name: file for file_of, _ in parts for name, file in file_of.items()}
    if len(set(weight_map.values())) == 1:
        (folder / next(iter(weight_map.values()))).rename(folder / WEIGHTS_FILE)
        return
    total_bytes = sum(num_bytes for _, num_bytes in parts)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
