"""check, plan, preview and the trainer find the same tokenizer and the same architecture."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import save_file

from sft_fast.cli import main
from sft_fast.config.schema import Config, load_config
from sft_fast.data.demo import demo_tokenizer
from sft_fast.errors import ConfigError
from sft_fast.models.architecture import (
    Architecture,
    architecture_from_hf,
    architecture_from_shape,
    architecture_to_hf,
)
from sft_fast.models.flops import num_parameters
from sft_fast.models.locate import known_architecture
from sft_fast.models.weights import hf_shapes

SHAPE = (
    "{hidden_size: 16, num_layers: 2, num_attention_heads: 2, "
    "num_key_value_heads: 1, ffn_hidden_size: 32}"
)
TEXT = "data: {train: demo}\ntrain: {steps: 2}\npacking: {capacity: 256}\n"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
Run = Callable[..., Config]


def hf_config(vocab_size: int) -> dict[str, Any]:
    shape = load_config(None, []).model.shape
    assert shape is not None
    return architecture_to_hf(architecture_from_shape(shape, vocab_size))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without weights, with a tokenizer."""
    path = tmp_path_factory.mktemp("models") / "small"
    demo_tokenizer().save_pretrained(path)
    (path / "config.json").write_text(json.dumps(hf_config(len(demo_tokenizer()))))
    return path


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Writes a configuration, and loads it."""

    def write(*overrides: str) -> Config:
        (tmp_path / "run.yaml").write_text(TEXT)
        own = [f"output_dir={tmp_path / 'out'}", *overrides]
        (tmp_path / "overrides").write_text("\n".join(own))
        return load_config(tmp_path / "run.yaml", own)

    return write


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, which cannot be reached."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def cache(folder: Path, hub: Path) -> None:
    """Puts a model into the cache as org/small."""
    repository = hub / "models--org--small"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)


def call(tmp_path: Path, command: str, *options: str) -> int:
    overrides = (tmp_path / "overrides").read_text().splitlines()
    return main([command, str(tmp_path / "run.yaml"), *overrides, *options])


def trainer(config: Config, monkeypatch: pytest.MonkeyPatch) -> Architecture:
    """The architecture that the trainer's only rank reads."""
    from sft_fast.megatron import load_inputs

    monkeypatch.setattr(load_inputs, "once_per_node", lambda name, work: work(print))
    _, model = load_inputs.read_start(config)
    return model.architecture


