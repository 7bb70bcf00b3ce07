"""From a file and overrides to a checked pydantic model, with every problem told at once.

Knows nothing of the schema itself: `config.py` holds that.
"""

import contextlib
import copy
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from sft_fast.config.yaml_source import Document, KeyPath, dotted, key_path, parse_value
from sft_fast.errors import ConfigError, Problem, nearest, nearest_key, show
from sft_fast.redact import holds_secret, is_secret_name

ModelT = TypeVar("ModelT", bound=BaseModel)

FIELDS_ONLY = {"fields_only": True}
"""Validation context in which a model leaves its cross-field checks out."""
MEANING_WIDTH = 90
"""Characters of a key's description that a message repeats."""


@dataclass(frozen=True)
class ValueOrigin:
    """Where a value comes from.

    Attributes:
        where: "file:line" or "command line: a.b=c".
        name: The key as the user wrote it, when that is not the dotted key.
    """

    where: str
    name: str = ""


@dataclass
class Tree:
    """Values under our keys, not checked yet.

    Attributes:
        source: What the error message's title names.
        data: Nested mapping of our keys.
        origins: ValueOrigin of every key, by path.
        problems: What is already known to be wrong.
        notes: What is accepted and means something else, or nothing, here.
    """

    source: str
    data: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, ValueOrigin] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def from_document(cls, document: Document) -> "Tree":
        """Returns the tree of a file that is written in our own keys."""
        origins = {path: ValueOrigin(document.where(path)) for path in document.lines}
        return cls(document.name, copy.deepcopy(document.data), origins, list(document.problems))

    def set(self, path: KeyPath, value: Any, origin: ValueOrigin) -> None:
        """Puts `value` at `path`, making the sections on the way.

        Raises:
            ValueError: A key on the way holds a value, not a section.
        """
        section = self.data
        for depth, part in enumerate(path[:-1], start=1):
            if section.get(str(part)) is None:
                section[str(part)] = {}
            section = section[str(part)]
            if not isinstance(section, dict):
                raise ValueError(f"{dotted(path[:depth])} is {show(section)}, not a section")
        section[str(path[-1])] = value
        self._forget(path)
        self.origins[path] = origin

    def remove(self, section: str, key: str) -> None:
        """Takes `section.key` away, if it is there, so that its default holds again."""
        self.data.get(section, {}).pop(key, None)
        self._forget((section, key))

    def _forget(self, path: KeyPath) -> None:
        self.origins = {p: o for p, o in self.origins.items() if p[: len(path)] != path}

    def origin(self, path: KeyPath) -> ValueOrigin:
        """Returns the origin of `path`, or of the nearest key above it, or an empty one."""
        while path and path not in self.origins:
            path = path[:-1]
        return self.origins.get(path, ValueOrigin(""))

    def name(self, path: KeyPath) -> str:
        """Returns the dotted key, with the user's own name for it where that differs."""
        own = self.origins.get(path, ValueOrigin("")).name
        return f"{own} ({dotted(path)})" if own else dotted(path)


def apply_overrides(tree: Tree, overrides: list[str]) -> None:
    """Writes `a.b=value` items into the tree; what cannot be read goes into its problems."""
    for text in overrides:
        key, equals, value_text = text.partition("=")
        path: KeyPath = tuple(key.strip().removeprefix("--").split("."))
        where = f"command line: {key}=<hidden>" if is_secret_name(key) else f"command line: {text}"
        if not equals or not all(path):
            tree.problems.append(
                Problem((), show(text), "section.key=value", "for example optim.lr=1e-5", where)
            )
            continue
        try:
            tree.set(path, parse_value(value_text), ValueOrigin(where))
        except ValueError as error:
            expected = "a YAML value under a known key"
            tree.problems.append(Problem((dotted(path),), str(error), expected, where=where))


