"""Where a run stands, as a file of each checkpoint."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STATE_FILE = "train_state.json"


@dataclass(frozen=True)
class TrainState:
    """Where a run stands; the data position follows from `step` alone."""

    step: int
    """Optimizer steps done, skipped ones included."""
    fields: dict[str, str]
    """What the weights and the order of the data depend on; see fingerprint.run_fields."""
    first_data_step: int = 0
    """Step at which the present data began; later than 0 after a change that was allowed."""
    guard: dict[str, Any] = field(default_factory=dict)
    """What the numerical guard remembers; see guard.Guard."""
    early_stopping: dict[str, Any] = field(default_factory=dict)
    """How the evaluations so far compare; see evaluation.early_stopping."""
    resumed_from: str = ""
    """The checkpoint that `checkpoint.resume` named; "" = this run began at step 0."""
    data: dict[str, Any] = field(default_factory=dict)
    """What an export says of the data; see data.export_metadata. {} in checkpoints of before."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return folder / f"step_{step:08d}"


def read_train_state(checkpoint: Path) -> TrainState:
    """Raises ValueError when `checkpoint` is not a checkpoint of this version."""
    path = checkpoint / STATE_FILE
    try:
        return TrainState(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"checkpoint.resume: {checkpoint} is not a checkpoint: {error}") from None
