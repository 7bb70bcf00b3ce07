"""Who may import what: each heavy library has one place in the package."""

import ast
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
LIGHT = ("config", "config_checks", "config_source", "errors", "registry", "primus", "train")


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
    heavy = {"torch", "megatron", "transformers", "datasets", "triton"}
    assert not {name.split(".")[0] for name in names} & heavy
