"""Runs whose data is never stored: endless sources, exact resume, the same order in any layout."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rank_pool import RankPool
from trainer_calls import call_main

CONFIG = """
output_dir: {output}
seed: 7
model:
  dtype: fp32
  shape: {{hidden_size: 32, num_layers: 2, num_attention_heads: 4, num_key_value_heads: 2,
          ffn_hidden_size: 48, max_position_embeddings: 256}}
tokenizer: {{path: demo}}
data: {{train: {train}, streaming: true, shuffle_buffer: 12, cache_dir: {train}/nowhere}}
packing: {{capacity: 128, pool_size: 8}}
train: {{steps: 4, global_batch_size: 4}}
optim: {{lr: 1e-2, warmup_steps: 1}}
checkpoint: {{every_steps: 2, keep_last: 3}}
metrics: {{pictures: false}}
"""
BOUND = 400
"""Records that may be read: some 8 are in a pack, 16 packs are trained and a few are held."""


class EndlessHub:
    """A data set of the hub that has no end, is never downloaded and is not read past BOUND."""

    hash, config = "revision", SimpleNamespace(name="default")

    def as_streaming_dataset(self, split: str) -> Any:
        from datasets import IterableDataset

        return IterableDataset.from_generator(self.rows)

    def rows(self) -> Iterator[dict[str, str]]:
        for number in range(BOUND):
            yield chat(number)
        raise AssertionError(f"more than {BOUND} records were read")


def chat(number: int) -> dict[str, str]:
    return {"question": f"next of {number}", "answer": str(number + 1)}


def run_main(arguments: list[str]) -> tuple[int, str, str]:
    """Runs the trainer in a pool rank, the hub replaced; returns (exit code, stdout, stderr)."""
    import datasets

    from sft_fast.data.store import StoreWriter

    def refuse(*_: Any) -> None:
        raise AssertionError("a stream is not stored")

    kept = datasets.load_dataset_builder, StoreWriter.__init__
    datasets.load_dataset_builder = lambda *_, **__: EndlessHub()
    StoreWriter.__init__ = refuse  # type: ignore[method-assign, assignment]
    try:
        return call_main(arguments)
    finally:
        datasets.load_dataset_builder, StoreWriter.__init__ = kept  # type: ignore[method-assign]


def train(pool: RankPool, world_size: int, folder: Path, source: str, *options: str) -> str:
    """Trains in `folder`; returns what rank 0 printed."""
    folder.mkdir(exist_ok=True)
    config = folder.with_suffix(".yaml")
    config.write_text(CONFIG.format(output=folder, train=source))
    results = pool.run(world_size, run_main, ["--config", str(config), *options])
    for code, _, err in results:
        assert code == 0, err
    return results[0][1]


def steps_of(run: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == "step"]


def weights_of(run: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(run / "export" / "model.safetensors")


@pytest.fixture(scope="module")
def unbroken(rank_pool: RankPool, tmp_path_factory: Any) -> Path:
    """A run of one rank on a source without end."""
    folder = tmp_path_factory.mktemp("streaming") / "unbroken"
    said = train(rank_pool, 1, folder, "owner/name")
    assert "read so far; the rest comes while it trains" in said
    assert "what waits in the buffer included: owner/name[train]: " in said
    return folder


def test_resume_gives_the_weights_of_the_unbroken_run(
    rank_pool: RankPool, unbroken: Path, tmp_path: Path
) -> None:
    step = "checkpoints/step_00000002"
    assert (unbroken / step / "stream_state.bin").is_file()
    shutil.copytree(unbroken / step, tmp_path / "broken" / step)
    said = train(rank_pool, 1, tmp_path / "broken", "owner/name")
    assert "at step 2 of 4" in said
    ours, theirs = weights_of(tmp_path / "broken"), weights_of(unbroken)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    losses = [[step["loss"] for step in steps_of(run)] for run in (tmp_path / "broken", unbroken)]
    assert losses[0] == losses[1][2:]


@pytest.mark.parametrize("layout", [(), ("parallel.tensor=2",), ("parallel.pipeline=2",)], ids=str)
def test_the_order_is_the_same_in_any_layout(
    rank_pool: RankPool, unbroken: Path, tmp_path: Path, layout: tuple[str, ...]
) -> None:
    step = "checkpoints/step_00000002"
    shutil.copytree(unbroken / step, tmp_path / "run" / step)
    train(rank_pool, 2, tmp_path / "run", "owner/name", "export.enabled=false", *layout)
    for ours, theirs in zip(steps_of(tmp_path / "run"), steps_of(unbroken)[2:], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        for name in ("num_tokens", "num_supervised", "num_samples"):
            assert ours.get(name) == theirs.get(name)


def test_a_source_that_ends_begins_anew(rank_pool: RankPool, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(chat(number)) + "\n" for number in range(40)))
    run = tmp_path / "run"
    train(rank_pool, 1, run, str(path), "export.enabled=false", "train.steps=6")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, last = [record for record in records if record["kind"] == "data"]
    assert first["rows"] < 40 < last["rows"]
    assert last["samples"] == last["rows"]


def test_records_that_are_not_used_are_counted_and_listed(
    rank_pool: RankPool, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(chat(number)) for number in range(200)]
    path.write_text("\n".join([lines[0], '{"question": "q"', *lines[1:]]) + "\n")
    run = tmp_path / "run"
    options = ("export.enabled=false", "data.on_bad_row=skip", "train.steps=2")
    train(rank_pool, 1, run, str(path), *options)
    (entry,) = map(json.loads, (run / "rejected.jsonl").read_text().splitlines())
    assert (entry["line"], entry["reason"]) == (2, "unreadable")
    config = run.with_suffix(".yaml")
    ((code, _, err),) = rank_pool.run(
        1, run_main, ["--config", str(config), "output_dir=" + str(tmp_path / "other")]
    )
    assert code == 2
    assert f"{path}:2:17: not valid JSON" in err and "Traceback" not in err


def test_other_data_is_refused_at_resume(
    rank_pool: RankPool, unbroken: Path, tmp_path: Path
) -> None:
    step = "checkpoints/step_00000002"
    shutil.copytree(unbroken / step, tmp_path / "run" / step)
    config = tmp_path / "run.yaml"
    config.write_text(CONFIG.format(output=tmp_path / "run", train="owner/name"))
    for options, field in (
        (["packing.pool_size=9"], "packing"),
        (["data.train_on=last_turn"], "data"),
        (["data.shuffle_buffer=13"], "data"),
    ):
        ((code, _, err),) = rank_pool.run(1, run_main, ["--config", str(config), *options])
        assert code == 2
        assert f"  {field}: was " in err
