"""Copies of the metrics to TensorBoard, wandb, trackio or mlflow; each imported only when named.

They get numbers and the configuration, never the command line or the environment.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from sft_fast.config.schema import Config
from sft_fast.config.sections import MetricsConfig
from sft_fast.errors import first_line
from sft_fast.metrics.choices import TrackerName
from sft_fast.redact import redact_values

Settings = dict[str, Any]
"""The configuration as "optim.lr": 1e-5 and so on, without secrets."""


class Tracker(Protocol):
    """Where numbers go."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Takes one point of each curve."""

    def close(self) -> None:
        """Ends the run there."""


def check_trackers(metrics: MetricsConfig) -> None:
    """Raises ValueError where a tracker's library is missing; every rank finds out by itself."""
    for name in metrics.trackers:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"metrics.trackers: {name} is not installed: pip install 'sft-fast[{name}]'"
            )


def open_trackers(config: Config, log: Callable[[str], None]) -> list[Tracker]:
    """Starts the trackers of `metrics.trackers`; one that does not start is told to `log`."""
    settings = dict(flat(redact_values(config.model_dump())))
    metrics, opened = config.metrics, []
    for name in metrics.trackers:
        try:
            opened.append(TRACKERS[name](metrics, config.output_dir, settings))
        # A service that is away must not keep a run from going on.
        except Exception as error:
            log(
                f"warning: metrics.trackers: {name} did not start: {first_line(error)}; the run "
                "goes on without it"
            )
    return opened


class TensorBoard:
    """Event files in <output_dir>/tensorboard."""

    def __init__(self, metrics: MetricsConfig, output_dir: str, settings: Settings) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(Path(output_dir) / "tensorboard"))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Writes one point of each curve."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is buffered."""
        self._writer.close()


class Wandb:
    """A run of Weights & Biases; the key comes from the environment or `wandb login`."""

    def __init__(self, metrics: MetricsConfig, output_dir: str, settings: Settings) -> None:
        import wandb

        self._run = wandb.init(
            project=metrics.project,
            name=run_name(metrics, output_dir),
            dir=output_dir,
            config=settings,
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Sends one point of each curve."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


class Trackio:
    """A run of trackio, which keeps it on this machine."""

    def __init__(self, metrics: MetricsConfig, output_dir: str, settings: Settings) -> None:
        import trackio

        self._trackio = trackio
        trackio.init(
            project=metrics.project,
            name=run_name(metrics, output_dir),
            config=settings,
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Writes one point of each curve."""
        self._trackio.log(dict(values), step=step)

    def close(self) -> None:
        """Ends the run."""
        self._trackio.finish()


class Mlflow:
    """A run of MLflow; MLFLOW_TRACKING_URI says where."""

    def __init__(self, metrics: MetricsConfig, output_dir: str, settings: Settings) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(metrics.project)
        mlflow.start_run(run_name=run_name(metrics, output_dir))
        mlflow.log_params(settings)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Sends one point of each curve."""
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        """Ends the run."""
        self._mlflow.end_run()


TRACKERS: dict[TrackerName, Callable[[MetricsConfig, str, Settings], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
    "mlflow": Mlflow,
}


def run_name(metrics: MetricsConfig, output_dir: str) -> str:
    """The run's name in trackers."""
    return metrics.run_name or Path(output_dir).name


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields ("optim.lr", 1e-5) and so on."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
