"""The directory of a run: the names in it, and what a run has left there. Nothing imports torch."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from sft_fast.files import read_json

MANIFEST_FILE = "manifest.json"
HEARTBEAT_LOST_S = 60.0
EXPORTED_FILE = "exported.json"
"""In a run directory: the `export_record` of its export."""


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
        latest = {}
        for number, record in enumerate(self.records):
            if record["kind"] == kind:
                latest[record.get("step", -1 - number)] = record
        if kind in ("step", "eval"):
            return [latest[key] for key in sorted(latest)]
        return [*latest.values()]

    def last(self, kind: str) -> dict[str, Any] | None:
        """The newest record of a kind."""
        return next((r for r in reversed(self.records) if r["kind"] == kind), None)

    @property
    def checkpoints(self) -> list[Path]:
        """Oldest first, whole or damaged."""
        return list_checkpoints(self.path / "checkpoints")

    @property
    def exports(self) -> list[Path]:
        """Models and adapters, made by the run or by `sft_fast export`."""
        own = [self.path / "export", self.path / "adapter"]
        return [path for path in own if path.is_dir()] + later_exports(self.path)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be, in a folder of checkpoints."""
    return folder / f"step_{step:08d}"


def checkpoint_step(path: Path) -> int | None:
    """The step of a checkpoint, by its name; None for a path that is named otherwise."""
    match = re.fullmatch(r"step_(\d+)", path.name, re.ASCII)
    return int(match[1]) if match else None


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first, whole or damaged."""
    steps = {path: checkpoint_step(path) for path in folder.glob("step_*")}
    # By number: the names have eight digits at least, not at most.
    named = ((step, path) for path, step in steps.items() if step is not None)
    return [path for _, path in sorted(named)]


def export_path(run: Path, step: int) -> Path:
    """Where `sft_fast export` puts the model of a step, in a run directory."""
    return run / f"export_{step}"


def export_record(export: Path, checkpoint: Path) -> dict[str, str]:
    """Of which checkpoint an export was made; both by their manifests, which hold all hashes.

    Times of files would not do: copies have other ones.
    """
    files = {"export": export / MANIFEST_FILE, "checkpoint": checkpoint / MANIFEST_FILE}
    return {name: xxhash.xxh3_128_hexdigest(path.read_bytes()) for name, path in files.items()}


def is_export_of(export: Path, checkpoint: Path) -> bool:
    """Whether an export is the one that was made when the run was at a checkpoint."""
    try:
        return read_json(export.parent / EXPORTED_FILE) == export_record(export, checkpoint)
    except OSError:
        return False


def later_exports(run: Path) -> list[Path]:
    """What `sft_fast export` made in a run directory, by step."""
    steps = {path: path.name.removeprefix("export_") for path in run.glob("export_*")}
    return sorted((path for path in steps if steps[path].isdecimal()), key=lambda p: int(steps[p]))


def read_run(path: Path) -> RunFiles:
    """Reads a run directory, also of a run that is under way, or what was copied of one.

    Raises:
        ValueError: it is not one.
    """
    metrics = path / "metrics.jsonl"
    status, error = read_json(path / "status.json"), read_json(path / "error.json")
    if not metrics.is_file() and status is None and not (path / "checkpoints").is_dir():
        raise ValueError(f"{path} is no run directory: {why_no_run(path)}")
    records = []
    if metrics.is_file():
        for line in metrics.read_bytes().split(b"\n"):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                # The line that is being written, or where a crash cut it off, or a disk spoiled it.
                continue
            if isinstance(record, dict) and "kind" in record:
                records.append(record)
    return RunFiles(path, tuple(records), status, error)


def why_no_checkpoint(path: Path) -> str:
    """What `path` is, where it is no checkpoint; "" where it is one, whole or damaged."""
    if (path / MANIFEST_FILE).is_file():
        return ""
    if not path.exists():
        return f"{path} does not exist"
    if not path.is_dir():
        return f"{path} is a file"
    inside = list_checkpoints(path) or list_checkpoints(path / "checkpoints")
    if inside:
        return f"{path} is not a checkpoint, but contains {', '.join(map(str, inside))}"
    return f"{path} has no {MANIFEST_FILE}; another program, or an earlier version, made it"


def check_resume(resume: str, output: Path) -> None:
    """Looks at what `checkpoint.resume` names; a run that has saved itself goes on from that.

    Raises:
        ValueError: it is no checkpoint.
    """
    if resume in ("auto", "never") or list_checkpoints(output / "checkpoints"):
        return
    check_is_checkpoint(Path(resume))


def check_is_checkpoint(resume: Path) -> None:
    """Raises ValueError where `checkpoint.resume` names none, whole or damaged."""
    if why := why_no_checkpoint(resume):
        raise ValueError(
            f"checkpoint.resume: {why}; expected auto, never, or a checkpoint such as "
            "outputs/my_run/checkpoints/step_00000100"
        )


def why_no_run(path: Path) -> str:
    """Why a path is not the directory of a run, in words."""
    if not path.exists():
        return "it does not exist"
    if not path.is_dir():
        return "it is a file"
    if path.parent.name == "checkpoints":
        return f"it is one checkpoint of a run; the run is {path.parent.parent}"
    if path.name == "checkpoints":
        return f"it holds the checkpoints of a run; the run is {path.parent}"
    return "it has no metrics.jsonl, no status.json and no checkpoints"


def model_folder(path: Path) -> Path:
    """The Hugging Face directory of a run, or `path` itself where it is one.

    Raises:
        ValueError: there is none.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is no directory; expected the output_dir of a run, or a model")
    for folder in (path / "export", path, *reversed(later_exports(path))):
        if (folder / "config.json").is_file():
            return folder
    raise ValueError(
        f"{path} holds no exported model (export/config.json); a run writes it at its end, and "
        f"`sft_fast export {path}` makes one from the newest checkpoint"
    )
