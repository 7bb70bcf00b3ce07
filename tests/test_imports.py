"""Who may import what: folders stand on floors, and each heavy library has one place."""

import ast
import graphlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOMES = {
    "megatron": ("sft_fast.megatron",),
    "datasets": ("sft_fast.data",),
    "triton": ("sft_fast.kernels",),
}
# Imported before torch could be needed: a config error must not wait for it.
LIGHT = ("cli", "errors", "registry", "train")
LIGHT_FOLDERS = ("commands", "config", "models", "runtime")
HEAVY = {"torch", "megatron", "transformers", "datasets", "triton", "matplotlib", "wandb"}


def module_name(path: str) -> str:
    """The dotted name of a file or folder of the package."""
    name = "sft_fast." + path.removesuffix("/").removesuffix(".py").replace("/", ".")
    return name.removesuffix(".__init__")


def modules(root: Path) -> dict[str, Path]:
    """The file of each module below root/sft_fast; kernels/ is reached through its link."""
    package = root / "sft_fast"
    files = {*package.rglob("*.py"), *package.glob("kernels/*.py")} - {package / "__init__.py"}
    return {module_name(file.relative_to(package).as_posix()): file for file in sorted(files)}


def names(node: ast.AST) -> Iterator[str]:
    """What the node imports, or names as `sft_fast.x` or `sft_fast.x:attribute` in a string."""
    match node:
        case ast.Import(names=aliases):
            yield from (alias.name for alias in aliases)
        case ast.ImportFrom(module=module, names=aliases, level=level):
            assert level == 0, f"line {node.lineno}: a relative import, which is not followed here"
            yield from (f"{module}.{alias.name}" for alias in aliases)
        case ast.Constant(value=str(text)) if text.startswith("sft_fast."):
            yield text.partition(":")[0]


def imports(root: Path) -> dict[str, set[str]]:
    """The modules that each module imports: at the top, inside functions, for types, by name."""
    known = modules(root)
    graph: dict[str, set[str]] = {}
    for module, file in known.items():
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        found = {name for node in nodes for name in names(node)}
        # `from a.b import c` imports the module a.b.c if there is one, else c out of a.b.
        graph[module] = {n if n in known else n.rpartition(".")[0] for n in found} & {*known}
        graph[module].discard(module)
    return graph


def floors(root: Path) -> list[str]:
    """The package's folders and modules from the ground up, as its docstring lists them."""
    tree = ast.parse((root / "sft_fast" / "__init__.py").read_text(encoding="utf-8"))
    docstring = ast.get_docstring(tree, clean=False) or ""
    lines = re.findall(r"^    ((?:[\w/]+(?:\.py|/) +)+)\S", docstring, re.M)
    return [name for line in lines for name in line.split()]


def climbs(root: Path) -> list[str]:
    """Imports of what does not stand below the importing module."""
    order = {module_name(path): floor for floor, path in enumerate(floors(root))}

    def floor(module: str) -> int:
        while module not in order:
            assert module != "sft_fast", "a folder has no line in the tree of sft_fast/__init__.py"
            module = module.rpartition(".")[0]
        return order[module]

    graph = imports(root)
    return [f"{a} imports {b}" for a in graph for b in graph[a] if floor(b) > floor(a)]


def cycle(root: Path) -> list[str]:
    """Modules of one import cycle; empty if there is none."""
    try:
        graphlib.TopologicalSorter(imports(root)).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_a_folder_imports_only_what_stands_below_it() -> None:
    assert not climbs(ROOT)


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert not cycle(ROOT)


BAD_IMPORTS = {
    "at the top": "from sft_fast.roof import high",
    "of a name": "from sft_fast.roof.high import TEXT",
    "lazy": "def f():\n    import sft_fast.roof.high",
    "type only": "if TYPE_CHECKING:\n    from sft_fast.roof.high import TEXT",
    "by a string": "import_module('sft_fast.roof.high')",
    "by a string with an attribute": "STAGE = 'sft_fast.roof.high:TEXT'",
}


@pytest.mark.parametrize("code", BAD_IMPORTS.values(), ids=BAD_IMPORTS)
def test_a_bad_import_is_seen(tmp_path: Path, code: str) -> None:
    for folder in ("cellar", "roof"):
        (tmp_path / "sft_fast" / folder).mkdir(parents=True)
    package = tmp_path / "sft_fast"
    package.joinpath("__init__.py").write_text(
        '"""A house.\n\n    cellar/  what is low\n    roof/  what is high\n"""'
    )
    package.joinpath("cellar", "low.py").write_text("")
    package.joinpath("roof", "high.py").write_text("from sft_fast.cellar import low\nTEXT = ''")
    assert not climbs(tmp_path) and not cycle(tmp_path)
    package.joinpath("cellar", "low.py").write_text(code)
    assert climbs(tmp_path) == ["sft_fast.cellar.low imports sft_fast.roof.high"]
    assert set(cycle(tmp_path)) == {"sft_fast.cellar.low", "sft_fast.roof.high"}


@pytest.mark.parametrize("library", HOMES)
def test_a_heavy_library_is_imported_in_its_home_only(library: str) -> None:
    users = {
        module
        for module, file in modules(ROOT).items()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        for name in names(node)
        if name.split(".")[0] == library
    }
    assert users, f"nothing imports {library}: the test looks in the wrong place"
    assert all(user.startswith(HOMES[library]) for user in users), users


@pytest.mark.parametrize(
    "module", [m for m in modules(ROOT) if m.split(".")[1] in LIGHT + LIGHT_FOLDERS]
)
def test_light_modules_import_no_torch_at_the_top(module: str) -> None:
    tree = ast.parse(modules(ROOT)[module].read_text(encoding="utf-8"))
    assert not {name.split(".")[0] for node in tree.body for name in names(node)} & HEAVY


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
