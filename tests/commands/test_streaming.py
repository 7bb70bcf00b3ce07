"""What the commands say of data that is streamed: `check`, `preview`, `plan`, `data-report`."""

import json
from pathlib import Path

import pytest

from config_cases import load_text, problems_of
from sft_fast.cli import main

CONFIG = """
output_dir: {folder}/run
model:
  shape: {{hidden_size: 32, num_layers: 2, num_attention_heads: 4, num_key_value_heads: 2,
          ffn_hidden_size: 48, max_position_embeddings: 256}}
tokenizer: {{path: demo}}
data: {{train: {folder}/rows.jsonl, streaming: true, shuffle_buffer: 50}}
packing: {{capacity: 128}}
train: {{steps: 10, global_batch_size: 4}}
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A configuration whose data is streamed."""
    lines = [
        json.dumps({"question": f"next of {n}", "answer": str(n + 1)}) + "\n" for n in range(300)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.format(folder=tmp_path))
    return str(path)


@pytest.mark.parametrize(
    ("overrides", "key", "expected"),
    [
        (("train.steps=null", "train.epochs=1"), "train.epochs", "train.steps"),
        (("data.eval_fraction=0.1",), "data.eval_fraction", "data.eval, which is stored"),
        (("packing.strategy=bfd",), "packing.strategy", "window"),
        (("packing.strategy=sequential",), "packing.strategy", "window"),
        (("train.neftune_alpha=5.0",), "train.neftune_alpha", "0"),
        (("data.train=[a.jsonl, b.jsonl]",), "data.train", "a weight for each"),
        (("data.train=[{path: a.jsonl, repeat: 2}]",), "data.train", "no repeat"),
    ],
    ids=str,
)
def test_what_a_stream_cannot_have_is_one_problem(
    tmp_path: Path, overrides: tuple[str, ...], key: str, expected: str
) -> None:
    text = CONFIG.format(folder=tmp_path)
    (problem,) = problems_of(load_text, tmp_path, text, *overrides)
    assert problem.keys == ("data.streaming", key)
    assert expected in problem.expected
    load_text(tmp_path, text, *overrides, "data.streaming=false")


def test_check_reads_the_head(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", config]) == 0
    assert "the first 50 records of" in capsys.readouterr().out


def test_preview_shows_the_first_records(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preview", config, "--rows", "30"]) == 0
    said = capsys.readouterr().out
    assert "rows.jsonl:1: " in said and "these 30 samples in " in said


def test_plan_expects_of_the_rest_what_the_first_samples_are(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", config, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["steps"], found["packing"]) == (10, "window")
    # 40 packs of at most 128 tokens.
    assert 40 * 100 < found["tokens"] <= 40 * 128
    assert main(["plan", config]) == 0
    assert "if all are as the first 50 samples: " in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_report_needs_all_samples(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data-report", config]) == 2
    assert "data.streaming=false data.train_split=train[:10000]" in capsys.readouterr().err
