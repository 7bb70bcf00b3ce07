"""Every key of the section `packing` does what it says, and a bad value is told with its bounds."""

from typing import Any

import numpy as np
import pytest

from config_cases import load_text
from sft_fast.config.schema import Config
from sft_fast.config.sections import PackingConfig
from sft_fast.errors import ConfigError
from sft_fast.packing.from_config import make_plan
from sft_fast.packing.micro_batch import SequenceLayout, fill_micro_batch
from sft_fast.packing.report import packing_report
from sft_fast.packing.steps import StepPlan
from tiny import ListStore, make_config, make_store, random_samples

NUM_SAMPLES = 400


@pytest.fixture(scope="module")
def store() -> ListStore:
    return make_store(random_samples(NUM_SAMPLES, seed=5))


def plan_of(store: ListStore, **packing: Any) -> tuple[Config, StepPlan]:
    """The plan of a configuration with rows of 128 tokens."""
    model = {"path": "some/model", "shape": None}
    packing = {"capacity": 128, **packing}
    config = make_config(model=model, tokenizer={"path": None}, packing=packing)
    return config, make_plan(store, config.packing, config.train, config.seed)


def bins_of(plan: StepPlan) -> list[list[int]]:
    epoch = plan.plan(0)
    return [epoch.bin(number).tolist() for number in range(epoch.num_bins)]


def test_every_key_is_tested_here() -> None:
    tested = {"strategy", "capacity", "alignment", "max_samples_per_bin", "pool_size"}
    assert set(PackingConfig.model_fields) == tested


def test_strategy(store: ListStore) -> None:
    found = {}
    for strategy in ("bfd", "window", "sequential", "none", "auto"):
        _, plan = plan_of(store, strategy=strategy)
        bins = found[strategy] = bins_of(plan)
        assert sorted(sum(bins, [])) == list(range(NUM_SAMPLES))
        assert packing_report(plan).strategy == ("window" if strategy == "auto" else strategy)
    assert sum(found["sequential"], []) == list(range(NUM_SAMPLES)), "the order of the data"
    assert all(len(one) == 1 for one in found["none"])
    assert len(found["bfd"]) <= len(found["window"]) < len(found["sequential"]) < NUM_SAMPLES
    lengths = store.lengths
    spread = {
        name: np.mean([np.ptp(lengths[one]) for one in found[name]]) for name in ("bfd", "window")
    }
    assert spread["window"] > spread["bfd"], "random samples, not neighbours in length"


@pytest.mark.parametrize("capacity", [64, 128, 1024])
def test_capacity(store: ListStore, capacity: int) -> None:
    _, plan = plan_of(store, capacity=capacity)
    loads = [int(store.lengths[one].sum()) for one in bins_of(plan)]
    assert max(loads) <= capacity < max(loads) + min(store.lengths)
    assert plan.counts(0).capacity_tokens == capacity * 4


@pytest.mark.parametrize("alignment", [1, 8, 32])
def test_alignment(store: ListStore, alignment: int) -> None:
    config, plan = plan_of(store, alignment=alignment)
    layout = SequenceLayout(alignment=config.packing.alignment)
    for one in bins_of(plan)[:20]:
        batch = fill_micro_batch(store, one, config.packing.capacity, layout=layout)
        batch.check(131)
        assert not (batch.cu_seqlens % alignment).any()
    padding = packing_report(plan).alignment_padding
    assert padding == int((-store.lengths % alignment).sum())


@pytest.mark.parametrize("strategy", ["bfd", "window", "sequential"])
def test_max_samples_per_bin(store: ListStore, strategy: str) -> None:
    _, free = plan_of(store, strategy=strategy)
    assert max(map(len, bins_of(free))) > 3
    _, plan = plan_of(store, strategy=strategy, max_samples_per_bin=3)
    assert max(map(len, bins_of(plan))) == 3
    assert packing_report(plan).max_samples_per_bin == 3


def test_pool_size(store: ListStore) -> None:
    moved = []
    for pool_size in (60, 400):
        _, plan = plan_of(store, strategy="window", pool_size=pool_size)
        moved.append(packing_report(plan).max_places_moved)
        assert moved[-1] is not None and moved[-1] < pool_size
    assert moved[1] > moved[0], "a larger pool reaches farther"


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("strategy=ffd", "'auto', 'bfd', 'window', 'sequential' or 'none'"),
        ("strategy=bdf", "did you mean bfd?"),
        ("capacity=1", "greater than or equal to 2"),
        ("capacity=16777217", "less than or equal to 16777216"),
        ("capacity=2048.5", "a whole number"),
        ("capacity='2048'", "write 2048, without quotes"),
        ("alignment=0", "greater than or equal to 1"),
        ("alignment=-8", "greater than or equal to 1"),
        ("alignment=48", "packing.alignment divides packing.capacity"),
        ("max_samples_per_bin=0", "greater than or equal to 1"),
        ("max_samples_per_bin=2147483648", "less than or equal to 2147483647"),
        ("pool_size=0", "greater than or equal to 1"),
        ("pool_size=4194305", "less than or equal to 4194304"),
        ("pool_sise=3", "did you mean packing.pool_size?"),
    ],
)
def test_bad_values_are_told_with_key_and_bounds(tmp_path: Any, setting: str, problem: str) -> None:
    text = "model: {path: some/model}\ndata: {train: a.jsonl}\ntrain: {steps: 1}\n"
    with pytest.raises(ConfigError) as caught:
        load_text(tmp_path, text, f"packing.{setting}")
    message = str(caught.value)
    assert message.startswith("1 problem in ")
    assert f"packing.{setting.split('=')[0]}" in message
    assert problem in message


def test_bounds_are_those_of_the_packer(store: ListStore, tmp_path: Any) -> None:
    text = "model: {path: some/model}\ndata: {train: a.jsonl}\ntrain: {steps: 1}\n"
    greatest = (
        "strategy=bfd",
        "capacity=16777216",
        "max_samples_per_bin=2147483647",
        "pool_size=4194304",
    )
    config = load_text(tmp_path, text, *(f"packing.{one}" for one in greatest))
    assert make_plan(store, config.packing, config.train, config.seed).plan(0).num_bins == 1
