"""Loading of checkpoints: which one a run resumes from, whether it is whole, its state."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.nn import ModuleList

from sft_fast.errors import DamageError
from sft_fast.megatron.checkpoint.optimizer_shards import (
    SHARDING,
    is_distributed,
    load_checkpoint_weights,
    load_optimizer,
    state_of_parts,
)
from sft_fast.megatron.checkpoint.shards import ShardReader, load_state, read_common
from sft_fast.megatron.checkpoint.state import model_weights, named_chunks
from sft_fast.megatron.checkpoint.train_state import read_train_state
from sft_fast.megatron.exchange import StoreExchange
from sft_fast.megatron.model import unwrap
from sft_fast.megatron.optim import fuse_update, separate_step_counts
from sft_fast.runtime.manifest import Damage, find_damage
from sft_fast.runtime.phases import no_report
from sft_fast.runtime.run_files import check_is_checkpoint


def quick_damage(checkpoint: Path) -> list[Damage]:
    """Files of another size than they should have."""
    return find_damage(checkpoint, hash_content=False)


def newest_whole_checkpoint(
    checkpoints: list[Path], log: Callable[[str], None], timeout_s: float
) -> Path | None:
    """The newest of `checkpoints` (oldest first) without damage; the ranks share the reading.

    Raises:
        DamageError: there are checkpoints, but all are damaged; names every damaged file.
    """
    everything: list[str] = []
    for checkpoint in reversed(checkpoints):
        damages = damage_of(checkpoint, timeout_s)
        if not damages:
            return checkpoint
        everything += damages
        log(f"warning: {checkpoint} is damaged and not used:\n  " + "\n  ".join(damages))
    if everything:
        raise DamageError(
            "no checkpoint is whole; delete them to start anew:\n  " + "\n  ".join(everything)
        )
    return None


def damage_of(checkpoint: Path, timeout_s: float) -> list[str]:
    """What is wrong with its files, as texts; every rank calls it, and reads a part."""
    exchange = StoreExchange(f"verify/{checkpoint.name}", timeout_s)
    damages = find_damage(checkpoint, exchange.rank, exchange.world_size)
    shares = exchange.all_gather("damage", [str(damage) for damage in damages])
    return sorted({text for share in shares for text in share})


def checkpoints_resumed_from(origin: Path, existing: list[Path]) -> list[Path]:
    """`origin` and what a run that began there has saved since, oldest first: so the command that
    names a checkpoint can be given again after an interruption.

    Args:
        origin: the checkpoint that the run began with.
        existing: the checkpoints in the run's own directory.

    Raises:
        ValueError: `origin` is no checkpoint, or later ones there belong to another run.
    """
    own: list[tuple[int, Path]] = []
    others: list[tuple[int, Path]] = []
    for checkpoint in existing:
        try:
            state = read_train_state(checkpoint)
        except ValueError:
            continue
        begun_at = state.resumed_from
        is_own = begun_at != "" and Path(begun_at).resolve() == origin.resolve()
        (own if is_own else others).append((state.step, checkpoint))
    if not own:
        check_is_checkpoint(origin)
    if not own and not quick_damage(origin):
        step = read_train_state(origin).step
        later = [checkpoint.name for other, checkpoint in others if other > step]
        if later:
            raise ValueError(
                f"checkpoint.resume is {origin}, but {existing[0].parent} holds later checkpoints "
                f"of another run, {', '.join(later)}; move them away, or choose another output_dir"
            )
    return [origin, *(checkpoint for _, checkpoint in own)]


def load_checkpoint(
    checkpoint: Path,
    model: ModuleList,
    optimizer: MegatronOptimizer,
    schedule: OptimizerParamScheduler,
    tensor_done: Callable[[], None] = no_report,
) -> None:
    """Restores weights, optimizer and schedule; bit-identical when the layout is the same.

    Args:
        checkpoint: the directory.
        model: what it is loaded into.
        optimizer: of the model.
        schedule: of the optimizer.
        tensor_done: called after each tensor, see runtime.phases.
    """
    weights = model_weights(model)
    common = read_common(checkpoint)
    with ShardReader(checkpoint, tensor_done) as reader:
        fill_chunks(model, weights, reader)
        if is_distributed(optimizer):
            load_optimizer(optimizer, common["optimizer"], weights, reader)
    if not is_distributed(optimizer):
        request = optimizer.sharded_state_dict(weights, is_loading=True, metadata=dict(SHARDING))
        loaded = load_state(checkpoint, {"optimizer": request}, tensor_done)["optimizer"]
        add_step_zero(optimizer, loaded)
        optimizer.load_state_dict(loaded)
    fuse_update(optimizer)
    separate_step_counts(optimizer)
    schedule.load_state_dict(common["lr_schedule"])


def load_trained_weights(
    checkpoint: Path, model: ModuleList, tensor_done: Callable[[], None] = no_report
) -> None:
    """Restores the weights alone; of a run with LoRA those of the adapters."""
    with ShardReader(checkpoint, tensor_done) as reader:
        fill_chunks(model, model_weights(model), reader)


def fill_chunks(model: ModuleList, weights: Mapping[str, Any], reader: ShardReader) -> None:
    """Reads the weights of each chunk into it.

    Args:
        model: the chunks of this rank.
        weights: of `model_weights`.
        reader: of the checkpoint.
    """
    for name, chunk in named_chunks(model):
        others = load_checkpoint_weights(weights[name], reader)
        unwrap(chunk).load_state_dict(others, strict=False)


def add_step_zero(optimizer: MegatronOptimizer, loaded: dict[Any, Any]) -> None:
    """Adds the step count that megatron leaves out where all steps so far were skipped; torch's
    Adam does not load without it."""
    for part, state in state_of_parts(optimizer, loaded):
        if isinstance(part.optimizer, torch.optim.Adam):
            of_parameters = state.get("optimizer", state)["state"]
            of_parameters.setdefault("common_step", torch.tensor(0.0))
