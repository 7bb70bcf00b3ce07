"""A profile of a few steps, as a trace that chrome://tracing and Perfetto open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sft_fast.config.sections import MetricsConfig


class ProfilerWindow:
    """Profiles the steps of `metrics.profile_steps` on the main rank; does nothing without."""

    def __init__(self, metrics: MetricsConfig, output_dir: str, is_main: bool) -> None:
        steps = metrics.profile_steps if is_main else None
        self._first, self._last = steps or (0, 0)
        self._path = Path(output_dir) / "profile.json.gz"
        self._profiler: Any = None

    def before(self, step: int) -> None:
        """Starts in front of the first step; steps count from 1."""
        if step == self._first:
            from torch.profiler import profile

            self._profiler = profile(record_shapes=True, profile_memory=True)
            self._profiler.start()

    def after(self, step: int) -> Path | None:
        """Stops behind the last step; returns the trace that was written then."""
        if self._profiler is None or step != self._last:
            return None
        self._profiler.stop()
        self._profiler.export_chrome_trace(str(self._path))
        self._profiler = None
        return self._path
