"""`sft_fast status`: where a run stands."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from sft_fast.commands.arguments import Commands, add_run

if TYPE_CHECKING:
    from sft_fast.runtime.run_files import RunFiles


# A run that lives says so every two seconds.
BEATS_WITHIN_S = 3.0


def add(commands: Commands) -> None:
    """Describes `status` to argparse."""
    status = commands.add_parser("status", help="say where a run stands")
    add_run(status)
    status.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> None:
    """Prints where a run stands."""
    from sft_fast.runtime.run_files import read_run

    found = read_run(parsed.run_dir)
    if is_silent(found):
        # The clock of the run's machine may be another: whether it beats shows by itself.
        time.sleep(BEATS_WITHIN_S)
        again = read_run(parsed.run_dir)
        if again.status is not None and again.status != found.status:
            found = replace(again, status=again.status | {"heartbeat": time.time()})
    for name, value in lines(found):
        print(f"{name:<12}{value}")


def lines(files: RunFiles) -> list[tuple[str, str]]:
    """(name, value) of what there is to say."""
    from sft_fast.metrics.format import duration

    told = [("state", state(files))]
    status, step, best = files.status or {}, files.last("step"), files.last("best")
    if status.get("cause"):
        told.append(("cause", str(status["cause"])))
    if files.error is not None and status.get("state") == "failed":
        rank, phase = files.error.get("rank"), files.error.get("phase")
        told.append(("failed on", f"rank {rank} in phase {phase}; see {files.path}/error.json"))
    if step is not None:
        of = f" of {status['num_steps']}" if "num_steps" in status else ""
        told.append(("step", f"{status.get('step', step['step'])}{of}"))
        # None: it was not finite, for which JSON has no word.
        loss = "NaN" if step["loss"] is None else f"{step['loss']:.4f}"
        told.append(("loss", f"{loss} at step {step['step']}"))
        told.append(
            ("speed", f"{step['tokens_per_s']:,.0f} tokens/s, {step['elapsed_s']:.2f} s a step")
        )
    if state(files).startswith("running") and status.get("eta_s") is not None:
        told.append(("eta", duration(status["eta_s"])))
    evaluations = files.of_kind("eval")
    if evaluations:
        told.append(
            ("eval", ", ".join(f"{e['loss']:.4f} at {e['step']}" for e in evaluations[-3:]))
        )
    if best is not None:
        told.append(("best", f"{best['metric']} {best['value']:.4f} at step {best['step']}"))
    if status.get("failed_saves"):
        told.append(
            ("warning", f"saves that failed in a row: {status['failed_saves']}; see the log")
        )
    names = [path.name for path in files.checkpoints]
    told.append(("checkpoints", ", ".join(names) or "none"))
    if (files.path / "export" / "config.json").is_file():
        told.append(("export", str(files.path / "export")))
    return told


def state(files: RunFiles) -> str:
    """The state in status.json; a run that says it runs but is silent has died."""
    status = files.status
    if status is None:
        return "unknown: no status.json"
    if is_silent(files):
        silent_s = abs(time.time() - status.get("heartbeat", 0))
        return f"lost: silent for {silent_s:,.0f} s; rerun the same command to resume"
    if status["state"] == "running":
        return "running" if "phase" not in status else f"running ({status['phase']})"
    return str(status["state"])


def is_silent(files: RunFiles) -> bool:
    """Whether a run that says it runs has its last heartbeat far from now, by our clock."""
    from sft_fast.runtime.run_files import HEARTBEAT_LOST_S

    status = files.status or {}
    silent_s = abs(time.time() - status.get("heartbeat", 0))
    return status.get("state") in ("running", "stopping") and silent_s > HEARTBEAT_LOST_S
