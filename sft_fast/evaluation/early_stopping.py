"""How the evaluations of a run compare: the best so far, and when to stop."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class EarlyStopping:
    """What the evaluations have shown so far; part of every checkpoint, so that a resumed run
    stops where the unbroken one does."""

    last_step: int = 0
    """Step of the newest evaluation; 0 = none that counts."""
    best_step: int = 0
    """Step of the best evaluation; 0 = none yet."""
    best: float | None = None
    """Its value."""
    num_since_best: int = 0
    """Evaluations after it."""

    def after(
        self, step: int, value: float, greater_is_better: bool, min_delta: float
    ) -> EarlyStopping:
        """The state after one more evaluation; NaN is never an improvement.

        Args:
            step: optimizer steps done, at least 1.
            value: the metric that decides.
            greater_is_better: its direction.
            min_delta: an improvement is more than this.
        """
        sign = 1.0 if greater_is_better else -1.0
        is_best = not math.isnan(value) and (
            self.best is None or sign * (value - self.best) > min_delta
        )
        if is_best:
            return EarlyStopping(step, step, value, 0)
        return EarlyStopping(step, self.best_step, self.best, self.num_since_best + 1)

    def should_stop(self, patience: int | None) -> bool:
        """Whether training stops: `patience` evaluations in a row were no improvement."""
        return patience is not None and self.num_since_best >= patience
