"""One line per step for the eye, one JSON object per step for everything else."""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class StepCounts:
    """What the packing plan knows of a step before it runs; over all data-parallel ranks."""

    num_samples: int
    num_tokens: int
    """Real tokens, prompt and answer."""
    num_supervised: int
    """Tokens that train."""
    num_slots: int
    """Tokens of the packed rows, padding included."""


class MetricsWriter:
    """Appends to `metrics.jsonl` and prints; does nothing on ranks that are not the main one."""

    def __init__(self, folder: Path, is_main: bool):
        self.is_main = is_main
        self.file = None
        if is_main:
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

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def step_line(
    step: int, num_steps: int, loss: float, lr: float, grad_norm: float, rates: dict[str, float]
) -> str:
    """The human line of one optimizer step."""
    return (
        f"step {step}/{num_steps}  loss {loss:.4f}  lr {lr:.2e}  grad_norm {grad_norm:.3f}  "
        f"supervised/s {rates['supervised_tokens_per_s']:,.0f}  "
        f"tokens/s {rates['tokens_per_s']:,.0f}  padding {rates['padding_share']:.1%}"
    )


def step_rates(counts: StepCounts, elapsed_s: float) -> dict[str, float]:
    """Throughput over all ranks; slot tokens per second would count the padding as work."""
    return {
        "tokens_per_s": counts.num_tokens / elapsed_s,
        "supervised_tokens_per_s": counts.num_supervised / elapsed_s,
        "slot_tokens_per_s": counts.num_slots / elapsed_s,
        "padding_share": 1.0 - counts.num_tokens / max(counts.num_slots, 1),
    }
