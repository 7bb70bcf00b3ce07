"""Checkpoints that resume exactly: weights, optimizer, schedule and the position in the data.

A checkpoint is a directory `step_<number>`. It is written under a temporary name and renamed when
every rank is done, so a directory of that name is always whole. Sharding and resharding are
megatron-core's dist_checkpointing: a run may resume with other parallel sizes.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.nn import ModuleList

from sft_fast.megatron.lora import has_adapters, is_adapter
from sft_fast.megatron.model import unwrap
from sft_fast.megatron.optim import torch_adam_parts
from sft_fast.megatron.parallel import Parallel

STATE_FILE = "train_state.json"
# The one optimizer layout that loads at any data-parallel size. megatron adds process groups to the
# mapping it is given, so it gets copies.
SHARDING: Mapping[str, str] = {"distrib_optim_sharding_type": "fully_reshardable"}


@dataclass(frozen=True)
class TrainState:
    """Where a run stands; the data position follows from `step` alone."""

    step: int
    """Optimizer steps done."""
    data_fingerprint: str
    """Identifies the training token store; see TokenStore.fingerprint."""
    plan_fingerprint: str
    """Identifies what else decides the order of the data; see StepPlan.fingerprint."""
    adapter_fingerprint: str = ""
    """Identifies LoRA adapters and what they are added to; see lora.adapter_fingerprint."""


def sharded_state(
    model: ModuleList,
    optimizer: MegatronOptimizer,
    schedule: OptimizerParamScheduler,
    is_loading: bool,
) -> dict[str, Any]:
    """The state dict of this rank, in dist_checkpointing's sharded form.

    With LoRA it holds the adapters and their optimizer state, no base weights.
    """
    weights: Any = {}
    for number, chunk in enumerate(model):
        tensors = unwrap(chunk).sharded_state_dict(metadata=dict(SHARDING))
        if has_adapters(model):
            tensors = {name: tensor for name, tensor in tensors.items() if is_adapter(name)}
        weights[f"chunk{number}"] = tensors
    return {
        "model": weights,
        "optimizer": optimizer.sharded_state_dict(
            weights, is_loading=is_loading, metadata=dict(SHARDING)
        ),
        "lr_schedule": schedule.state_dict(),
    }


def save_checkpoint(
    folder: Path,
    state: TrainState,
    model: ModuleList,
    optimizer: MegatronOptimizer,
    schedule: OptimizerParamScheduler,
    parallel: Parallel,
    keep_last: int,
) -> Path:
    """Writes `folder/step_<n>`, then deletes all but the newest `keep_last` checkpoints.

    Raises:
        OSError: the disk is full or not writable; older checkpoints are untouched.
    """
    final = folder / f"step_{state.step:08d}"
    temporary = folder / f".incomplete_{final.name}"
    if parallel.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    tensors = sharded_state(model, optimizer, schedule, is_loading=False)
    dist_checkpointing.save(tensors, str(temporary), content_metadata=dict(SHARDING))
    dist.barrier()
    if parallel.is_main:
        (temporary / STATE_FILE).write_text(json.dumps(asdict(state), indent=2) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        for old in list_checkpoints(folder)[:-keep_last]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step_*/{STATE_FILE}"))


def read_train_state(checkpoint: Path) -> TrainState:
    """Raises ValueError when `checkpoint` is not a complete checkpoint."""
    path = checkpoint / STATE_FILE
    if not path.is_file():
        raise ValueError(f"checkpoint.resume: {checkpoint} is not a checkpoint (no {STATE_FILE})")
    return TrainState(**json.loads(path.read_text()))


def load_checkpoint(
    checkpoint: Path,
    model: ModuleList,
    optimizer: MegatronOptimizer,
    schedule: OptimizerParamScheduler,
) -> None:
    """Restores weights, optimizer and schedule; bit-identical when the layout is the same."""
    request = sharded_state(model, optimizer, schedule, is_loading=True)
    loaded = dist_checkpointing.load(request, str(checkpoint))
    for number, chunk in enumerate(model):
        weights = loaded["model"][f"chunk{number}"]
        unwrap(chunk).load_state_dict(weights, strict=not has_adapters(model))
    with torch_adam_loads():
        optimizer.load_state_dict(loaded["optimizer"])
    separate_step_counts(optimizer)
    schedule.load_state_dict(loaded["lr_schedule"])


@contextlib.contextmanager
def torch_adam_loads() -> Iterator[None]:
    """Lets megatron's reshardable load work with torch's AdamW.

    torch keeps a step count per parameter, which megatron restores by itself and then, seen in
    0.16.1 and 0.19.2, demands again from the sharded tensors, where it is not.
    """
    original = DistributedOptimizer._set_main_param_and_optimizer_states

    def set_states(self: Any, model_param: Any, tensors: dict[str, torch.Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        restored = {"step": state["step"]} if "step" in state else {}
        original(self, model_param, restored | tensors)

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states
    try:
        yield
    finally:
        DistributedOptimizer._set_main_param_and_optimizer_states = original


def separate_step_counts(optimizer: MegatronOptimizer) -> None:
    """Gives each parameter its own step tensor.

    megatron restores one tensor for all of them; AdamW would then add one to it per parameter.
    """
    for part in torch_adam_parts(optimizer):
        for state in part.state.values():
            state["step"] = state["step"].clone()
