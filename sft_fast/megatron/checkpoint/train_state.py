"""Where a run stands, as a file of each checkpoint. Nothing here imports torch."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

STATE_FILE = "train_state.json"
FORMAT_VERSION = 1
"""Of a whole checkpoint: this file, and what shards.py writes beside it. Another number for a
checkpoint that this code could not load, or not as it was meant."""


@dataclass(frozen=True)
class TrainState:
    """Where a run stands; the position in stored data follows from `step` alone."""

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
    router: dict[str, Any] = field(default_factory=dict)
    """What the auxiliary loss of the next step needs; see expert_load.ExpertLoad.state."""
    resumed_from: str = ""
    """The checkpoint that `checkpoint.resume` named; "" = this run began at step 0."""
    data: dict[str, Any] = field(default_factory=dict)
    """What an export says of the data; see data.export_metadata. {} = the export reads the data."""

    @property
    def data_step(self) -> int:
        """Steps made with the present data."""
        return self.step - self.first_data_step


def state_text(state: TrainState) -> str:
    """The content of the file."""
    return json.dumps({"version": FORMAT_VERSION, **asdict(state)}) + "\n"


def read_train_state(checkpoint: Path) -> TrainState:
    """Raises ValueError where `checkpoint` is none, or of another format version."""
    try:
        fields = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        # The first version did not write its number.
        version = fields.pop("version", 1)
        if version == FORMAT_VERSION:
            return TrainState(**fields)
    except (OSError, AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"checkpoint.resume: {checkpoint} is not a checkpoint: {error}") from None
    raise ValueError(
        f"checkpoint.resume: {checkpoint} has format version {version}, this sft_fast reads "
        f"{FORMAT_VERSION}; resume with the sft_fast that wrote it, or export there and start from "
        "the exported model (model.path)"
    )
