"""Losses and gradients that are not finite, or spikes."""

import json
import math

import pytest

from faults.launcher import Launcher, step_losses
from sft_fast.config.sections import GuardConfig
from sft_fast.megatron.guard import Guard
from sft_fast.metrics.writer import StepReason


@pytest.mark.fault("F18")
@pytest.mark.parametrize(
    ("spoil", "warning"),
    [("loss nan 3", "loss is nan"), ("grad inf 3", "grad_norm is")],
)
def test_a_step_spoilt_on_one_rank_is_skipped_by_all(
    launcher: Launcher, spoil: str, warning: str
) -> None:
    name = f"spoilt-{spoil.split()[0]}"
    job = launcher.run(name, ranks=2, hook=["", f"spoil:{spoil}"])
    records = [json.loads(line) for line in (job.output / "metrics.jsonl").read_text().splitlines()]
    (skipped,) = (record for record in records if record["kind"] == "guard")
    assert skipped["step"] == 3 and skipped["was_skipped"] and warning in skipped["warning"]
    losses = step_losses(job.output)
    assert all(losses[step] < 6 for step in (1, 2, 4, 5, 6))
    kept = json.loads((job.output / "skipped/step_00000003.json").read_text())
    assert warning in kept["warning"]
    assert len(kept["sample_ids"]) == len(set(kept["sample_ids"])) > 4
    assert all(origin.startswith(str(launcher.rows)) for origin in kept["origins"])
    from safetensors.numpy import load_file

    tensors = load_file(job.output / "skipped/step_00000003.safetensors")
    assert tensors["lengths"].sum() == len(tensors["tokens"]) == len(tensors["supervised"])


@pytest.mark.fault("F18")
def test_three_spoilt_steps_end_the_run_at_the_last_good_one(launcher: Launcher) -> None:
    job = launcher.start(
        "spoilt-thrice", "checkpoint.every_steps=4", hook="spoil:loss nan 5 6 7", steps=9
    )
    assert job.wait() == [2]
    assert "3 steps in a row were skipped, the last is step 7" in job.said()
    assert [path.name for path in (job.output / "checkpoints").iterdir()] == ["step_00000004"]


@pytest.mark.fault("F19")
def test_a_spike_is_skipped_and_a_resumed_run_judges_alike(launcher: Launcher) -> None:
    options = ("guard.min_history=4", "guard.window=8", "checkpoint.every_steps=6")
    spike = "spoil:loss 50 8"
    whole = launcher.run("spike", *options, hook=spike, steps=10)
    assert "step 8 skipped: loss" in whole.said()
    launcher.run("spike-resumed", *options, "optim.decay_steps=10", steps=6)
    resumed = launcher.run("spike-resumed", *options, hook="spoil:loss 50 2", steps=10)
    assert "step 8 skipped: loss" in resumed.said()
    assert step_losses(whole.output)[10] == step_losses(resumed.output)[10]
    warned = launcher.run("spike-warn", *options, "guard.on_spike=warn", hook=spike, steps=10)
    assert "step 8 warning: loss" in warned.said()


def judge(guard: Guard, values: list[tuple[float, float]]) -> list[bool]:
    return [guard.judge(*value)[0] is not StepReason.REFUSED for value in values]


def test_what_counts_as_a_spike() -> None:
    config = GuardConfig(min_history=10)
    steady = [(2.0 + 0.01 * (number % 5), 1.0 + 0.1 * (number % 3)) for number in range(20)]
    guard = Guard(config, 1.0, {})
    assert all(judge(guard, [(1000.0, 1000.0), *steady]))  # before there is a history
    # A loss within a nat of the median, a norm that is within ten times of it.
    assert judge(guard, [(2.9, 1.0), (2.0, 9.0), (3.3, 1.0), (2.0, 20.0)]) == [
        True, True, False, False,
    ]  # fmt: skip
    assert judge(guard, [(math.nan, 1.0), (2.0, math.inf), (-math.inf, 1.0)]) == [False] * 3
    assert guard.num_skipped == 5
    assert judge(guard, [(2.0, 1.0)]) == [True] and guard.num_skipped == 0
    # Clipping at 30 makes a norm of 20 harmless.
    guard = Guard(config, 30.0, guard.state())
    assert judge(guard, [(2.0, 20.0)]) == [True]


def test_a_converged_run_does_not_see_spikes_in_noise() -> None:
    guard = Guard(GuardConfig(), 1.0, {})
    assert all(judge(guard, [(1e-3 + 1e-6 * (n % 3), 1e-2) for n in range(60)]))
    assert judge(guard, [(0.05, 0.09)]) == [True]


@pytest.mark.parametrize("on_spike", ["warn", "ignore"])
def test_values_that_are_not_finite_are_never_taken(on_spike: str) -> None:
    guard = Guard(GuardConfig(on_spike=on_spike, min_history=3), 1.0, {})
    assert all(judge(guard, [(2.0, 1.0)] * 5 + [(900.0, 900.0)]))
    assert judge(guard, [(math.nan, 1.0)]) == [False]


def test_the_state_is_json_and_complete() -> None:
    guard = Guard(GuardConfig(window=4), 1.0, {})
    judge(guard, [(1 / 3, math.pi)] * 9 + [(math.nan, 1.0)])
    state = json.loads(json.dumps(guard.state()))
    again = Guard(GuardConfig(window=4), 1.0, state)
    assert again.state() == guard.state() and len(state["losses"]) == 4
