"""The trainer from its command line: whole runs, exact resume, and what a wrong input answers."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rank_pool import RankPool
from trainer_calls import call_main

ROOT = Path(__file__).parents[1]
SMALL = """
output_dir: {output}
seed: 7
model:
  dtype: fp32
  shape: {{hidden_size: 32, num_layers: 2, num_attention_heads: 4, num_key_value_heads: 2,
          ffn_hidden_size: 48, max_position_embeddings: 256}}
tokenizer: {{path: demo}}
data: {{train: {train}, eval: {eval}}}
packing: {{capacity: 128}}
train: {{steps: 4, global_batch_size: 4}}
optim: {{lr: 1e-2, warmup_steps: 1}}
checkpoint: {{every_steps: 2, keep_last: 3}}
"""
FOUR_LAYERS = "model.shape.num_layers=4"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A training and an evaluation file of arithmetic chats."""
    folder = tmp_path_factory.mktemp("rows")
    files = {}
    for name, first in (("train", 0), ("eval", 500)):
        files[name] = folder / f"{name}.jsonl"
        with files[name].open("w") as file:
            for number in range(first, first + (120 if name == "train" else 20)):
                user = {"role": "user", "content": f"next of {number}"}
                assistant = {"role": "assistant", "content": str(number + 1)}
                file.write(json.dumps({"messages": [user, assistant]}) + "\n")
    return files


def write_config(folder: Path, rows: Mapping[str, Path | str], name: str = "run") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(SMALL.format(output=folder / name, **rows))
    return path


def train(pool: RankPool, world_size: int, *arguments: str) -> str:
    """Runs to the end on every rank; returns what rank 0 printed."""
    results = pool.run(world_size, call_main, list(arguments))
    for code, _, err in results:
        assert code == 0, err
    assert all(out == "" for _, out, _ in results[1:]), "only one rank prints"
    return results[0][1]


def read_weights(run: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    weights = {}
    for path in sorted((run / "export").glob("*.safetensors")):
        weights.update(load_file(path))
    assert weights
    return weights


def assert_same_weights(run: Path, other: Path) -> None:
    import torch

    weights, expected = read_weights(run), read_weights(other)
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected[name]), name


def test_resume_gives_the_weights_of_the_unbroken_run(
    rank_pool: RankPool, rows: dict[str, Path], tmp_path: Path
) -> None:
    import shutil

    unbroken = write_config(tmp_path, rows, "unbroken")
    train(rank_pool, 2, "--config", str(unbroken))
    checkpoints = sorted(path.name for path in (tmp_path / "unbroken/checkpoints").iterdir())
    assert checkpoints == ["step_00000002", "step_00000004"]

    broken = write_config(tmp_path, rows, "broken")
    shutil.copytree(
        tmp_path / "unbroken/checkpoints/step_00000002",
        tmp_path / "broken/checkpoints/step_00000002",
    )
    said = train(rank_pool, 2, "--config", str(broken))
    assert "at step 2 of 4" in said
    assert_same_weights(tmp_path / "broken", tmp_path / "unbroken")

    again = train(rank_pool, 2, "--config", str(broken))
    assert "at step 4 of 4" in again
    assert "step 4/4" not in again, "nothing is left to train"


@pytest.mark.gpu
def test_a_run_whose_optimizer_is_half_on_the_host_resumes(
    rank_pool: RankPool, rows: dict[str, Path], tmp_path: Path
) -> None:
    import shutil

    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    pytest.importorskip("transformer_engine")
    options = ["model.dtype=bf16", "optim.offload_fraction=0.5", "data.eval=null"]
    unbroken = write_config(tmp_path, rows, "unbroken")
    train(rank_pool, 1, "--config", str(unbroken), *options)
    step = "checkpoints/step_00000002"
    shutil.copytree(tmp_path / "unbroken" / step, tmp_path / "broken" / step)
    broken = write_config(tmp_path, rows, "broken")
    assert "at step 2 of 4" in train(rank_pool, 1, "--config", str(broken), *options)
    assert step_losses(tmp_path / "broken") == step_losses(tmp_path / "unbroken")[2:]
    assert_same_weights(tmp_path / "broken", tmp_path / "unbroken")


