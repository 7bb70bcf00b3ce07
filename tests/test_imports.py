"""Who may import what: each heavy library has one place in the package."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sft_fast"
HOMES = {
    "megatron": ("sft_fast/megatron",),
    "datasets": ("sft_fast/data",),
    "triton": ("kernels",),
}
# Imported before torch could be needed: a config error must not wait for it.
LIGHT = (
    "cli",
    "errors",
    "registry",
    "train",
    "config/schema",
    "config/checks",
    "config/validation",
    "config/primus",
)
HEAVY = {"torch", "megatron", "transformers", "datasets", "triton", "matplotlib", "wandb"}


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            yield node.module


def source_files() -> Iterator[Path]:
    for folder in ("sft_fast", "kernels"):
        files = (ROOT / folder).rglob("*.py")
        yield from (file for file in files if "sft_fast/kernels" not in file.as_posix())


@pytest.mark.parametrize("library", HOMES)
def test_a_heavy_library_is_imported_in_its_home_only(library: str) -> None:
    users = {
        file.relative_to(ROOT).as_posix()
        for file in source_files()
        for module in imported_modules(file)
        if module.split(".")[0] == library
    }
    assert users, f"nothing imports {library}: the test looks in the wrong place"
    assert all(user.startswith(HOMES[library]) for user in users), users


def test_megatron_bridge_is_not_used() -> None:
    modules = {module for file in source_files() for module in imported_modules(file)}
    assert not [module for module in modules if "bridge" in module.lower()]


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_no_torch_at_the_top(module: str) -> None:
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or node.names[0].name for node in top}
    assert not {name.split(".")[0] for name in names} & HEAVY


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh process has loaded after running `code`."""
    show = "import sys, json; print('\\n' + json.dumps([m for m in sys.modules if sys.modules[m]]))"
    result = subprocess.run(
        [sys.executable, "-c", f"{code}\n{show}"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return {name.split(".")[0] for name in json.loads(result.stdout.splitlines()[-1])}


def test_importing_the_package_imports_nothing_else() -> None:
    assert not loaded_by("import sft_fast") & (HEAVY | {"pydantic", "numpy", "yaml", "rich"})


@pytest.mark.parametrize("arguments", [["--help"], ["ls"], ["train", "--help"]])
def test_help_imports_the_standard_library_only(arguments: list[str]) -> None:
    code = f"from sft_fast.cli import main\ntry: main({arguments})\nexcept SystemExit: pass"
    assert not loaded_by(code) & (HEAVY | {"pydantic", "numpy", "yaml", "rich"})


def test_check_imports_no_heavy_library() -> None:
    loaded = loaded_by("from sft_fast.cli import main\nassert main(['check', 'demo']) == 0")
    assert "pydantic" in loaded
    assert not loaded & HEAVY


def test_preview_needs_no_torch() -> None:
    code = "import sys\nfrom sft_fast.cli import main\nsys.argv[1:] = ['preview', 'demo']\n"
    loaded = loaded_by(code + "assert main() == 0")
    assert "transformers" in loaded
    assert not loaded & (HEAVY - {"transformers"})
