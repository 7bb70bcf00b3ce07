"""Choices of the config section `metrics`; imports nothing, because config imports it."""

from typing import Literal

TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]
"""An entry of `metrics.trackers`: the name of its package, with a class in metrics/trackers.py."""