@pytest.fixture(scope="module")
def one_rank(rank_pool: RankPool, rows: dict[str, Path], tmp_path_factory: Any) -> Path:
    """The folder of a run's config and of its output, of four layers on one rank."""
    folder = tmp_path_factory.mktemp("one_rank")
    train(rank_pool, 1, "--config", str(write_config(folder, rows)), FOUR_LAYERS)
    return folder


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (2, ["parallel.tensor=2"]),
        (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
        (4, ["parallel.pipeline=2"]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else str(value),
)
def test_a_run_resumes_in_another_layout(
    rank_pool: RankPool, one_rank: Path, tmp_path: Path, world_size: int, layout: list[str]
) -> None:
    import shutil

    step = "checkpoints/step_00000002"
    shutil.copytree(one_rank / "run" / step, tmp_path / step)
    arguments = ["--config", str(one_rank / "run.yaml"), f"output_dir={tmp_path}", FOUR_LAYERS]
    train(rank_pool, world_size, *arguments, *layout)
    assert step_losses(tmp_path) == pytest.approx(step_losses(one_rank / "run")[2:], rel=1e-5)


def test_with_nothing_left_to_train_the_export_is_what_was_loaded(
    rank_pool: RankPool, one_rank: Path, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(one_rank / "run/checkpoints", tmp_path / "checkpoints")
    arguments = ["--config", str(one_rank / "run.yaml"), f"output_dir={tmp_path}", FOUR_LAYERS]
    train(rank_pool, 2, *arguments, "parallel.pipeline=2", "parallel.virtual_pipeline=2")
    assert_same_weights(tmp_path, one_rank / "run")


def test_overlapped_communication_exports_the_same_weights(
    rank_pool: RankPool, rows: dict[str, Path], tmp_path: Path
) -> None:
    config = write_config(tmp_path, rows)
    overlap = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
    for name, extra in (("plain", []), ("overlap", overlap)):
        arguments = ["--config", str(config), f"output_dir={tmp_path / name}", "data.eval=null"]
        train(rank_pool, 2, *arguments, *extra)
    assert_same_weights(tmp_path / "overlap", tmp_path / "plain")


def step_losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if line["kind"] == "step"]


def test_a_turn_of_weight_2_counts_as_the_turn_twice(rank_pool: RankPool, tmp_path: Path) -> None:
    """Weights go all the way from a row to loss and gradient; evaluation does not weigh."""
    found = []
    options = ("train.steps=1", "optim.warmup_steps=0", "export.enabled=false")
    for name in ("weighted", "repeated"):
        lines = []
        for number in range(6):
            answer: dict[str, Any] = {"role": "assistant", "content": str(number)}
            times = 1 + number % 2
            if name == "weighted":
                answer["weight"], times = times / 2, 1
            messages = [{"role": "user", "content": f"is it {number}"}, answer]
            lines += [json.dumps({"messages": messages}) + "\n"] * times
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(lines))
        path = write_config(tmp_path, {"train": file, "eval": "null"}, name)
        train(rank_pool, 2, "--config", str(path), *options)
        text = (tmp_path / name / "metrics.jsonl").read_text()
        records = [json.loads(line) for line in text.splitlines()]
        (step,) = (record for record in records if record["kind"] == "step")
        assert step["num_samples"] == (6 if name == "weighted" else 9)
        found.append([step["loss"], step["grad_norm"]])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_run_leaves_a_loadable_config_metrics_and_a_model(
    rank_pool: RankPool, rows: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sft_fast.config.schema import load_config

    path = write_config(tmp_path, rows)
    train(rank_pool, 1, "--config", str(path), "train.steps=2", "optim.lr=1e-3")
    run = tmp_path / "run"
    saved = load_config(run / "config.yaml", [])
    assert saved == load_config(path, ["train.steps=2", "optim.lr=1e-3"])
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "step"]
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        assert 0 < step["num_supervised"] < step["num_tokens"] <= step["capacity_tokens"] == 4 * 128
        assert step["num_samples"] > 4
    assert [record["step"] for record in records if record["kind"] == "eval"] == [0, 2]
    model = AutoModelForCausalLM.from_pretrained(run / "export")
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer.chat_template
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    stops = model.generation_config.eos_token_id
    assert end_of_turn in (stops if isinstance(stops, list) else [stops])


