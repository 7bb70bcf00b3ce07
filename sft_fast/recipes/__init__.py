"""Configurations to start from, found by name."""

from __future__ import annotations

from pathlib import Path

RECIPES = Path(__file__).parent


def recipe_name(path: Path) -> str:
    """The name of a recipe, by which commands find it."""
    return path.relative_to(RECIPES).with_suffix("").as_posix()


def find_recipe(name: str) -> Path:
    """Path of a recipe.

    Raises:
        ValueError: there is none of that name; the message names the nearest.
    """
    from sft_fast.errors import nearest

    path = RECIPES / f"{name.removesuffix('.yaml')}.yaml"
    if path.is_file() and RECIPES in path.resolve().parents:
        return path
    near = nearest(name, [recipe_name(path) for path in RECIPES.rglob("*.yaml")])
    hint = f"did you mean {near}?" if near else "`sft_fast ls` lists them"
    raise ValueError(f"there is no file and no recipe {name}; {hint}")
