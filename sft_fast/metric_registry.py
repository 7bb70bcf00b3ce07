"""Evaluation metrics of your own: a function of one sample's supervised tokens.

Name the file in the config's `plugins` and the metric in `evaluation.metrics`:

    @register_metric("whole_answer", greater_is_better=True)
    def whole_answer(sample: SampleOutputs) -> tuple[float, float]:
        return float(sample.correct.all()), 1.0
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    MetricFunction = Callable[["SampleOutputs"], tuple[float, float]]

BUILT_IN = {"loss": False, "perplexity": False, "accuracy": True}
"""Name -> whether a greater value is better."""


@dataclass(frozen=True)
class SampleOutputs:
    """What the model says of one sample's supervised tokens, in their order, on the CPU."""

    labels: Tensor
    """int64 [n]: the expected tokens."""
    logprobs: Tensor
    """fp32 [n]: log p(label), nats."""
    entropies: Tensor
    """fp32 [n]: entropy of the prediction, nats."""
    correct: Tensor
    """bool [n]: the label is the most likely token."""


@dataclass(frozen=True)
class Metric:
    """A registered metric."""

    name: str
    function: MetricFunction
    greater_is_better: bool


_registered: dict[str, Metric] = {}


def register_metric(
    name: str, *, greater_is_better: bool
) -> Callable[[MetricFunction], MetricFunction]:
    """Returns a decorator that makes a function the metric `name`.

    The function gets the SampleOutputs of one sample with at least one supervised token and
    returns (numerator, denominator). The metric is the sum of the numerators over the samples
    divided by the sum of the denominators.

    Args:
        name: value in `evaluation.metrics`.
        greater_is_better: what early stopping and the best checkpoint go by.

    Raises:
        ValueError: the name is empty or taken.
    """

    def register(function: MetricFunction) -> MetricFunction:
        if not name:
            raise ValueError("a metric was registered without a name for evaluation.metrics")
        taken = _registered.get(name)
        if name in BUILT_IN or (taken is not None and taken.function is not function):
            raise ValueError(f"the metric name {name!r} is taken; choose another")
        _registered[name] = Metric(name, function, greater_is_better)
        return function

    return register


def get_metric(name: str) -> Metric:
    """Returns the metric `name`.

    Raises:
        ValueError: there is none; the message lists all names.
    """
    if name not in _registered:
        names = ", ".join(sorted(_registered)) or "none"
        raise ValueError(
            f"evaluation.metrics: no metric {name!r}; registered: {names}. "
            "A file that calls register_metric is loaded with plugins=[path.py]"
        )
    return _registered[name]


def is_greater_better(name: str) -> bool:
    """Direction of a built-in or registered metric."""
    return BUILT_IN[name] if name in BUILT_IN else get_metric(name).greater_is_better