def test_resume_refuses_other_data_and_another_order(
    rank_pool: RankPool, rows: dict[str, Path], tmp_path: Path
) -> None:
    config = write_config(tmp_path, rows)
    train(rank_pool, 1, "--config", str(config), "train.steps=2")
    for override, reason in (
        ("data.train_split=train[:100]", "data: was"),
        ("seed=8", "seed: was 7, is 8"),
        ("packing.strategy=none", "packing: was"),
        ("checkpoint.resume=never", "choose another output_dir"),
    ):
        (result,) = rank_pool.run(1, call_main, ["--config", str(config), override])
        assert result[0] == 2
        assert reason in result[2], override


@pytest.mark.parametrize("is_distributed", ["true", "false"])
def test_a_resumed_run_takes_the_learning_rate_of_its_configuration(
    rank_pool: RankPool, rows: dict[str, Path], tmp_path: Path, is_distributed: str
) -> None:
    config = write_config(tmp_path, rows)
    constant = (
        *("optim.decay=constant", "optim.warmup_steps=0", "export.enabled=false"),
        f"parallel.distributed_optimizer={is_distributed}",
    )
    train(rank_pool, 1, "--config", str(config), *constant, "train.steps=2", "optim.lr=1e-3")
    train(rank_pool, 1, "--config", str(config), *constant, "train.steps=4", "optim.lr=5e-4")
    output = next(tmp_path.glob("*/metrics.jsonl"))
    lines = map(json.loads, output.read_text(encoding="utf-8").splitlines())
    assert [line["lr"] for line in lines if line["kind"] == "step"] == [1e-3, 1e-3, 5e-4, 5e-4]


# name: overrides, what the message must say
BAD_INPUTS: dict[str, tuple[list[str], list[str]]] = {
    "missing file": (["data.train={folder}/nowhere.jsonl"], ["nowhere.jsonl", "data.train"]),
    "empty file": (["data.train={folder}/empty.jsonl"], ["empty.jsonl"]),
    "not json": (["data.train={folder}/broken.jsonl"], ["broken.jsonl:2"]),
    "unknown format": (["data.format=alpacca"], ["alpacca", "alpaca"]),
    "heads": (
        ["parallel.tensor=3"],
        ["parallel.tensor", "num_attention_heads"],
    ),
    "vocabulary": (
        ["model.shape=null", "model.path={folder}/model", "tokenizer.path={folder}/tokenizer"],
        ["vocab", "tokenizer"],
    ),
    "no model": (["model.shape=null", "model.path={folder}/nothing"], ["model.path", "nothing"]),
    "too long": (["packing.capacity=16"], ["packing.capacity", "data.over_length"]),
    "unknown key": (["optim.learning_rate=1"], ["optim.learning_rate"]),
    "unknown stage": (["stage=dpo"], ["dpo", "sft"]),
}


@pytest.fixture(scope="module")
def bad_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sft_fast.data.tokenizer import load_tokenizer
    from tiny import save_tiny_llama

    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty.jsonl").touch()
    good = '{"prompt": "a", "completion": "b"}\n'
    (folder / "broken.jsonl").write_text(good + '{"prompt": "a", "completion"\n')
    save_tiny_llama(folder / "model")
    tokenizer = load_tokenizer("demo")
    tokenizer.add_tokens([f"<extra_{number}>" for number in range(200)])
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_gets_one_clear_message(
    rank_pool: RankPool, rows: dict[str, Path], bad_folder: Path, tmp_path: Path, name: str
) -> None:
    overrides, expected = BAD_INPUTS[name]
    config = write_config(tmp_path, rows)
    arguments = [override.format(folder=bad_folder) for override in overrides]
    results = rank_pool.run(2, call_main, ["--config", str(config), *arguments])
    assert [code for code, _, _ in results] == [2, 2]
    messages = [err for _, _, err in results if err]
    assert len(messages) == 1, "one rank speaks"
    for part in expected:
        assert part in messages[0]
    assert "Traceback" not in messages[0]


def test_a_world_size_that_does_not_fit_stops_torchrun(
    rows: dict[str, Path], tmp_path: Path
) -> None:
    config = write_config(tmp_path, rows)
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(ROOT / "sft_fast/train.py"), "--config", str(config), "parallel.pipeline=2",
         "parallel.tensor=2"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ""},
        cwd=tmp_path,
        timeout=300,
    )  # fmt: skip
    assert result.returncode != 0
    assert result.stderr.count("error: 1 problem") == 1
    assert "parallel.tensor" in result.stderr
    assert "--nproc-per-node" in result.stderr
