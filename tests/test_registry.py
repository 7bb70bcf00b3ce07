import importlib
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from sft_fast.registry import (
    LateTrainer,
    Registry,
    forget,
    get_loss,
    get_trainer,
    load_file,
    load_plugins,
    register_loss,
    register_metric,
    register_trainer,
    trainers,
)
from sft_fast.train import EXPORT

pytestmark = pytest.mark.usefixtures("registries_as_before")

PLUGIN = """\
from sft_fast.registry import register_trainer

@register_trainer(backend="megatron", stage="echo")
def train(config, phases):
    return config + 1
"""


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry[int]:
    monkeypatch.setattr(Registry, "every", list(Registry.every))
    return Registry("colour", "paint.colour", reserved=("auto",))


def one(config: Any, phases: Any) -> int:
    return 1


def two(config: Any, phases: Any) -> int:
    return 2


def test_an_entry_is_found_by_its_name(registry: Registry[int]) -> None:
    registry.add("red", 1)
    registry.add("blue", 2)
    registry.add("red", 1)
    assert (registry.get("red"), registry.get("blue")) == (1, 2)
    assert list(registry.entries) == ["red", "blue"]


def test_a_name_belongs_to_the_first(registry: Registry[int]) -> None:
    registry.add("red", 1)
    for name in ("red", "auto"):
        with pytest.raises(ValueError, match=f"the colour name '{name}' is taken"):
            registry.add(name, 2)
    assert registry.get("red") == 1


def test_an_empty_name_is_refused(registry: Registry[int]) -> None:
    with pytest.raises(ValueError, match="without a name for paint.colour"):
        registry.add("", 1)


def test_a_name_that_nothing_has_gets_all_names_and_the_nearest(registry: Registry[int]) -> None:
    with pytest.raises(ValueError, match="paint.colour: no colour 'red'; there are: auto.$"):
        registry.get("red")
    registry.add("red", 1)
    registry.add("blue", 2)
    expected = "no colour 'bleu'; there are: auto, blue, red. Did you mean blue?"
    with pytest.raises(ValueError) as caught:
        registry.get("bleu")
    assert expected in str(caught.value)


def test_trainers_are_found_by_backend_and_stage() -> None:
    assert register_trainer(backend="a", stage="b")(one) is one
    register_trainer(backend="b", stage="a")(two)
    assert (get_trainer("a", "b"), get_trainer("b", "a")) == (one, two)
    with pytest.raises(ValueError, match="taken"):
        register_trainer(backend="a", stage="b")(two)
    with pytest.raises(ValueError, match=r"no trainer '\(a, c\)'; there are: .*\(a, b\), \(b, a\)"):
        get_trainer("a", "c")


def test_a_built_in_trainer_cannot_be_replaced() -> None:
    with pytest.raises(ValueError, match=r"'\(megatron, sft\)' is taken"):
        register_trainer(backend="megatron", stage="sft")(one)


@pytest.mark.parametrize("names", [("", "b"), ("a", "")])
def test_a_trainer_needs_a_backend_and_a_stage(names: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="expected a backend and a stage"):
        register_trainer(backend=names[0], stage=names[1])


@pytest.mark.parametrize("name", ["loss", "perplexity", "accuracy"])
def test_built_in_metrics_cannot_be_replaced(name: str) -> None:
    with pytest.raises(ValueError, match="taken"):
        register_metric(name, greater_is_better=True)(lambda sample: (1.0, 1.0))


def test_a_plugin_is_one_file_and_one_decorator(tmp_path: Path) -> None:
    (tmp_path / "echo.py").write_text(PLUGIN)
    load_plugins([str(tmp_path / "echo.py")] * 2)
    assert get_trainer("megatron", "echo")(41, None) == 42  # type: ignore[arg-type]


def test_two_files_of_one_name_are_both_run(tmp_path: Path) -> None:
    files = [tmp_path / folder / "plugin.py" for folder in "ab"]
    for file in files:
        file.parent.mkdir()
        file.write_text(PLUGIN.replace("echo", file.parent.name))
    load_plugins([str(file) for file in files])
    for file in files:
        assert trainers.names_of(str(file)) == [f"(megatron, {file.parent.name})"]


def test_a_file_changed_within_a_second_is_run_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    plugin = tmp_path / "mine.py"
    for name in ("echo", "once"):
        plugin.write_text(PLUGIN.replace("echo", name))
        os.utime(plugin, (1e9, 1e9))
        load_plugins([str(plugin)])
        assert trainers.names_of(str(plugin)) == [f"(megatron, {name})"]
        forget(str(plugin))
    assert not (tmp_path / "__pycache__").exists()


def test_a_file_named_in_two_places_is_run_once(tmp_path: Path) -> None:
    """As a plugin and as a format, and by another spelling of its path."""
    from sft_fast.data.format_registry import load_format

    path = tmp_path / "both.py"
    path.write_text(
        PLUGIN + "from sft_fast.data.format_registry import register_format\n"
        "register_format('both')(lambda record: None)\n"
    )
    load_plugins([str(path)])
    (tmp_path / "folder").mkdir()
    assert load_format(f"{tmp_path}/folder/../both.py").name == "both"


def test_two_plugins_for_one_pair_are_refused(tmp_path: Path) -> None:
    files = [tmp_path / "a.py", tmp_path / "b.py"]
    for file in files:
        file.write_text(PLUGIN)
    with pytest.raises(ValueError, match="taken"):
        load_plugins([str(file) for file in files])


@pytest.mark.parametrize("name, found", [("gone.py", "does not exist"), ("x.txt", "not a .py")])
def test_what_is_no_python_file_is_named(tmp_path: Path, name: str, found: str) -> None:
    (tmp_path / "x.txt").write_text("")
    (tmp_path / "good.py").write_text("")
    with pytest.raises(ValueError, match=found) as caught:
        load_plugins([str(tmp_path / "good.py"), str(tmp_path / name)])
    assert "plugins[1]" in str(caught.value)


def test_a_file_that_fails_is_forgotten_with_all_that_it_registered(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    broken = "from sft_fast.registry import register_loss\n"
    broken += "register_loss('half')(lambda logprobs, labels: logprobs)\n"
    path.write_text(broken + "import a_module_that_is_not_there\n")
    register_loss("before")(one)  # type: ignore[arg-type]
    for _ in range(2):
        with pytest.raises(ValueError, match="bad.py:3: .*a_module_that_is_not_there"):
            load_file(str(path), "plugins[0]")
        with pytest.raises(ValueError, match="no loss 'half'"):
            get_loss("half")
    assert get_loss("before") is one
    path.write_text(broken)
    load_file(str(path), "plugins[0]")
    assert get_loss("half")


def test_the_registry_alone_imports_nothing_of_weight() -> None:
    code = (
        "import sys, sft_fast.registry;"
        "print(sorted({'torch', 'numpy', 'pydantic', 'megatron', 'yaml'} & sys.modules.keys()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        check=True,
    )
    assert result.stdout.strip() == "[]"


def test_a_late_trainer_is_imported_when_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    register_trainer(backend="late", stage="sft")(LateTrainer("a_late_trainer:run"))
    module = types.ModuleType("a_late_trainer")
    module.run = lambda config, phases: config + 1  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_late_trainer", module)
    assert get_trainer("late", "sft")(41, None) == 42  # type: ignore[arg-type]


@pytest.mark.parametrize("late", [get_trainer("megatron", "sft"), EXPORT])
def test_built_in_trainers_are_where_they_are_said_to_be(late: LateTrainer) -> None:
    module, _, function = late.target.partition(":")
    assert callable(getattr(importlib.import_module(module), function))
