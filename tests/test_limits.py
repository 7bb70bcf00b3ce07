"""Limits on the shape of the code: who takes the whole configuration, how long functions are,
how many functions of tensors give shapes."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_THAT_TAKE_EVERYTHING = 25
MOST_LINES = 80
MOST_TOP_LEVEL_FILES = 12
LEAST_SHARE_WITH_SHAPES = 0.8
WHOLE_CONFIG = re.compile(r"(?<!\w)Config\b")
TENSOR = re.compile(r"\b(Tensor|NDArray)\b")
SHAPE = re.compile(r"\[[\w.(]+([ ,+*/x=:-]+[\w.()]+)*,?\]|\b(scalar|0-d|shapes?)\b")
"""[tokens, h], [3, b, s], [N + 1]; or in words, that it is any, or that of another tensor."""


@functools.cache
def sources() -> list[tuple[Path, str, list[ast.FunctionDef]]]:
    """Every module of sft_fast/ and kernels/, its text and its functions."""
    files = [*ROOT.glob("sft_fast/**/*.py"), *ROOT.glob("kernels/*.py")]
    texts = {
        file.relative_to(ROOT): file.read_text(encoding="utf-8")
        for file in files
        if "sft_fast/kernels" not in file.as_posix()
    }
    return [(file, text, functions_of(text)) for file, text in texts.items()]


def functions_of(text: str) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function of sft_fast/ and kernels/, with its place."""
    for file, _, nodes in sources():
        for node in nodes:
            yield f"{file}:{node.lineno} {node.name}", node


def annotations(function: ast.FunctionDef) -> Iterator[str]:
    arguments = function.args
    for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
        if argument.annotation is not None:
            yield ast.unparse(argument.annotation)


def test_few_functions_take_the_whole_configuration() -> None:
    """The others take the section that they read, so that a caller sees what decides."""
    takers = [
        place
        for place, function in functions()
        if any(WHOLE_CONFIG.search(annotation) for annotation in annotations(function))
    ]
    assert takers, "nothing takes Config: the test looks for the wrong name"
    assert len(takers) <= MOST_THAT_TAKE_EVERYTHING, takers


def test_no_function_but_a_kernel_is_long() -> None:
    too_long = [
        place
        for place, function in functions()
        if function.end_lineno - function.lineno >= MOST_LINES
        and not any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)
    ]
    assert not too_long


def gives_a_shape(function: ast.FunctionDef, text: str) -> bool:
    """In its docstring, or in a comment of its signature."""
    signature = text.splitlines()[function.lineno - 1 : function.body[0].lineno - 1]
    comments = [line.partition("#")[2] for line in signature]
    return any(SHAPE.search(said) for said in [ast.get_docstring(function) or "", *comments])


def takes_or_returns_tensors(function: ast.FunctionDef) -> bool:
    returned = ast.unparse(function.returns) if function.returns else ""
    return any(TENSOR.search(annotation) for annotation in [*annotations(function), returned])


def test_most_functions_of_tensors_give_their_shapes() -> None:
    with_shape, without = [], []
    for file, text, nodes in sources():
        for function in filter(takes_or_returns_tensors, nodes):
            found = with_shape if gives_a_shape(function, text) else without
            found.append(f"{file}:{function.lineno} {function.name}")
    assert with_shape, "no function has a tensor: the test looks for the wrong name"
    assert len(with_shape) / (len(with_shape) + len(without)) >= LEAST_SHARE_WITH_SHAPES, without


@pytest.mark.parametrize(
    ("code", "counts"),
    [
        ('def f(x: Tensor):\n    """x [s, b, h], scaled."""', True),
        ('def f(x: NDArray[np.int32]):\n    """Lengths, int32 [N + 1]."""', True),
        ("def f(\n    x: Tensor,  # [ceil(n / 8)]\n) -> Tensor:\n    return x", True),
        ('def f(x: Tensor):\n    """Like x, of any shape."""', True),
        ("def f(x: Tensor):\n    return x[0, 1]  # [0]", False),
        ('def f(x: "Tensor"):\n    """Scales x by ["a", "b"]."""', False),
        ("def f(x: Tensor): ...", False),
    ],
)
def test_what_counts_as_a_shape(code: str, counts: bool) -> None:
    (function,) = functions_of(code)
    assert takes_or_returns_tensors(function)
    assert gives_a_shape(function, code) is counts


def test_few_files_stand_outside_the_folders() -> None:
    assert len(list(ROOT.glob("sft_fast/*.py"))) <= MOST_TOP_LEVEL_FILES
