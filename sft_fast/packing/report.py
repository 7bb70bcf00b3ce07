"""What packing costs and saves: figures for the log, and a picture."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft_fast import _C
from sft_fast.constants import ceil_div, round_up
from sft_fast.packing.balance import balance, imbalance, round_robin
from sft_fast.packing.bins import BinPlan
from sft_fast.packing.steps import StepPlan, check_batch_split


@dataclass(frozen=True)
class PackingReport:
    """The packing of one epoch."""

    strategy: str
    """The strategy in use."""
    reason: str
    """Why it is in use."""
    num_samples: int
    num_tokens: int
    num_supervised: int
    num_bins: int
    """Bins that hold samples."""
    num_empty_bins: int
    """Packs of padding that complete the last step."""
    capacity: int
    """Tokens per bin."""
    alignment_padding: int
    """Tokens of padding inside bins, after samples, because of packing.alignment."""
    tail_padding: int
    """Tokens of padding at the end of bins that hold samples."""
    max_samples_per_bin: int
    """The most samples that a bin holds."""
    length_correlation: float
    """Correlation of log length inside bins: 0 = a bin is a random sample of the data, 1 = short
    samples share bins with short ones only. NaN where no bin holds two samples."""
    max_places_moved: int | None
    """The farthest that a sample moved from its place in the order that the strategy starts from;
    None for strategies that keep no order."""
    cost_imbalance: float
    """Time of a step over that with equal ranks, by the cost model, as bins are assigned."""
    cost_imbalance_round_robin: float
    """The same if ranks took the bins round robin."""
    num_steps: int
    """Steps per epoch."""

    @property
    def lower_bound(self) -> int:
        """Bins that no packing can go below: all tokens laid end to end."""
        return ceil_div(self.num_tokens, self.capacity)

    @property
    def efficiency(self) -> float:
        """lower_bound / num_bins, in (0, 1]."""
        return self.lower_bound / self.num_bins

    @property
    def empty_bin_padding(self) -> int:
        """Tokens of padding in the empty bins that complete the last step."""
        return self.num_empty_bins * self.capacity

    @property
    def padding_share(self) -> float:
        """Share of the capacity that holds no token, empty bins included."""
        padding = self.alignment_padding + self.tail_padding + self.empty_bin_padding
        return padding / self.capacity_tokens

    @property
    def capacity_tokens(self) -> int:
        """Tokens that the bins of an epoch have room for."""
        return (self.num_bins + self.num_empty_bins) * self.capacity

    @property
    def supervised_share(self) -> float:
        """Share of tokens that train."""
        return self.num_supervised / self.num_tokens

    @property
    def samples_per_bin(self) -> float:
        """Mean over the bins that hold samples."""
        return self.num_samples / self.num_bins

    def record(self) -> dict[str, Any]:
        """Returns every figure, for metrics.jsonl."""
        names = (
            *("lower_bound", "efficiency", "padding_share", "empty_bin_padding"),
            *("supervised_share", "samples_per_bin"),
        )
        return asdict(self) | {name: getattr(self, name) for name in names}

    def brief(self) -> str:
        """What a run says of it."""
        return (
            f"{self.num_bins} packs of {self.capacity} by {self.strategy}, "
            f"{self.samples_per_bin:.1f} samples a pack, {self.padding_share:.2%} padding "
            f"({self.causes()}), {self.num_steps} steps an epoch"
        )

    def causes(self) -> str:
        """Shares of padding by what it is for."""
        parts = {
            "alignment": self.alignment_padding,
            "pack ends": self.tail_padding,
            "last step": self.empty_bin_padding,
        }
        return ", ".join(
            f"{name} {part / self.capacity_tokens:.2%}" for name, part in parts.items()
        )

    def __str__(self) -> str:
        moved = "" if self.max_places_moved is None else f", moved <= {self.max_places_moved}"
        return (
            f"{self.num_samples} samples, {self.num_tokens} tokens "
            f"({self.supervised_share:.1%} supervised) in {self.num_bins} packs of {self.capacity} "
            f"(bound {self.lower_bound}, efficiency {self.efficiency:.2%}), "
            f"{self.samples_per_bin:.1f} samples per pack (at most {self.max_samples_per_bin}), "
            f"{self.padding_share:.2%} padding ({self.causes()}), "
            f"{self.num_steps} steps per epoch; {self.strategy}: {self.reason}; "
            f"length correlation {self.length_correlation:.2f}{moved}; "
            f"cost imbalance {self.cost_imbalance:.3f} "
            f"(round robin: {self.cost_imbalance_round_robin:.3f})"
        )


def length_correlation(plan: BinPlan, lengths: NDArray[np.int32]) -> float:
    """Returns the intra-class correlation of log length [samples], the bins being the classes.

    Source: R. A. Fisher's one-way analysis of variance, with the mean class size for unequal
    classes of P. E. Shrout and J. L. Fleiss, "Intraclass correlations", 1979.
    """
    num_samples, num_bins = len(plan.sample_ids), plan.num_bins
    if num_bins < 2 or num_samples == num_bins:
        return float("nan")
    sizes = np.diff(plan.bin_offsets)
    logs = np.log(lengths[plan.sample_ids])
    means = np.add.reduceat(logs, plan.bin_offsets[:-1]) / sizes
    between = (sizes * (means - logs.mean()) ** 2).sum() / (num_bins - 1)
    within = ((logs - np.repeat(means, sizes)) ** 2).sum() / (num_samples - num_bins)
    mean_size = (num_samples - (sizes**2).sum() / num_samples) / (num_bins - 1)
    spread = between + (mean_size - 1) * within
    return float((between - within) / spread) if spread > 0 else float("nan")


def packing_report(steps: StepPlan, dp_size: int = 1, micro_batch_size: int = 1) -> PackingReport:
    """Returns the packing figures of epoch 0.

    Args:
        steps: the plan.
        dp_size: the data-parallel size for which the cost imbalance is computed.
        micro_batch_size: likewise.
    """
    check_batch_split(steps.global_batch_size, 0, dp_size, micro_batch_size)
    plan = steps.plan(0)
    num_tokens = int(steps.lengths.sum(dtype=np.int64))
    num_rounded = int(round_up(steps.lengths, steps.options.alignment).sum(dtype=np.int64))
    costs = [steps.step(step).costs() for step in some_steps(steps)]
    return PackingReport(
        strategy=steps.strategy,
        reason=steps.reason,
        num_samples=len(steps.lengths),
        num_tokens=num_tokens,
        num_supervised=int(steps.supervised.sum(dtype=np.int64)),
        num_bins=plan.num_bins,
        num_empty_bins=steps.num_steps_per_epoch * steps.global_batch_size - plan.num_bins,
        capacity=steps.capacity,
        alignment_padding=num_rounded - num_tokens,
        tail_padding=plan.num_bins * steps.capacity - num_rounded,
        max_samples_per_bin=int(np.diff(plan.bin_offsets).max()),
        length_correlation=length_correlation(plan, steps.lengths),
        max_places_moved=max_places_moved(steps, plan),
        cost_imbalance=float(
            np.mean([imbalance(c, balance(c, dp_size, micro_batch_size)) for c in costs])
        ),
        cost_imbalance_round_robin=float(
            np.mean([imbalance(c, round_robin(len(c), dp_size, micro_batch_size)) for c in costs])
        ),
        num_steps=steps.num_steps_per_epoch,
    )


def some_steps(steps: StepPlan) -> list[int]:
    """Returns at most 64 steps, spread over an epoch."""
    return sorted({int(step) for step in np.linspace(0, steps.num_steps_per_epoch - 1, 64)})


def max_places_moved(steps: StepPlan, plan: BinPlan) -> int | None:
    """Returns how far from its place in the strategy's own order of epoch 0 a sample got."""
    if steps.strategy == "sequential":
        return 0
    if steps.strategy != "window":
        return None
    places = np.empty(len(plan.sample_ids), np.int64)
    places[_C.sample_order(len(places), steps.seed, 0)] = np.arange(len(places))
    return int(np.abs(places[plan.sample_ids] - np.arange(len(places))).max())


