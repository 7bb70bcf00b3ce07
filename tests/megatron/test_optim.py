"""An optimizer step taken apart is megatron's own step, bit for bit."""

import contextlib
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from rank_pool import RankPool
from tiny import make_config, make_store, random_samples

NUM_STEPS = 3
Section = dict[str, Any]
# Name -> world size, model folder, type, parallel section, clip_grad
CASES: dict[str, tuple[int, str, str, Section, float]] = {
    "fp32": (1, "llama", "fp32", {"distributed_optimizer": False}, 1.0),
    "bf16, two shards": (2, "llama", "bf16", {}, 1.0),
    "fp16": (1, "llama", "fp16", {}, 1.0),
    "fp16, overflow": (1, "llama", "fp16", {}, 1.0),
    "no clipping": (1, "llama", "bf16", {"distributed_optimizer": False}, 0.0),
    "two chained": (2, "experts", "bf16", {"expert": 2}, 1.0),
}


def train(
    folder: str,
    dtype: str,
    parallel_section: Section,
    clip_grad: float,
    loss_scale: float | None,
    is_ours: bool,
) -> tuple[int, list[tuple[bool, float]], list[torch.Tensor]]:
    """Chained optimizers; whether each step updated, and its gradient norm; the weights."""
    from sft_fast.megatron import train_step as step_module
    from sft_fast.megatron.batches import open_batches
    from sft_fast.megatron.hf import SafetensorsSource
    from sft_fast.megatron.optim import optimizer_parts
    from sft_fast.megatron.parallel import init_parallel
    from sft_fast.megatron.train_step import build_run, train_step
    from sft_fast.models.architecture import architecture_from_hf, read_hf_config
    from sft_fast.packing.from_config import make_plan

    config = make_config(
        model={"path": folder, "shape": None, "dtype": dtype},
        tokenizer={"path": None},
        parallel=parallel_section,
        optim={"clip_grad": clip_grad},
    )
    parallel = init_parallel(config.parallel, config.train, config.seed)
    architecture = architecture_from_hf(read_hf_config(Path(folder)))
    weights = SafetensorsSource(Path(folder), architecture)
    run = build_run(config, architecture, weights, NUM_STEPS, parallel)
    if loss_scale is not None:
        run.optimizer.chained_optimizers[0].grad_scaler._scale.fill_(loss_scale)
    store = make_store(random_samples(8, seed=5))
    plan = make_plan(store, config.packing, config.train, config.seed)
    steps: list[tuple[bool, float]] = []

    def megatrons_step(optimizer: Any, grad_norm: float) -> None:
        was_updated, norm, _ = optimizer.step()
        steps.append((was_updated, float(norm or 0.0)))

    theirs = mock.patch.multiple(
        step_module, ready_gradients=lambda optimizer: 0.0, clip_and_update=megatrons_step
    )
    with open_batches(store, plan, range(NUM_STEPS), run.shape, parallel) as batches:
        for step in range(NUM_STEPS):
            with contextlib.nullcontext() if is_ours else theirs:
                outcome = train_step(run, batches, plan.counts(step))
            if is_ours:
                steps.append((outcome.updated, outcome.grad_norm if outcome.updated else 0.0))
    tensors = [parameter.detach().cpu().clone() for parameter in run.model.parameters()]
    return len(optimizer_parts(run.optimizer)), steps, tensors


@pytest.mark.parametrize("case", CASES)
def test_a_step_taken_apart_is_megatrons_step(
    rank_pool: RankPool, llama: str, experts: str, case: str
) -> None:
    world_size, model, *options = CASES[case]
    folder = {"llama": llama, "experts": experts}[model]
    options.append(256.0 if case == "fp16" else None)
    ours = rank_pool.run(world_size, train, folder, *options, True)
    theirs = rank_pool.run(world_size, train, folder, *options, False)
    for (parts, steps, weights), (_, their_steps, their_weights) in zip(ours, theirs, strict=True):
        assert parts == (2 if model == "experts" else 1)
        assert steps == their_steps
        if case == "fp16, overflow":
            assert not steps[0][0], "the scale is too small"
        else:
            assert all(updated and norm > 1 for updated, norm in steps), "nothing to clip"
        for got, expected in zip(weights, their_weights, strict=True):
            assert torch.equal(got, expected)


def reference_lr(step: int, decay: str, shape: str, growth: str | None) -> tuple[float, float]:
    """Learning rate and weight decay behind `step` of 20, with 4 of warm-up, WSD's last 8."""
    half = math.cos(math.pi * step / 20) / 2
    wd = {None: 0.1, "linear": 0.1 + 0.2 * step / 20, "cosine": 0.1 + 0.2 * (0.5 - half)}[growth]
    if step <= 4:
        return step / 4, wd
    if decay == "inverse-square-root":
        return max(0.1, math.sqrt(4 / step)), wd
    x = max(0, step - 12) / 8
    left = {
        "exponential": 2 * 0.5**x - 1,
        "linear": 1 - x,
        "cosine": (math.cos(math.pi * x) + 1) / 2,
        "minus_sqrt": 1 - math.sqrt(x),
    }
    return 0.1 + 0.9 * left[shape], wd


@pytest.mark.parametrize(
    "decay, shape, growth",
    [
        ("inverse-square-root", "linear", None),
        ("WSD", "exponential", "linear"),
        ("WSD", "linear", "cosine"),
        ("WSD", "cosine", None),
        ("WSD", "minus_sqrt", None),
    ],
)
def test_schedules_are_megatrons_and_resume(decay: str, shape: str, growth: str | None) -> None:
    from sft_fast.config.sections import OptimConfig
    from sft_fast.megatron.optim import build_lr_schedule

    section = {"lr": 1.0, "min_lr": 0.1, "warmup_steps": 4, "decay": decay, "wsd_decay": shape}
    if decay == "WSD":
        section["wsd_decay_steps"] = 8
    if growth is not None:
        section |= {"end_weight_decay": 0.3, "weight_decay_growth": growth}
    optim = OptimConfig.model_validate(section)

    def group_of(schedule: Any) -> dict[str, float]:
        return schedule.optimizer.param_groups[0]  # type: ignore[no-any-return]

    def schedule() -> Any:
        adam: Any = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
        return build_lr_schedule(adam, optim, 20)

    first, second = schedule(), schedule()
    for step in range(1, 21):
        first.step(1)
        group = group_of(first)
        expected = reference_lr(step, decay, shape, growth)
        assert (group["lr"], group["weight_decay"]) == pytest.approx(expected, rel=1e-12)
        if step == 10:
            second.load_state_dict(first.state_dict())
        if step > 10:
            second.step(1)
            assert group_of(second) | {"params": []} == group | {"params": []}
