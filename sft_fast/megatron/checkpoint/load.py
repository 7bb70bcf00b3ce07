"""Loading of checkpoints: which one a run resumes from, whether it is whole, its state."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.nn import ModuleList

from sft_fast.errors import DamageError
from sft_fast.megatron.checkpoint.optimizer_shards import (
    SHARDING,
    is_distributed,
    keep_options,
    state_of_parts,
    want_optimizer,
    want_weights,
)
from sft_fast.megatron.checkpoint.reading import ShardReader, read_common, request_state
from sft_fast.megatron.checkpoint.state import model_weights, named_chunks
from sft_fast.megatron.checkpoint.train_state import read_train_state
from sft_fast.megatron.exchange import StoreExchange
from sft_fast.megatron.model import unwrap
from sft_fast.megatron.optim import fuse_update, separate_step_counts
from sft_fast.runtime.manifest import (
    SHARD_SUFFIX,
    Damage,
    difference,
    find_damage,
    read_manifest,
    share_of,
)
from sft_fast.runtime.phases import no_report
from sft_fast.runtime.run_files import check_is_checkpoint


@dataclass
class CheckpointDamageError(DamageError):
    """A checkpoint turned out damaged when it was loaded; the model holds parts of it."""

    checkpoint: Path
    damages: list[str]
    """As texts, the same on every rank."""

    def __str__(self) -> str:
        return f"{self.checkpoint} is damaged:\n  " + "\n  ".join(self.damages)


def quick_damage(checkpoint: Path) -> list[Damage]:
    """Files of another size than they should have."""
    return find_damage(checkpoint, is_hashed=lambda name: False)


def is_small(name: str) -> bool:
    """Whether a file of a checkpoint holds no tensors; a load hashes those that do."""
    return not name.endswith(SHARD_SUFFIX)


def newest_whole_checkpoint(
    checkpoints: list[Path],
    log: Callable[[str], None],
    timeout_s: float,
    damaged: Mapping[Path, list[str]] = MappingProxyType({}),
) -> Path | None:
    """The newest of `checkpoints` (oldest first) without damage, the content of tensors aside,
    which is hashed when it is loaded; the ranks share the reading.

    Args:
        checkpoints: their directories.
        log: told of what is damaged.
        timeout_s: how long a rank waits for the others.
        damaged: those that are known to be, with what is; `log` was told.

    Raises:
        DamageError: there are checkpoints, but all are damaged; names every damaged file.
    """
    everything: list[str] = []
    for checkpoint in reversed(checkpoints):
        if (known := damaged.get(checkpoint)) is not None:
            everything += known
            continue
        damages = damage_of(checkpoint, timeout_s, is_small)
        if not damages:
            return checkpoint
        everything += damages
        log(unused(checkpoint, damages))
    if everything:
        raise DamageError(
            "no checkpoint is whole; delete them to start anew:\n  " + "\n  ".join(everything)
        )
    return None


def unused(checkpoint: Path, damages: list[str]) -> str:
    """What is said of a damaged checkpoint."""
    return f"warning: {checkpoint} is damaged and not used:\n  " + "\n  ".join(damages)


def damage_of(
    checkpoint: Path, timeout_s: float, is_hashed: Callable[[str], bool] = lambda name: True
) -> list[str]:
    """What is wrong with its files, as texts; every rank calls it, and reads a part.

    Args:
        checkpoint: the directory.
        timeout_s: how long a rank waits for the others.
        is_hashed: as for `find_damage`.
    """
    exchange = StoreExchange(f"verify/{checkpoint.name}", timeout_s)
    damages = find_damage(checkpoint, exchange.rank, exchange.world_size, is_hashed)
    return everyones(exchange, damages)


def everyones(exchange: StoreExchange, damages: list[Damage]) -> list[str]:
    """The damages that the ranks have found, as texts."""
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
    timeout_s: float = math.inf,
) -> None:
    """Restores weights, optimizer and schedule; bit-identical when the layout is the same.

    Every rank calls it, reads what it owns, and hashes its share of the files while it does.

    Args:
        checkpoint: the directory.
        model: what it is loaded into.
        optimizer: of the model.
        schedule: of the optimizer.
        tensor_done: called after each tensor, see runtime.phases.
        timeout_s: how long a rank waits for the others.

    Raises:
        CheckpointDamageError: a file is not what was written; on every rank.
        ValueError: the checkpoint does not hold what the model needs.
    """
    exchange = StoreExchange(f"load/{checkpoint.name}", timeout_s)
    problem: ValueError | OSError | None = None
    try:
        found = fill_run(checkpoint, model, optimizer, schedule, exchange, tensor_done)
    except (ValueError, OSError) as error:
        # Damage may be the reason: the other ranks must hear of it.
        problem = error
        found = find_damage(checkpoint, exchange.rank, exchange.world_size)
    if damages := everyones(exchange, found):
        raise CheckpointDamageError(checkpoint, damages)
    if problem is not None:
        raise problem


def fill_run(
    checkpoint: Path,
    model: ModuleList,
    optimizer: MegatronOptimizer,
    schedule: OptimizerParamScheduler,
    exchange: StoreExchange,
    tensor_done: Callable[[], None],
) -> list[Damage]:
    """`load_checkpoint` of one rank; returns the damage of its share."""
    weights, common = model_weights(model), read_common(checkpoint)
    records = read_manifest(checkpoint)
    shards = [name for name in records if not is_small(name)]
    reader = ShardReader(checkpoint, tensor_done)
    others = want_chunks(model, weights, reader)
    if is_distributed(optimizer):
        finish = want_optimizer(optimizer, common["optimizer"], weights, reader)
    else:
        request = optimizer.sharded_state_dict(weights, is_loading=True, metadata=dict(SHARDING))
        state = request_state(reader, common, {"optimizer": request})

        def finish() -> None:
            loaded = state()["optimizer"]
            add_step_zero(optimizer, loaded)
            keep_options(optimizer, loaded)
            optimizer.load_state_dict(loaded)

    present = reader.fill(share_of(shards, exchange.rank, exchange.world_size))
    found = (difference(checkpoint, records[record.name], record) for record in present)
    if damages := [damage for damage in found if damage is not None]:
        return damages
    load_others(model, others)
    finish()
    fuse_update(optimizer)
    separate_step_counts(optimizer)
    schedule.load_state_dict(common["lr_schedule"])
    return []


def load_trained_weights(
    checkpoint: Path, model: ModuleList, tensor_done: Callable[[], None] = no_report
) -> None:
    """Restores the weights alone; of a run with LoRA those of the adapters."""
    reader = ShardReader(checkpoint, tensor_done)
    others = want_chunks(model, model_weights(model), reader)
    reader.fill()
    load_others(model, others)


def want_chunks(
    model: ModuleList, weights: Mapping[str, Any], reader: ShardReader
) -> dict[str, dict[str, Any]]:
    """Has the reader fill the weights of each chunk.

    Args:
        model: the chunks of this rank.
        weights: of `model_weights`.
        reader: of the checkpoint.

    Returns: what is no tensor, for `load_others`.
    """
    return {name: want_weights(weights[name], reader) for name, _ in named_chunks(model)}


def load_others(model: ModuleList, others: Mapping[str, dict[str, Any]]) -> None:
    """Puts what is no tensor into each chunk."""
    for name, chunk in named_chunks(model):
        unwrap(chunk).load_state_dict(others[name], strict=False)


def add_step_zero(optimizer: MegatronOptimizer, loaded: dict[Any, Any]) -> None:
    """Adds the step count that megatron leaves out where all steps so far were skipped; torch's
    Adam does not load without it."""
    for part, state in state_of_parts(optimizer, loaded):
        if isinstance(part.optimizer, torch.optim.Adam):
            of_parameters = state.get("optimizer", state)["state"]
            of_parameters.setdefault("common_step", torch.tensor(0.0))
