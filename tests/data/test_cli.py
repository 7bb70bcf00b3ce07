import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_fast.cli import main
from sft_fast.data.formats import read_conversations
from sft_fast.data.source import load_records

ROOT = Path(__file__).parents[2]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
CHAT = {
    "messages": [
        {"role": "user", "content": "hi 🎉"},
        {"role": "assistant", "content": "", "tool_calls": [CALL], "train": False},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "ho", "weight": 0.5},
    ],
    "tools": [{"type": "function", "function": {"name": "f"}}],
}


def test_converted_rows_are_the_same_conversations(
    write_rows: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = write_rows([CHAT]), tmp_path / "out" / "chats.jsonl"
    assert main(["convert", source, str(output)]) == 0
    assert capsys.readouterr().out == f"{output}: 1 records\n"
    first, second = (list(read_conversations(load_records(str(path)))) for path in (source, output))
    assert [chat for _, chat in first] == [chat for _, chat in second]
    assert json.loads(output.read_text()) == CHAT
    assert main(["convert", source, str(output)]) == 2
    assert "exists; name another file" in capsys.readouterr().err


def test_convert_renames_columns_and_lists_bad_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "a.csv", tmp_path / "out.jsonl"
    source.write_text("frage,antwort\nq,42\nq,\n")
    options = ["--format", "alpaca", "--field", "instruction=frage", "--field", "response=antwort"]
    assert main(["convert", str(source), str(output), *options]) == 2
    assert f"{source}:3: 'response' (column 'antwort') is empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]
    assert main(["convert", str(source), str(output), *options, "--skip-bad-rows"]) == 0
    assert json.loads(output.read_text())["messages"][1] == {"role": "assistant", "content": "42"}
    assert (tmp_path / "out.jsonl.rejected").read_text().startswith(f"{source}:3: ")
    assert main(["convert", str(source), "x.jsonl", "--field", "instruction"]) == 2
    assert "expected FIELD=COLUMN" in capsys.readouterr().err


SHAPE = (
    "{hidden_size: 32, num_layers: 1, num_attention_heads: 2, num_key_value_heads: 2, "
    "ffn_hidden_size: 32, max_position_embeddings: 8192}"
)


def test_data_report_finds_what_is_odd(
    write_rows: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows: list[Any] = [{"messages": turns}, {"messages": turns * 3}, {"messages": turns}]
    train = write_rows(rows, "train.jsonl")
    # A template that ends no answer but the last: EOS is put there.
    template = tmp_path / "plain.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    config = tmp_path / "config.yaml"
    config.write_text(
        f"output_dir: {tmp_path}/run\nmodel: {{shape: {SHAPE}}}\n"
        f"tokenizer: {{path: {tmp_path}/tokenizer, chat_template: {template}}}\n"
        f"data: {{train: {train}, eval_fraction: 0.5}}\ntrain: {{steps: 10}}\n"
    )
    from sft_fast.data.demo import demo_tokenizer

    demo_tokenizer().save_pretrained(tmp_path / "tokenizer")
    assert main(["data-report", str(config), "data.eval_fraction=null"]) == 0
    text = capsys.readouterr().out
    assert "samples: 3, tokens: " in text
    assert "answers a sample: 2 with 1, 1 with 3" in text
    assert f"! 1 samples are copies of another, first {train}:3" in text
    assert (
        f"! 2 answers end with no special token: the model would not learn to stop, first {train}"
        in text
    )
    assert "  0 samples start with two BOS tokens" in text
    chatml = "tokenizer.chat_template=chatml"
    whole = [chatml, "data.eval_fraction=null"]
    assert main(["data-report", str(config), *whole, "packing.capacity=20"]) == 2
    printed = capsys.readouterr()
    assert f"! 1 samples are longer than packing.capacity, first {train}:2" in printed.out
    assert "1 of 3 samples" in printed.err and "data.over_length to drop" in printed.err
    cut = ["packing.capacity=20", "data.over_length=truncate_right"]
    assert main(["data-report", str(config), *whole, *cut]) == 0
    text = capsys.readouterr().out
    assert re.search(r"truncated: 1 samples, (\d+) tokens cut off \(\d+\.\d%\)", text)
    assert "  0 samples are longer than packing.capacity" in text
    assert main(["data-report", str(config), chatml, "data.eval_fraction=null", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["train"]["store"]["unended"] == 0
    assert report["train"]["build"]["rows"] == 3
    overlap = [f"data.eval={train}", "data.eval_fraction=null"]
    assert main(["data-report", str(config), chatml, *overlap]) == 2
    error = capsys.readouterr().err
    assert "2 different samples of 3 are training samples too" in error
    assert f"{train}:1 is {train}:1" in error
    assert main(["data-report", str(config), chatml, *overlap, "data.eval_overlap=allow"]) == 0


def test_wrong_key_is_an_error_of_two_lines_and_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("data: {trian: x}\n")
    assert main(["data-report", str(config)]) == 2
    assert "data.trian" in capsys.readouterr().err


# What `sft_fast` runs, three times in one process to spare two starts.
INSTALLED_COMMAND = """\
import sys
from sft_fast.cli import main
for command in (["preview"], ["data-report"], ["plan", "--gpu", "H200"]):
    sys.argv = ["sft_fast", *command, sys.argv[-1]]
    assert main() == 0, command
assert "torch" not in sys.modules
"""


def test_commands_read_every_kind_of_table_without_torch(tmp_path: Path) -> None:
    import datasets

    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    table = datasets.Dataset.from_list([{"messages": turns, "at": "x"}] * 2)
    table.to_parquet(str(tmp_path / "rows.parquet"))
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "saved"))
    with datasets.arrow_writer.ArrowWriter(path=str(tmp_path / "rows.arrow")) as writer:
        writer.write_table(table.data.table)
        writer.finalize()
    # What a data set of the hub leaves in the cache, where it is found without the hub.
    cache = tmp_path / "cache"
    files = {"train": str(tmp_path / "rows.parquet")}
    datasets.load_dataset("parquet", data_files=files, cache_dir=str(cache))
    (found,) = cache.glob("parquet/default-*")
    (table_file,) = found.glob("**/parquet-train.arrow")
    table_file.rename(table_file.with_name("name-train.arrow"))
    found.rename(found.with_name("default"))
    (cache / "parquet").rename(cache / "owner___name")
    sources = [*(str(tmp_path / name) for name in ("rows.parquet", "rows.arrow", "saved"))]
    sizes = ("hidden_size", "num_layers", "num_attention_heads", "num_key_value_heads")
    config = {
        "output_dir": str(tmp_path / "out"),
        "model": {"shape": {**dict.fromkeys(sizes, 2), "hidden_size": 8, "ffn_hidden_size": 4}},
        "tokenizer": {"path": "demo"},
        "data": {"train": [{"path": source} for source in (*sources, "owner/name")]},
        "packing": {"capacity": 256},
        "train": {"steps": 1},
    }
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(config))
    result = subprocess.run(
        [sys.executable, "-c", INSTALLED_COMMAND, str(path)],
        cwd=ROOT,
        env={**os.environ, "HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "samples: 8," in result.stdout


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, sft_fast.cli\n"
        "try: sft_fast.cli.main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'transformers', 'datasets', 'megatron', 'pydantic', 'yaml'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip().endswith("[]")
    assert "convert" in done.stdout and "data-report" in done.stdout


@pytest.mark.parametrize("name", ["none*.parquet", "none.parquet", "none*.jsonl"])
def test_check_says_that_no_file_is_there(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "demo", f"data.train={tmp_path / name}"]) == 1
    assert "no file matches" in (err := capsys.readouterr().err) or "does not exist" in err
