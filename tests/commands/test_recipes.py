import re
import shlex
from pathlib import Path

import pytest

from sft_fast.cli import main
from sft_fast.config.schema import load_config
from sft_fast.recipes import RECIPES

ROOT = Path(__file__).parents[2]


def test_init_writes_a_configuration_that_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = tmp_path / "chats.jsonl", tmp_path / "my.yaml"
    data.write_text('{"question": "a", "answer": "b"}\n')
    assert main(["init", "org/Model-7B", str(data), "-o", str(output)]) == 0
    config = load_config(output, [])
    assert (config.model.path, config.data.train) == ("org/Model-7B", str(data))
    assert config.data.eval_fraction == 0.02 and config.output_dir == "outputs/model-7b"
    assert config.optim.warmup_steps == 0, "a warm-up would be all of so short a run"
    assert "sft_fast chat outputs/model-7b" in capsys.readouterr().out
    assert "# columns: question, answer" in output.read_text()
    # Every commented key is one that exists.
    for line in output.read_text().splitlines():
        if line.strip().startswith("# ") and ":" in line:
            (output.parent / "u.yaml").write_text(
                output.read_text().replace(line, line.replace("# ", "", 1))
            )
            overrides = ["parallel.tensor=2"] if "sequence" in line else []
            load_config(output.parent / "u.yaml", overrides)
    assert main(["init", "org/m", str(data), "-o", str(output)]) == 2
    assert "exists; name another file" in capsys.readouterr().err


def test_init_says_what_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.jsonl").write_text("{}")
    for number, (model, data, missing) in enumerate(
        [
            ("org/m", "nothere.jsonl", ["nothere.jsonl"]),
            ("./nomodel", "org/data", ["./nomodel"]),
            ("org/m.5", str(tmp_path / "*.jsonl"), []),
            (str(tmp_path), "demo", []),
        ]
    ):
        assert main(["init", model, data, "-o", str(tmp_path / f"{number}.yaml")]) == 0
        text = capsys.readouterr().out
        assert re.findall("note: (.*) does not exist yet", text) == missing


def test_a_folder_does_not_hide_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "other"):
        (tmp_path / name).mkdir()
    assert main(["train", "demo", "--dry-run"]) == 0
    assert main(["train", "other", "--dry-run"]) == 2
    assert "there is no file and no recipe other" in capsys.readouterr().err


def test_init_fits_rows_to_the_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 2048}')
    output = tmp_path / "x.yaml"
    assert main(["init", str(tmp_path), "demo", "--eval", "demo", "-o", str(output)]) == 0
    config = load_config(output, [])
    assert config.packing.capacity == 2048 and config.data.eval == "demo"


def test_every_recipe_is_listed_with_its_comment_and_can_be_copied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["ls"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["ls"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert set(lines) == {
        p.relative_to(RECIPES).with_suffix("").as_posix() for p in RECIPES.rglob("*.yaml")
    }
    assert main(["cp", "demo", str(tmp_path)]) == 0
    assert load_config(tmp_path / "demo.yaml", []) == load_config(None, [])
    assert main(["cp", "demo", str(tmp_path)]) == 2
    assert main(["cp", "lama3_8b", str(tmp_path)]) == 2
    assert "did you mean llama3_8b?" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../config", "/etc/passwd", "nothing"])
def test_only_recipes_are_recipes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cp", name, "x.yaml"]) == 2
    assert "no recipe" in capsys.readouterr().err


def test_train_starts_torchrun_with_what_the_layout_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["demo", "parallel.tensor=2", "--dry-run", "optim.lr=1e-3"]
    arguments += ["--allow-change", "data,seed"]
    assert main(["train", *arguments]) == 0
    command = shlex.split(capsys.readouterr().out)
    engine = command.index(str(ROOT / "sft_fast/train.py"))
    launcher = ["-P", "-m", "sft_fast.runtime.launcher", "outputs/demo"]
    assert command[1:engine] == [*launcher, "--nproc-per-node", "2", "--standalone"]
    assert command[engine + 3 : engine + 5] == ["--allow-change", "data,seed"]
    assert command[engine + 5 :] == ["parallel.tensor=2", "optim.lr=1e-3"]


def test_train_passes_the_flags_of_several_machines_through(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "host", "--master-port", "9"]
    assert main(["train", "demo", "--nproc-per-node", "1", *flags, "--dry-run"]) == 0
    command = shlex.split(capsys.readouterr().out)
    assert "--standalone" not in command
    start = command.index("--nnodes")
    assert command[start : start + len(flags)] == flags


def test_train_checks_the_layout_before_it_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "demo", "--nproc-per-node", "5", "--dry-run"]) == 2
    assert "data-parallel ranks" in capsys.readouterr().err


def test_unknown_flags_and_overrides_where_there_are_none_are_errors() -> None:
    for arguments in (["check", "demo", "--rank", "2", "--bad"], ["ls", "a=b"], ["cp"]):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == 2


def test_env_tells_versions_and_hides_secrets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "hf_" + "a" * 20)
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert "megatron-core" in text and "torch" in text and "hf_aaaa" not in text


@pytest.mark.parametrize("flag", ["--max-restarts", "--master-port", "--node-rank"])
def test_what_torchrun_would_refuse_is_refused_in_a_line(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "demo", flag, "x", "--dry-run"])
    assert ended.value.code == 2
    assert f"argument {flag}: 'x'; expected a whole number, 0 or more" in capsys.readouterr().err
    assert main(["train", "demo", "--nproc-per-node", "1", flag, "0", "--dry-run"]) == 0
    assert f"{flag} 0 " in capsys.readouterr().out
