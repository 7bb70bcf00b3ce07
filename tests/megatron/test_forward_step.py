"""Megatron's contract: 3-tuple loss, per-token normalisation by megatron's own finalize."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from rank_pool import RankPool
from tiny import make_config, make_store, random_samples


def build(parallel_section: dict[str, Any]) -> Any:
    from sft_fast.megatron.hf import RandomSource
    from sft_fast.megatron.parallel import init_parallel
    from sft_fast.megatron.train_step import build_run
    from sft_fast.models.architecture import architecture_from_shape

    config = make_config(parallel=parallel_section)
    parallel = init_parallel(config.parallel, config.train, config.seed)
    architecture = architecture_from_shape(config.model.shape, vocab_size=131)
    weights = RandomSource(architecture, config.seed)
    return config, parallel, build_run(config, architecture, weights, 1, parallel)


def gradients_with(megatron_normalises: bool) -> list[Any]:
    """The gradients of one global batch, divided by megatron's own code or by ours."""
    from megatron.core.distributed import finalize_model_grads

    from sft_fast.megatron.batches import open_batches
    from sft_fast.megatron.forward_step import forward_step
    from sft_fast.megatron.optim import normalise_by
    from sft_fast.megatron.schedule import run_schedule
    from sft_fast.packing.from_config import make_plan

    config, parallel, run = build({"pipeline": 2, "distributed_optimizer": False})
    store = make_store(random_samples(7, seed=1))
    plan = make_plan(store, config.packing, config.train, config.seed)
    run.model[0].zero_grad_buffer()
    if megatron_normalises:
        run.model[0].config.finalize_model_grads_func = finalize_model_grads
    else:
        normalise_by(run.model, plan.counts(0).loss_weight)
    with open_batches(store, plan, range(1), run.shape, parallel) as batches:
        run_schedule(run.model, batches, run.shape, forward_step)
    return [parameter.main_grad.numpy().copy() for parameter in run.model.parameters()]


def test_megatrons_own_normalisation_gives_the_same_gradient(rank_pool: RankPool) -> None:
    ours = rank_pool.run(4, gradients_with, False)
    megatrons = rank_pool.run(4, gradients_with, True)
    for got, expected in zip(ours, megatrons, strict=True):
        for got_grad, expected_grad in zip(got, expected, strict=True):
            assert abs(expected_grad).max() > 0
            torch.testing.assert_close(
                torch.from_numpy(got_grad), torch.from_numpy(expected_grad), rtol=1e-5, atol=1e-8
            )


def outcomes_of_forward_step() -> dict[str, Any]:
    from sft_fast.megatron.forward_step import forward_step
    from sft_fast.packing.micro_batch import fill_micro_batch

    _, _, run = build({})
    store = make_store(random_samples(3, seed=2))
    batch = fill_micro_batch(store, [0, 1, 2], 128)
    outcomes: dict[str, Any] = {}
    broken = {
        "labels": replace(batch, labels=batch.labels.int()),
        "tokens": replace(batch, tokens=batch.tokens + 10**6),
        "position_ids": replace(batch, position_ids=batch.position_ids[:, :-1]),
        "active_tokens": replace(batch, active_tokens=batch.active_tokens.flip(0)),
    }
    for name, wrong in broken.items():
        try:
            forward_step(iter([wrong]), run.model[0])
        except ValueError as error:
            outcomes[name] = str(error)
    losses, loss_func = forward_step(iter([batch]), run.model[0])
    loss_sum, num_tokens, report = loss_func(losses)
    outcomes["shape"] = tuple(losses.shape)
    outcomes["masked"] = float(losses[batch.labels == -100].abs().max())
    outcomes["sum"] = (float(loss_sum), float(losses.sum()), loss_sum.requires_grad)
    outcomes["tokens_counted"] = (int(num_tokens), int((batch.labels != -100).sum()))
    outcomes["report"] = report["lm loss"].tolist()
    empty = fill_micro_batch(store, [], 8)
    loss_sum, num_tokens, _ = (lambda out: out[1](out[0]))(
        forward_step(iter([empty]), run.model[0])
    )
    run.model[0].zero_grad_buffer()
    loss_sum.backward()
    grads = [parameter.main_grad.abs().max() for parameter in run.model.parameters()]
    outcomes["empty"] = (float(loss_sum.detach()), int(num_tokens), float(max(grads)))
    return outcomes


@pytest.fixture(scope="module")
def outcomes(rank_pool: RankPool) -> dict[str, Any]:
    (result,) = rank_pool.run(1, outcomes_of_forward_step)
    return result


def test_loss_func_returns_sum_count_and_report(outcomes: dict[str, Any]) -> None:
    assert outcomes["shape"] == (1, 128)
    assert outcomes["masked"] == 0.0
    loss_sum, expected, requires_grad = outcomes["sum"]
    assert loss_sum == expected > 0
    assert requires_grad
    counted, supervised = outcomes["tokens_counted"]
    assert counted == supervised
    assert outcomes["report"] == [loss_sum, counted]


@pytest.mark.parametrize("name", ["labels", "tokens", "position_ids", "active_tokens"])
def test_a_wrong_tensor_is_named(outcomes: dict[str, Any], name: str) -> None:
    assert f"MicroBatch.{name}" in outcomes[name]


def test_a_batch_of_padding_gives_zero_loss_and_zero_gradient(outcomes: dict[str, Any]) -> None:
    assert outcomes["empty"] == (0.0, 0, 0.0)
