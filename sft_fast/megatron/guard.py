"""The numerical guard: which optimizer steps are not taken, and what is kept of them.

It judges values that are equal on every rank and on the host already, so all ranks agree without
being asked. Nothing here imports torch.
"""

import json
import math
import statistics
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from sft_fast.config.sections import GuardConfig
from sft_fast.data.memory_store import MemoryStore
from sft_fast.data.store import TokenStore
from sft_fast.metrics.format import finite
from sft_fast.metrics.writer import MetricsWriter, StepOutcome, StepReason

# Standard deviations of a normal distribution per median absolute deviation.
MAD_TO_SIGMA = 1.4826
# A spike also stands out in absolute terms: converged runs have a tiny spread.
LEAST_LOSS_JUMP = 1.0
LEAST_GRAD_FACTOR = 10.0


class Guard:
    """Remembers recent losses and gradient norms; the same on every rank."""

    def __init__(self, config: GuardConfig, clip_grad: float, saved: dict[str, Any]):
        """
        Args:
            config: limits and what to do beyond them.
            clip_grad: gradient norms below it are no spikes; clipping makes larger ones harmless
                only in length, not in direction.
            saved: `state` of the run that is continued, or {}.
        """
        self.config, self.clip_grad = config, clip_grad
        self.losses = deque(saved.get("losses", []), config.window)
        self.grad_norms = deque(saved.get("grad_norms", []), config.window)
        self.num_skipped: int = saved.get("num_skipped", 0)
        """Steps skipped in a row."""

    def state(self) -> dict[str, Any]:
        """To be saved: a resumed run must judge as the unbroken one does."""
        return {
            "losses": list(self.losses),
            "grad_norms": list(self.grad_norms),
            "num_skipped": self.num_skipped,
        }

    def warning(self, loss: float, grad_norm: float) -> str:
        """What is wrong with a step; "" if nothing is."""
        for name, value in (("loss", loss), ("grad_norm", grad_norm)):
            if not math.isfinite(value):
                return f"{name} is {value}"
        if self.config.on_spike == "ignore":
            return ""
        if self.is_spike(loss, self.losses, statistics_floor(self.losses) + LEAST_LOSS_JUMP):
            return f"loss {loss:.4g} is a spike; the median is {statistics.median(self.losses):.4g}"
        floor = max(self.clip_grad, LEAST_GRAD_FACTOR * statistics_floor(self.grad_norms))
        if self.is_spike(grad_norm, self.grad_norms, floor):
            median = statistics.median(self.grad_norms)
            return f"grad_norm {grad_norm:.4g} is a spike; the median is {median:.4g}"
        return ""

    def is_spike(self, value: float, history: deque[float], floor: float) -> bool:
        """Whether a value is far above the recent ones, and above the floor."""
        if len(history) < self.config.min_history or value <= floor:
            return False
        median = statistics.median(history)
        spread = statistics.median(abs(old - median) for old in history)
        return value > median + self.config.spike_sigmas * MAD_TO_SIGMA * spread

    def judge(self, loss: float, grad_norm: float) -> tuple[StepReason, str]:
        """Decides about one update, and says in words what is unusual about it.

        Remembers the values of steps that it lets happen.
        """
        warning = self.warning(loss, grad_norm)
        is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if warning and not (is_finite and self.config.on_spike == "warn"):
            self.num_skipped += 1
            return StepReason.REFUSED, warning
        self.num_skipped = 0
        self.losses.append(loss)
        self.grad_norms.append(grad_norm)
        return (StepReason.WARNED if warning else StepReason.UPDATED), warning


def statistics_floor(history: deque[float]) -> float:
    """The median, 0 without history."""
    return statistics.median(history) if history else 0.0


def check_limit(guard: Guard, step: int, warning: str, folder: Path) -> None:
    """Raises ValueError after `guard.max_skips` steps in a row that were not taken."""
    most = guard.config.max_skips
    if guard.num_skipped >= most:
        raise ValueError(
            f"guard: {most} steps in a row were skipped, the last is step {step}: {warning}. "
            f"Their samples are in {folder}. Look at them, lower optim.lr, or set "
            "guard.on_spike=warn if these are no spikes; the last checkpoint is from before"
        )


def report_warning(
    step: int,
    outcome: StepOutcome,
    sample_ids: NDArray[np.int64],
    store: TokenStore | MemoryStore,
    folder: Path,
    metrics: MetricsWriter,
) -> None:
    """Says what is wrong and keeps what the step was made of: `folder/step_<n>.json`, and its
    tokens as safetensors.

    The tensors: tokens uint32 [total], supervised bool [total], lengths int64 [samples].
    """
    if not metrics.is_main:
        return
    verb = "warning" if outcome.updated else "skipped"
    metrics.write("guard", step=step, **outcome.figures())
    metrics.log(f"step {step} {verb}: {outcome.warning}; its samples: {folder}")
    try:
        keep_samples(step, outcome, [int(sample) for sample in sample_ids], store, folder)
    except OSError as error:
        metrics.log(f"warning: the samples of step {step} could not be written: {error}")


def keep_samples(
    step: int, outcome: StepOutcome, ids: list[int], store: TokenStore | MemoryStore, folder: Path
) -> None:
    """Writes the two files of `report_warning`.

    Raises:
        OSError: the disk is full or not writable.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values = {name: finite(value) for name, value in outcome.figures().items()}
    record = {
        "step": step,
        **values,
        "sample_ids": ids,
        "origins": [store.origin(sample) for sample in ids],
    }
    name = f"step_{step:08d}"
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    samples = [store.sample(sample) for sample in ids]
    tensors = {
        "tokens": np.concatenate([tokens for tokens, _ in samples]),
        "supervised": np.concatenate([mask for _, mask in samples]),
        "lengths": store.lengths[ids].astype(np.int64),
    }
    (folder / f"{name}.safetensors").write_bytes(save(tensors))
