"""The packing plan of a run, without torch: the trainer and `sft_fast plan` make the same one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sft_fast.config.sections import OptimConfig, PackingConfig, TrainConfig
from sft_fast.packing.balance import DEFAULT_COST_MODEL, CostModel
from sft_fast.packing.bins import PackingOptions
from sft_fast.packing.steps import StepPlan

if TYPE_CHECKING:
    from sft_fast.data.store import TokenStore
    from sft_fast.models.architecture import Architecture


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
    store: TokenStore,
    packing: PackingConfig,
    train: TrainConfig,
    seed: int,
    architecture: Architecture | None = None,
    max_samples: int | None = None,
) -> StepPlan:
    """The order of the (first) samples: a function of lengths, packing options and seed.

    The architecture only decides which rank computes what, so that ranks finish together.
    """
    cost_model = DEFAULT_COST_MODEL
    if architecture is not None:
        cost_model = CostModel.of_shape(
            architecture.hidden_size, architecture.num_layers, architecture.vocab_size
        )
    return StepPlan(
        lengths=store.lengths[:max_samples],
        num_supervised=store.num_supervised[:max_samples],
        capacity=packing.capacity,
        strategy=packing.strategy,
        seed=seed,
        global_batch_size=train.global_batch_size,
        options=PackingOptions(packing.alignment, packing.max_samples_per_bin, packing.pool_size),
        cost_model=cost_model,
        loss_weights=None if store.loss_weights is None else store.loss_weights[:max_samples],
    )
