"""Pictures of a run: loss, learning rate, gradient norm and throughput over its steps."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sft_fast.runtime.run_files import RunFiles

Record = dict[str, Any]
BLUE, ORANGE, GREEN, RED = "#2f6fde", "#d9730d", "#2e8b57", "#c4314b"
# The smoothed line remembers a thirtieth of the run.
MEMORIES_A_RUN = 30


def draw_curves(run: RunFiles) -> Figure:
    """Four panels; raises ValueError where there is nothing to draw, or no matplotlib."""
    steps = run.of_kind("step")
    if not steps:
        raise ValueError(f"{run.path} has no steps to draw yet")
    figure = new_figure(11, 7)
    (loss, rate), (norm, speed) = figure.subplots(2, 2)
    draw_loss(loss, steps, run.of_kind("eval"))
    rate.plot(*points(steps, "lr"), color=ORANGE)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    norm.plot(*points(steps, "grad_norm"), color=GREEN, linewidth=1)
    norm.set_yscale("log")
    speed.plot(*points(steps, "tokens_per_s"), color=BLUE, label="all")
    speed.plot(*points(steps, "supervised_tokens_per_s"), color=RED, label="trained")
    speed.set_ylim(0, None)
    speed.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    speed.legend(frameon=False)
    for axes, title in (
        (loss, "loss, nats per trained token"),
        (rate, "learning rate"),
        (norm, "gradient norm"),
        (speed, "tokens per second"),
    ):
        tidy(axes, title, "step")
    return figure


def tidy(axes: Axes, title: str, xlabel: str) -> None:
    """One look for all panels."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(xlabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


def draw_loss(axes: Axes, steps: Sequence[Record], evaluations: Sequence[Record]) -> None:
    """Draws the loss of steps and evaluations."""
    x, y = points(steps, "loss")
    axes.plot(x, y, color=BLUE, alpha=0.35, linewidth=0.8)
    axes.plot(x, smoothed(y), color=BLUE, label="training")
    if evaluations:
        x, y = points(evaluations, "loss")
        axes.plot(x, y, "o--", color=RED, markersize=4, linewidth=1, label="evaluation")
    axes.legend(frameon=False)


def draw_lengths(edges: Sequence[float], counts: Sequence[int]) -> Figure:
    """The histogram of sample lengths."""
    figure = new_figure(7, 2.8)
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots()
    axes.stairs(counts, edges, fill=True, color=BLUE, alpha=0.8)
    axes.set_ylabel("samples")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    tidy(axes, "sample lengths", "tokens of a sample")
    return figure


def points(records: Sequence[Record], name: str) -> tuple[list[int], list[float]]:
    """Steps and values; what is not there (NaN is written as null) is left out."""
    known = [record for record in records if record.get(name) is not None]
    return [record["step"] for record in known], [record[name] for record in known]


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponential moving average without the bias of its start (Kingma & Ba 2014, section 3)."""
    decay = math.exp(-MEMORIES_A_RUN / max(len(values), 1))
    total, weight, result = 0.0, 0.0, []
    for value in values:
        total = decay * total + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        result.append(total / weight)
    return result


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, width and height in inches; ValueError without matplotlib."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        raise ValueError("pictures need matplotlib: pip install matplotlib") from None
    # Room at the edges, in inches: reports show the picture on a card.
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    return Figure(figsize=(width, height), layout=layout)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