def validate(model: type[ModelT], tree: Tree, aliases: Mapping[str, str]) -> ModelT:
    """Returns the checked model.

    Args:
        model: The pydantic class. Its own cross-field checks raise ConfigError.
        tree: The values.
        aliases: Other tools' names for our keys, by last part, e.g. {"learning_rate": "optim.lr"}.

    Raises:
        ConfigError: With every problem of the tree, of the fields and of the cross-field checks.
    """
    config, problems = inspect(model, tree, aliases)
    if config is None or problems:
        raise ConfigError(problems, tree.source)
    return config


def inspect(
    model: type[ModelT], tree: Tree, aliases: Mapping[str, str]
) -> tuple[ModelT | None, list[Problem]]:
    """Returns what can be made of the tree, and every problem.

    Keys with a problem of their own have their defaults in the returned model; it is None where
    that makes none either. The arguments are those of `validate`.
    """
    data = _with_sections(model, tree.data)
    problems = [*tree.problems, *_secret_values(tree, data, ())]
    config = None
    try:
        config = model.model_validate(data)
    except ValidationError as error:
        # A secret under a secret's name is one problem.
        translated = _translate(model, tree, error, aliases)
        problems += [p for p in translated if not _is_known(p, problems)]
        rest, failed = _without_faults(data, error)
        if all(detail["loc"] for detail in error.errors()):
            problems += _located(tree, _cross_field_problems(model, rest, failed))
        with contextlib.suppress(ValidationError):
            config = model.model_validate(rest, context=FIELDS_ONLY)
    return config, problems


def _is_known(problem: Problem, problems: list[Problem]) -> bool:
    return any((p.keys, p.expected) == (problem.keys, problem.expected) for p in problems)


def located(tree: Tree, problems: Iterable[Problem]) -> list[Problem]:
    """Returns the problems with the places of their keys."""
    return list(_located(tree, problems))


def dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yields all dotted keys of a model, sections included."""
    for name, info in model.model_fields.items():
        yield prefix + name
        section = _section(info)
        if section is not None:
            yield from dotted_keys(section, f"{prefix}{name}.")


def _section(info: FieldInfo) -> type[BaseModel] | None:
    """Returns the model class of a field that is a section, also of an optional one."""
    annotation = info.annotation
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    for choice in typing.get_args(annotation) if is_union else (annotation,):
        if isinstance(choice, type) and issubclass(choice, BaseModel):
            return choice
    return None


def _field(model: type[BaseModel], path: KeyPath) -> FieldInfo | None:
    info = None
    section: type[BaseModel] | None = model
    for part in path:
        if section is None or part not in section.model_fields:
            return info
        info = section.model_fields[str(part)]
        section = _section(info)
    return info


def _with_sections(model: type[BaseModel], data: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy where a missing or empty section is {}, so that its own keys get checked."""
    data = copy.deepcopy(data)
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            data[name] = {} if data.get(name) is None else data[name]
    return data


def _translate(
    model: type[BaseModel], tree: Tree, error: ValidationError, aliases: Mapping[str, str]
) -> Iterator[Problem]:
    known = list(dotted_keys(model))
    for detail in error.errors(include_url=False):
        path: KeyPath = detail["loc"]
        where = tree.origin(path).where
        if not path:
            yield from _located(tree, detail["ctx"]["error"].problems)
        elif detail["type"] == "extra_forbidden":
            yield _unknown_key(tree, path, detail["input"], known, aliases)
        elif detail["type"] == "missing":
            expected = "a value" + _meaning(model, path)
            yield Problem((tree.name(path),), "nothing", expected, where=where)
        else:
            yield _wrong_value(model, tree, detail)


def _located(tree: Tree, problems: Iterable[Problem]) -> Iterator[Problem]:
    for problem in problems:
        paths = [key_path(key) for key in problem.keys]
        places = dict.fromkeys(tree.origins[path].where for path in paths if path in tree.origins)
        where = "; ".join(place for place in places if place)
        where = where or next((o for p in paths if (o := tree.origin(p).where)), "")
        names = tuple(tree.name(path) for path in paths)
        yield Problem(names, problem.found, problem.expected, problem.fix, where)


