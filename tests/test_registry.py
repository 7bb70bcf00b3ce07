import subprocess
import sys
import types
from pathlib import Path

import pytest

from sft_fast import registry
from sft_fast.config.schema import Config, load_config
from sft_fast.registry import get_trainer, load_plugins, register_trainer, registered_pairs

PLUGIN = """\
from sft_fast.registry import register_trainer

@register_trainer(backend="megatron", stage="echo")
def train(config):
    return config.seed
"""


@pytest.fixture(autouse=True)
def empty_registry(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    yield
    for name in [name for name in sys.modules if name.startswith("sft_fast_plugin:")]:
        del sys.modules[name]


def config_with(*plugins: object) -> Config:
    return load_config(None, [f"plugins=[{', '.join(str(plugin) for plugin in plugins)}]"])


def one(config: Config) -> int:
    return 1


def two(config: Config) -> int:
    return 2


def test_function_form():
    assert register_trainer(one, "torch", "dpo") is one
    assert get_trainer("torch", "dpo") is one


def test_decorator_form_returns_the_function_itself():
    decorated = register_trainer(backend="torch", stage="dpo")(one)
    assert decorated is one
    assert get_trainer("torch", "dpo") is one


def test_unknown_pair_lists_all_pairs():
    register_trainer(one, "torch", "dpo")
    with pytest.raises(ValueError) as caught:
        get_trainer("megatron", "dpo")
    assert "(megatron, dpo)" in str(caught.value)
    assert "(megatron, export), (megatron, sft), (torch, dpo)" in str(caught.value)


def test_backend_and_stage_are_not_mixed_up():
    register_trainer(one, "a", "b")
    register_trainer(two, "b", "a")
    assert (get_trainer("a", "b"), get_trainer("b", "a")) == (one, two)


def test_second_trainer_for_a_pair_is_refused():
    register_trainer(one, "torch", "dpo")
    register_trainer(one, "torch", "dpo")
    with pytest.raises(ValueError, match="already"):
        register_trainer(two, "torch", "dpo")
    assert get_trainer("torch", "dpo") is one


def test_built_in_trainer_cannot_be_replaced():
    with pytest.raises(ValueError, match="sft_fast.megatron.sft:train"):
        register_trainer(one, "megatron", "sft")
    assert ("megatron", "sft") in registered_pairs()


def test_built_in_trainer_is_imported_when_asked_for_only(monkeypatch):
    module = types.ModuleType("lazy_trainer")
    module.train = two
    monkeypatch.setattr(registry, "_BUILT_IN", {("lazy", "sft"): "lazy_trainer:train"})
    assert registered_pairs() == [("lazy", "sft")]
    monkeypatch.setitem(sys.modules, "lazy_trainer", module)
    assert get_trainer("lazy", "sft") is two


def test_built_in_module_may_register_itself(monkeypatch):
    name = f"{one.__module__}:{one.__qualname__}"
    monkeypatch.setattr(registry, "_BUILT_IN", {("lazy", "sft"): name})
    register_trainer(one, "lazy", "sft")
    assert get_trainer("lazy", "sft") is one


@pytest.mark.parametrize(
    "arguments", [("train", "a", "b"), (one, "", "b"), (one, "a", ""), (one,), (3, "a", "b")]
)
def test_what_is_no_trainer_of_a_pair_is_refused(arguments):
    with pytest.raises(ValueError, match="expected"):
        register_trainer(*arguments)


def test_plugin_is_one_file_and_one_decorator(tmp_path):
    (tmp_path / "echo.py").write_text(PLUGIN)
    config = config_with(tmp_path / "echo.py")
    load_plugins(config)
    load_plugins(config)
    assert get_trainer("megatron", "echo")(config) == config.seed


def test_two_plugins_of_one_name_are_both_loaded(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "plugin.py").write_text(PLUGIN.replace("echo", f"echo_{folder}"))
    load_plugins(config_with(tmp_path / "a/plugin.py", tmp_path / "b/plugin.py"))
    assert {("megatron", "echo_a"), ("megatron", "echo_b")} <= set(registered_pairs())


def test_two_plugins_for_one_pair_are_refused(tmp_path):
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text(PLUGIN)
    with pytest.raises(ValueError, match="already"):
        load_plugins(config_with(tmp_path / "a.py", tmp_path / "b.py"))


@pytest.mark.parametrize("name, found", [("gone.py", "does not exist"), ("x.txt", "not a .py")])
def test_plugin_that_is_no_python_file(tmp_path, name, found):
    (tmp_path / "x.txt").write_text("")
    (tmp_path / "good.py").write_text("")
    with pytest.raises(ValueError, match=found) as caught:
        load_plugins(config_with(tmp_path / "good.py", tmp_path / name))
    assert "plugins[1]" in str(caught.value)


def test_plugin_that_fails_shows_its_own_error_and_is_not_taken_as_loaded(tmp_path):
    (tmp_path / "bad.py").write_text("import a_module_that_is_not_there\n")
    config = config_with(tmp_path / "bad.py")
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
            load_plugins(config)


def test_registry_alone_imports_nothing_of_weight():
    code = (
        "import sys, sft_fast.registry as r; r.registered_pairs();"
        "print(sorted({'torch', 'pydantic', 'megatron', 'yaml'} & sys.modules.keys()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        check=True,
    )
    assert result.stdout.strip() == "[]"