def plot_plan(plan: StepPlan, path: Path) -> None:
    """Draws sample lengths, tokens per bin and samples per bin of an epoch.

    Args:
        plan: the plan.
        path: the picture; its suffix decides the format (.png, .svg, .pdf).

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(f"a picture ({path}) needs matplotlib: pip install matplotlib") from None
    bins = plan.plan(0)
    tokens = np.add.reduceat(plan.lengths[bins.sample_ids].astype(np.int64), bins.bin_offsets[:-1])
    report = packing_report(plan)
    panels = (
        (plan.lengths, "tokens per sample", f"{report.num_samples} samples"),
        (tokens, f"tokens per pack of {plan.capacity}", f"efficiency {report.efficiency:.2%}"),
        (
            np.diff(bins.bin_offsets),
            "samples per pack",
            f"{report.num_bins} packs ({plan.strategy})",
        ),
    )
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    for axes, (values, label, title) in zip(figure.subplots(1, 3), panels, strict=True):
        # Few different numbers get a bar each, around them.
        edges = np.arange(values.min(), values.max() + 2) - 0.5
        axes.hist(values, bins=edges if len(edges) <= 64 else 64)
        axes.set(xlabel=label, ylabel="count", title=title)
        # A few packs that are not full would not be seen beside all that are.
        axes.set_yscale("log")
    figure.savefig(path)
