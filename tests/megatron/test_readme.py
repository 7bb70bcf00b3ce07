"""The list of places where megatron and torch are bent is complete, and its tests exist."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "sft_fast" / "megatron"
README = (FOLDER / "README.md").read_text(encoding="utf-8")


def private_names(tree: ast.AST) -> Iterator[str]:
    """Names with one underscore that the code takes from objects or modules of others."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            is_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if not is_self and (node.attr not in own or is_super(node.value)):
                yield node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names)
            yield from (node.module or "").split(".")


def is_super(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and getattr(node.func, "id", "") == "super"


def bent_names(text: str) -> set[str]:
    """Private names of others in a module, and `__class__` where it is assigned."""
    tree = ast.parse(text)
    found = {name for name in private_names(tree) if re.fullmatch(r"_[a-z]\w*", name)}
    stores = [
        node for node in ast.walk(tree) if isinstance(node, ast.Attribute | ast.Name)
        and isinstance(node.ctx, ast.Store)
    ]  # fmt: skip
    return found | {"__class__" for node in stores if getattr(node, "attr", "") == "__class__"}


FILES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.py"))


@pytest.mark.parametrize("file", FILES)
def test_private_names_of_others_are_listed(file: str) -> None:
    names = bent_names((FOLDER / file).read_text(encoding="utf-8"))
    rows = "\n".join(line for line in README.splitlines() if f"`{file}`" in line)
    assert not [name for name in names if name not in rows], f"{file} has no such row in README.md"


def test_a_bend_is_seen() -> None:
    code = "from a._b import c\nx._hidden()\nx.__class__ = y\nself._own\n_local = 1"
    assert bent_names(code) == {"_b", "_hidden", "__class__"}
    assert bent_names("class A:\n def _f(self):\n  return super()._f() + self._f()") == {"_f"}


def test_the_files_and_tests_that_it_names_exist() -> None:
    tests = re.findall(r"`(tests/\S+?)::(\w+)`", README)
    assert len(tests) > 20
    for file, name in tests:
        assert f"\ndef {name}(" in (ROOT / file).read_text(encoding="utf-8"), (file, name)
    firsts = [line.split("|")[1] for line in README.splitlines() if line.startswith("| `")]
    files = re.findall(r"`([\w/]+\.py)`", "".join(firsts))
    assert files and not [file for file in files if not (FOLDER / file).is_file()]
    for first in firsts:
        file, *names = re.findall(r"`([\w./]+)`", first)
        text = (FOLDER / file).read_text(encoding="utf-8")
        last = [name.rpartition(".")[2] for name in names if not name.endswith(".py")]
        assert not [name for name in last if not re.search(rf"(def|class) {name}\b", text)], first
    plain = re.findall(r"`(tests/[\w/]+\.py)`", README)
    assert all((ROOT / file).is_file() for file in plain)