def assert_one_answer(
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All find it, and speak of the same number of parameters."""
    for command, options in (("check", []), ("preview", ["--rows", "2"])):
        assert call(tmp_path, command, *options) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert call(tmp_path, "plan", "--json") == 0
    planned = json.loads(capsys.readouterr().out)["parameters"]
    assert planned == num_parameters(trainer(config, monkeypatch))


def assert_one_problem(
    config: Config,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    commands: tuple[str, ...] = ("check", "plan", "preview"),
) -> None:
    """All say the same, and only that."""
    with pytest.raises(ConfigError) as caught:
        trainer(config, monkeypatch)
    (problem,) = caught.value.problems
    assert expected in str(problem)
    for command in commands:
        assert call(tmp_path, command) != 0
        assert without_place(capsys.readouterr().err) == without_place(str(caught.value))


def without_place(text: str) -> list[str]:
    """The found, expected and fix of a message; the place of a key is known to check alone."""
    return [line.strip() for line in text.splitlines() if line.startswith("  ")]


def test_a_local_folder(
    folder: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    config = run("model.path=~/small", "model.random_init=true")
    assert_one_answer(config, tmp_path, monkeypatch, capsys)


def test_a_shape_has_the_vocabulary_of_its_tokenizer(
    folder: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    config = run(f"model.shape={SHAPE}", f"tokenizer.path={folder}")
    assert_one_answer(config, tmp_path, monkeypatch, capsys)
    known = known_architecture(config.model)
    assert known is not None and known.hidden_size == 16


def test_a_cached_hub_id_is_looked_at_as_a_folder_is(
    folder: Path, run: Run, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    cache(folder, hub)
    config = run("model.path=org/small", "model.random_init=true")
    assert_one_answer(config, tmp_path, monkeypatch, capsys)
    assert known_architecture(config.model) == architecture_from_hf(
        hf_config(len(demo_tokenizer()))
    )
    assert call(tmp_path, "check", "parallel.pipeline=64") == 1
    assert "num_layers" in capsys.readouterr().err


def test_what_is_cached_in_part_is_no_problem_where_the_rest_can_be_downloaded(
    folder: Path, run: Run, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    cache(folder, hub)
    for file in (hub / "models--org--small/snapshots").glob("*/*"):
        if file.name != "config.json":
            file.unlink()
    run("model.path=org/small")
    assert call(tmp_path, "check") == 1
    assert "holds no *.safetensors" in (text := capsys.readouterr().err)
    assert "has no tokenizer.json" in text
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert call(tmp_path, "check") == 0, capsys.readouterr().err


def test_a_hub_id_that_is_not_cached(
    run: Run, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    config = run("model.path=org/small", "model.random_init=true")
    assert_one_problem(config, "HF_HUB_OFFLINE is set", tmp_path, monkeypatch, capsys)
    assert known_architecture(config.model) is None
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert call(tmp_path, "check") == 0
    assert capsys.readouterr().out.count("org/small is taken for a hub id") == 1


def test_a_folder_without_a_tokenizer(
    folder: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(folder / "config.json", model)
    config = run(f"model.path={model}", "model.random_init=true")
    assert_one_problem(config, "has no tokenizer.json", tmp_path, monkeypatch, capsys)
    # Memory depends on no tokenizer.
    assert call(tmp_path, "plan", "--no-data") == 0


@pytest.mark.parametrize("key", ["model.path", "tokenizer.path"])
def test_a_path_that_does_not_exist(
    key: str, folder: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    wrong = f"{key}={folder.parent / 'smal'}"
    config = run(f"model.path={folder}", "model.random_init=true", wrong)
    assert_one_problem(config, f"did you mean {folder}?", tmp_path, monkeypatch, capsys)


def test_an_unsupported_model(
    folder: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    other = hf_config(99) | {"architectures": ["OtherForCausalLM"]}
    (model / "config.json").write_text(json.dumps(other))
    config = run(f"model.path={model}", "model.random_init=true")
    commands = ("check", "plan")  # a preview is of the data alone
    assert_one_problem(config, "OtherForCausalLM", tmp_path, monkeypatch, capsys, commands)


def test_a_vocabulary_that_grows(
    folder: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    more = [f"model.path={folder}", "model.random_init=true", "tokenizer.add_tokens=[<a>, <b>]"]
    both = ("check", "plan")
    expected = "learn 2 more tokens: model.new_embeddings=mean"
    assert_one_problem(run(*more), expected, tmp_path, monkeypatch, capsys, both)
    config = run(*more, "model.new_embeddings=mean")
    assert trainer(config, monkeypatch).vocab_size == len(demo_tokenizer()) + 2
    assert_one_answer(config, tmp_path, monkeypatch, capsys)
    config = run(*more, "model.new_embeddings=mean", "lora.rank=2")
    expected = "embeddings of 2 new tokens would never be trained"
    assert_one_problem(config, expected, tmp_path, monkeypatch, capsys, both)


def of_vocabulary(folder: Path, copy: Path, vocab_size: int) -> Path:
    """The model with another vocabulary, the tokenizer unchanged, and weights of its own."""
    shutil.copytree(folder, copy)
    config = hf_config(vocab_size)
    (copy / "config.json").write_text(json.dumps(config))
    shapes = hf_shapes(architecture_from_hf(config))
    weights = {name: np.full(shape, 0.5, np.float16) for name, shape in shapes.items()}
    save_file(weights, copy / "model.safetensors")
    return copy


def test_tokens_in_unused_rows_are_new_all_the_same(
    folder: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    num_tokens = len(demo_tokenizer())
    wide = of_vocabulary(folder, tmp_path / "wide", num_tokens + 50)
    more = [f"model.path={wide}", "tokenizer.add_tokens=[<a>, <|im_end|>]"]
    both = ("check", "plan")
    expected = "learn 1 more tokens: model.new_embeddings=mean"
    assert_one_problem(run(*more), expected, tmp_path, monkeypatch, capsys, both)
    more.append("model.new_embeddings=mean")
    assert trainer(run(*more), monkeypatch).vocab_size == num_tokens + 50
    assert_one_answer(run(*more), tmp_path, monkeypatch, capsys)
    expected = "embeddings of 1 new tokens would never be trained"
    assert_one_problem(run(*more, "lora.rank=2"), expected, tmp_path, monkeypatch, capsys, both)
    config = run(f"model.path={wide}", "tokenizer.add_tokens=[<|im_end|>]", "lora.rank=2")
    assert trainer(config, monkeypatch).vocab_size == num_tokens + 50


def test_a_token_too_many_is_none_until_it_occurs(
    folder: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """As in Gemma 3, whose tokenizer has one for images."""
    num_tokens = len(demo_tokenizer())
    narrow = of_vocabulary(folder, tmp_path / "narrow", num_tokens - 1)
    config = run(f"model.path={narrow}")
    assert trainer(config, monkeypatch).vocab_size == num_tokens - 1
    assert call(tmp_path, "check") == 0
    told = capsys.readouterr().out
    assert f"has {num_tokens} ids, the model {num_tokens - 1}: a run stops where" in told
    config = run(f"model.path={narrow}", "model.new_embeddings=mean")
    assert trainer(config, monkeypatch).vocab_size == num_tokens


def test_no_command_but_the_trainer_downloads_weights(
    folder: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patterns: list[list[str]] = []

    def download(path: str, *, allow_patterns: list[str], **options: object) -> str:
        patterns.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    run("model.path=org/small", "model.random_init=true")
    for command in ("check", "plan", "preview"):
        assert call(tmp_path, command) == 0
    assert patterns and not any("*.safetensors" in names for names in patterns)
