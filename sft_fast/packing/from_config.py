"""The packing plan of a run, without torch: the trainer and `sft_fast plan` make the same one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from sft_fast.config.sections import OptimConfig, PackingConfig, TrainConfig
from sft_fast.data.stream import SampleStream, TrainingData
from sft_fast.packing.balance import DEFAULT_COST_MODEL, CostModel
from sft_fast.packing.bins import PackingOptions
from sft_fast.packing.steps import StepPlan
from sft_fast.packing.streaming import StreamPlan

if TYPE_CHECKING:
    from sft_fast.models.architecture import Architecture


class PlannedSamples(Protocol):
    """What a plan depends on: a token store is one."""

    @property
    def lengths(self) -> NDArray[np.int32]:
        """int32 [N], tokens of each sample."""

    @property
    def num_supervised(self) -> NDArray[np.int32]:
        """int32 [N], their targets."""

    @property
    def loss_weights(self) -> NDArray[np.float64] | None:
        """float64 [N], the sum of their targets' weights; None = all weights are 1."""


def warm_up_warning(optim: OptimConfig, num_steps: int) -> str:
    """What to say of a run that ends before its warm-up does; empty: nothing.

    Where train.epochs decides, the number of steps is known only with the data.
    """
    steps = optim.warmup_steps
    if steps < num_steps:
        return ""
    return (
        f"warning: optim.warmup_steps is {steps} and the run has {num_steps} steps, so optim.lr is "
        f"never reached; for example optim.warmup_steps={num_steps // 10}"
    )


def make_plan(
    store: PlannedSamples,
    packing: PackingConfig,
    train: TrainConfig,
    seed: int,
    architecture: Architecture | None = None,
    max_samples: int | None = None,
    group_size: int = 1,
) -> StepPlan:
    """The order of the (first) samples: a function of lengths, packing options and seed.

    The architecture only decides which rank computes what, so that ranks finish together.
    `group_size` neighbours share a bin.
    """
    if max_samples is not None:
        max_samples = max(max_samples // group_size, 1) * group_size
    return StepPlan(
        lengths=store.lengths[:max_samples],
        num_supervised=store.num_supervised[:max_samples],
        capacity=packing.capacity,
        strategy=packing.strategy,
        seed=seed,
        global_batch_size=train.global_batch_size,
        options=packing_options(packing),
        cost_model=cost_model(architecture),
        loss_weights=None if store.loss_weights is None else store.loss_weights[:max_samples],
        group_size=group_size,
    )


def make_training_plan(
    data: TrainingData,
    packing: PackingConfig,
    train: TrainConfig,
    seed: int,
    architecture: Architecture | None = None,
    group_size: int = 1,
) -> StepPlan | StreamPlan:
    """The steps of a run; of a stream nothing is read yet. Arguments as for `make_plan`."""
    if not isinstance(data, SampleStream):
        return make_plan(data, packing, train, seed, architecture, group_size=group_size)
    assert group_size == 1, "the stage refuses data.streaming"
    return StreamPlan(
        data,
        capacity=packing.capacity,
        global_batch_size=train.global_batch_size,
        seed=seed,
        options=packing_options(packing),
        cost_model=cost_model(architecture),
    )


def packing_options(packing: PackingConfig) -> PackingOptions:
    """Limits on bins."""
    return PackingOptions(packing.alignment, packing.max_samples_per_bin, packing.pool_size)


def cost_model(architecture: Architecture | None) -> CostModel:
    """What a bin costs in a model; where that is not known, in one of 8 billion parameters."""
    if architecture is None:
        return DEFAULT_COST_MODEL
    return CostModel.of_shape(
        architecture.hidden_size, architecture.num_layers, architecture.vocab_size
    )