def _unknown_key(
    tree: Tree, path: KeyPath, value: Any, known: list[str], aliases: Mapping[str, str]
) -> Problem:
    key = dotted(path)
    where = tree.origin(path).where
    name = str(path[-1])
    if is_secret_name(name):
        return Problem(
            (key,),
            "a key that looks like a secret (value not shown)",
            "no secrets in a configuration, it is saved with the run",
            "log in with `hf auth login` or set the variable in the environment",
            where,
        )
    near = aliases.get(name) or nearest_key(key, known)
    fix = f"did you mean {near}?" if near else "`sft_fast schema` lists all keys"
    found = f"an unknown {'section' if isinstance(value, dict) else 'key'} with {show(value)}"
    return Problem((key,), found, "a known key", fix, where)


def _wrong_value(model: type[BaseModel], tree: Tree, detail: Any) -> Problem:
    path: KeyPath = detail["loc"]
    value = detail["input"]
    expected = detail["msg"].removeprefix("Input should be ").removeprefix("String should have ")
    expected = expected.replace("a valid ", "a ").replace("a integer", "a whole number")
    if detail["type"] == "model_type":
        expected = "a section with keys of its own"
    expected += _meaning(model, path)
    fix = _value_fix(value, detail)
    return Problem((tree.name(path),), show(value), expected, fix, tree.origin(path).where)


def _meaning(model: type[BaseModel], path: KeyPath) -> str:
    """Returns the beginning of the key's description in brackets, or nothing."""
    info = _field(model, path)
    text = (info.description or "") if info is not None else ""
    short = textwrap.shorten(text.rstrip("."), MEANING_WIDTH, placeholder=" ...")
    return f" ({short})" if text else ""


def _value_fix(value: Any, detail: Any) -> str:
    if not isinstance(value, str):
        is_quotable = detail["type"] == "string_type" and isinstance(value, bool | int | float)
        return f'put it in quotes: "{show(value)}"' if is_quotable else ""
    if detail["type"] == "literal_error":
        near = nearest(value.lower(), detail["ctx"]["expected"].split("'")[1::2])
        return f"did you mean {near}?" if near else ""
    if detail["type"] == "bool_type":
        words = {"yes": "true", "on": "true", "no": "false", "off": "false"}
        plain = words.get(value.lower(), value.lower())
        return f"write {plain}" if plain in ("true", "false") else ""
    if detail["type"] in ("int_type", "float_type"):
        try:
            number = parse_value(value.replace("_", ""))
        except ValueError:
            return ""
        plain = value.replace("_", "").strip()
        return f"write {plain}, without quotes" if isinstance(number, int | float) else ""
    return ""


def _secret_values(tree: Tree, value: Any, path: KeyPath) -> Iterator[Problem]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _secret_values(tree, item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _secret_values(tree, item, (*path, index))
    elif isinstance(value, str) and holds_secret(value):
        yield Problem(
            (tree.name(path),),
            "a value that looks like an access token or a password (not shown)",
            "no secrets in a configuration, it is saved with the run",
            "log in with `hf auth login` or set the variable in the environment",
            tree.origin(path).where,
        )


def _without_faults(
    data: dict[str, Any], error: ValidationError
) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
    """Returns the data without the keys that are wrong by themselves, and these keys."""
    data = copy.deepcopy(data)
    failed = []
    for detail in error.errors():
        path = tuple(str(part) for part in detail["loc"][:2])
        if not path:
            continue
        failed.append(path)
        section = data if len(path) == 1 else data[path[0]]
        section.pop(path[-1], None)
        if detail["type"] == "missing" and len(detail["loc"]) == 2:
            section[path[-1]] = "-"
    return data, failed


def _cross_field_problems(
    model: type[BaseModel], data: dict[str, Any], failed: list[tuple[str, ...]]
) -> list[Problem]:
    """Returns what the cross-field checks say of the keys that are right by themselves."""
    try:
        model.model_validate(data)
    except ValidationError as error:
        details = error.errors()
        found = details[0]["ctx"]["error"].problems if not details[0]["loc"] else ()
        return [p for p in found if not any(tuple(k.split("."))[:2] in failed for k in p.keys)]
    return []
