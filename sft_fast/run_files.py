"""What a run has left in its directory, read without torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEARTBEAT_LOST_S = 60.0


@dataclass(frozen=True)
class RunFiles:
    """A run directory.

    Attributes:
        path: the directory.
        records: lines of metrics.jsonl that could be read, oldest first.
        status, error: status.json and error.json; None where there is none.
    """

    path: Path
    records: tuple[dict[str, Any], ...]
    status: dict[str, Any] | None
    error: dict[str, Any] | None

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """Records of a kind, the later one of two for the same step (a resumed run)."""
        found = {}
        for number, record in enumerate(self.records):
            if record["kind"] == kind:
                found[record.get("step", -1 - number)] = record
        return (
            [found[key] for key in sorted(found)] if kind in ("step", "eval") else [*found.values()]
        )

    def last(self, kind: str) -> dict[str, Any] | None:
        """The newest record of a kind."""
        return next((r for r in reversed(self.records) if r["kind"] == kind), None)

    @property
    def checkpoints(self) -> list[Path]:
        """Oldest first, whole or damaged."""
        found = (self.path / "checkpoints").glob("step_*")
        return sorted(path for path in found if path.name[5:].isdecimal())


def read_run(path: Path) -> RunFiles:
    """Reads a run directory, also of a run that is under way.

    Raises:
        ValueError: it is not one.
    """
    metrics = path / "metrics.jsonl"
    status, error = read_object(path / "status.json"), read_object(path / "error.json")
    if not metrics.is_file() and status is None:
        raise ValueError(f"{path} is no run directory: it has no metrics.jsonl and no status.json")
    records = []
    if metrics.is_file():
        for line in metrics.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                # The line that is being written, or where a crash cut it off.
                continue
            if isinstance(record, dict) and "kind" in record:
                records.append(record)
    return RunFiles(path, tuple(records), status, error)


def read_object(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def model_folder(path: Path) -> Path:
    """The Hugging Face directory of a run, or `path` itself where it is one.

    Raises:
        ValueError: there is none.
    """
    for folder in (path / "export", path):
        if (folder / "config.json").is_file():
            return folder
    raise ValueError(
        f"{path} holds no exported model (export/config.json); a run writes it at its end, and "
        f"`sft_fast export {path}` makes it from the newest checkpoint"
    )
