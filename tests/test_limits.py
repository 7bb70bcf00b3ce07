"""Limits on the shape of the code: who takes the whole configuration, how long functions are."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST_THAT_TAKE_EVERYTHING = 25
MOST_LINES = 80
MOST_TOP_LEVEL_FILES = 12
WHOLE_CONFIG = re.compile(r"(?<!\w)Config\b")


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function of sft_fast/ and kernels/, with its place."""
    for file in [*ROOT.glob("sft_fast/**/*.py"), *ROOT.glob("kernels/*.py")]:
        if "sft_fast/kernels" not in file.as_posix():
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef):
                    yield f"{file.relative_to(ROOT)}:{node.lineno} {node.name}", node


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


def test_few_files_stand_outside_the_folders() -> None:
    assert len(list(ROOT.glob("sft_fast/*.py"))) <= MOST_TOP_LEVEL_FILES
