"""One line per step for the eye, one JSON object per step for everything else."""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sft_fast.packing import StepCounts


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave; equal on every rank."""

    loss: float
    """Mean over the global batch's supervised tokens, nats."""
    grad_norm: float
    lr: float
    was_skipped: bool
    """True when fp16 loss scaling overflowed and the weights did not move."""


class MetricsWriter:
    """Appends to `metrics.jsonl` and prints; does nothing on ranks that are not the main one."""

    def __init__(self, folder: Path, is_main: bool):
        self.is_main = is_main
        self.file = None
        if is_main:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = (folder / "metrics.jsonl").open("a", encoding="utf-8")

    def write(self, kind: str, **values: Any) -> None:
        """Appends one record; `kind` names it ("plan", "step", "eval", ...).

        NaN and infinity are written as null: they are not JSON.
        """
        if self.file is None:
            return
        record = {"kind": kind, "time": round(time.time(), 3), **values}
        clean = {key: finite(value) for key, value in record.items()}
        self.file.write(json.dumps(clean) + "\n")
        self.file.flush()

    def say(self, text: str) -> None:
        if self.is_main:
            print(text, flush=True)

    def step(
        self, step: int, num_steps: int, result: StepResult, counts: StepCounts, elapsed_s: float
    ) -> None:
        """Reports one optimizer step; tokens per second are over all ranks."""
        supervised_per_s = counts.num_supervised / elapsed_s
        tokens_per_s = counts.num_tokens / elapsed_s
        self.write(
            "step",
            step=step,
            **asdict(result),
            **asdict(counts),
            elapsed_s=elapsed_s,
            tokens_per_s=tokens_per_s,
            supervised_tokens_per_s=supervised_per_s,
        )
        skipped = "  SKIPPED (fp16 overflow)" if result.was_skipped else ""
        self.say(
            f"step {step}/{num_steps}  loss {result.loss:.4f}  lr {result.lr:.2e}  "
            f"grad_norm {result.grad_norm:.3f}  samples {counts.num_samples}  "
            f"tokens/s {tokens_per_s:,.0f}  supervised/s {supervised_per_s:,.0f}{skipped}"
        )

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
