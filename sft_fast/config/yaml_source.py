"""YAML with line numbers, YAML 1.2 scalars and hard limits; nothing in a file is ever executed.

PyYAML on its own reads `1e-5` as a string, `no` as false and `1:30` as 90, keeps the last of two
equal keys, and expands aliases without bound. Here numbers look like numbers in any language,
only true and false are booleans, equal keys are an error, and aliases and tags are refused.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
import yaml.composer

from sft_fast.errors import ConfigError, Problem, nearest_file, show

MAX_BYTES = 1_000_000
MAX_DEPTH = 20

KeyPath = tuple[str | int, ...]

_TAG = "tag:yaml.org,2002:"
_SCALARS = {
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "null": re.compile(r"~|null|Null|NULL|"),
    # At most 18 digits: int() of a very long text is slow, and no key needs more.
    "int": re.compile(r"[-+]?(?:0|[1-9][0-9]{0,17})"),
    "float": re.compile(
        r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
    ),
}


class _Loader(yaml.SafeLoader):
    """Builds the node tree only; values are made by `_build`, not by PyYAML's constructors."""

    yaml_implicit_resolvers: dict[Any, Any] = {}
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                None, None, f"alias *{event.anchor}; write the value out", event.start_mark
            )
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(
                None, None, f"nested deeper than {MAX_DEPTH} levels", event.start_mark
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes exactly what `_Loader` would otherwise not read back as a string."""

    yaml_implicit_resolvers: dict[Any, Any] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> Any:
        # Outside double quotes PyYAML writes these line breaks raw and folds them on reading.
        style = '"' if re.search("[\x85\u2028\u2029]", data) else None
        return self.represent_scalar(_TAG + "str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)

for _name, _pattern in _SCALARS.items():
    _exact = re.compile(rf"(?:{_pattern.pattern})\Z")
    _Loader.add_implicit_resolver(_TAG + _name, _exact, None)
    _Dumper.add_implicit_resolver(_TAG + _name, _exact, None)


@dataclass
class Document:
    """A YAML file as plain Python values.

    Attributes:
        name: The file's name as the user gave it.
        data: The top-level mapping.
        lines: Line (from 1) of every key, by path from the top.
        problems: Errors that did not keep the rest of the file from being read.
        files: Name of the file that a path comes from, where it is another.
    """

    name: str
    data: dict[str, Any] = field(default_factory=dict)
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    files: dict[KeyPath, str] = field(default_factory=dict)

    def where(self, path: KeyPath) -> str:
        """Returns "file:line" of `path`, or of the nearest key above it."""
        while path and path not in self.lines:
            path = path[:-1]
        name = self.files.get(path, self.name)
        return f"{name}:{self.lines[path]}" if path else self.name


def dotted(path: KeyPath) -> str:
    """Returns ("plugins", 0) as "plugins[0]" and ("optim", "lr") as "optim.lr"."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")


def key_path(text: str) -> KeyPath:
    """Returns "plugins[0]" as ("plugins", 0); the inverse of `dotted`."""
    return tuple(int(p) if p.isdecimal() else p for p in re.findall(r"[^.\[\]]+", text))


def read_yaml(path: Path) -> Document:
    """Reads a YAML file whose top level is a mapping.

    Raises:
        ConfigError: The file cannot be read, is not YAML, or breaks a limit (1 MB, 20 levels,
            no aliases). Duplicate keys and tags are put into `Document.problems` instead.
    """
    document = Document(str(path))

    def fail(found: str, expected: str, line: int | None = None, fix: str = "") -> ConfigError:
        where = document.name if line is None else f"{document.name}:{line}"
        return ConfigError([Problem((), found, expected, fix, where)], document.name)

    if path.exists() and not path.is_file():
        kind = "a directory" if path.is_dir() else "a pipe or a device"
        raise fail(kind, "a regular file: every process of a run reads it")
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise fail("more than 1 MB", "a configuration file of at most 1 MB")
        root = _compose(raw.decode("utf-8"))
    except OSError as error:
        near = nearest_file(path)
        fix = f"did you mean {near}?" if near else ""
        raise fail(error.strerror or str(error), "a readable YAML file", fix=fix) from None
    except UnicodeDecodeError as error:
        raise fail(f"a byte that is not UTF-8 at offset {error.start}", "UTF-8 text") from None
    except yaml.YAMLError as error:
        raise fail(_reason(error), "valid YAML without aliases", _line(error)) from None
    if root is not None:
        data = _build(root, (), document)
        if not isinstance(data, dict):
            raise fail(show(data), "a mapping of keys at the top level", 1)
        document.data = data
    return document


def parse_value(text: str) -> Any:
    """Returns the value of `text`, read as a YAML value by the same rules as a file.

    Raises:
        ValueError: `text` is not a YAML value; the message says why.
    """
    document = Document("")
    try:
        root = _compose(text)
    except yaml.YAMLError as error:
        raise ValueError(_reason(error)) from None
    value = None if root is None else _build(root, (), document)
    if document.problems:
        raise ValueError(document.problems[0].found)
    return value


def dump_yaml(data: Any) -> str:
    """Returns `data` as YAML text that `read_yaml` reads back as an equal value."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _compose(text: str) -> Any:
    loader = _Loader(text)
    try:
        return loader.get_single_node()
    finally:
        loader.dispose()


def _reason(error: yaml.YAMLError) -> str:
    reason = getattr(error, "problem", None) or getattr(error, "reason", None) or "not YAML"
    context = getattr(error, "context", None)
    return f"{context}: {reason}" if context else str(reason)


def _line(error: yaml.YAMLError) -> int | None:
    mark = getattr(error, "problem_mark", None)
    return None if mark is None else mark.line + 1


def _build(node: Any, path: KeyPath, document: Document) -> Any:
    """Returns the plain value of `node` and records lines and problems on the way."""
    kind = node.tag.removeprefix(_TAG)
    if isinstance(node, yaml.MappingNode) and kind == "map":
        return _build_mapping(node, path, document)
    if isinstance(node, yaml.SequenceNode) and kind == "seq":
        return [_build_item(item, (*path, i), document) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode):
        if kind == "str":
            return node.value
        if kind in _SCALARS and _SCALARS[kind].fullmatch(node.value):
            return _scalar(kind, node.value)
    _report(document, node, path, f"the YAML tag {node.tag}", "a plain value without a tag")
    return None


def _build_item(node: Any, path: KeyPath, document: Document) -> Any:
    document.lines[path] = node.start_mark.line + 1
    return _build(node, path, document)


def _build_mapping(node: Any, path: KeyPath, document: Document) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            _report(document, key_node, path, "a key that is a mapping or a list", "a name")
            continue
        key = str(key_node.value)
        here = (*path, key)
        if key in mapping:
            again = f"the key a second time (first on line {document.lines[here]})"
            _report(document, key_node, here, again, "each key once")
            continue
        document.lines[here] = key_node.start_mark.line + 1
        mapping[key] = _build(value_node, here, document)
    return mapping


def _report(document: Document, node: Any, path: KeyPath, found: str, expected: str) -> None:
    where = f"{document.name}:{node.start_mark.line + 1}"
    keys = (dotted(path),) if path else ()
    document.problems.append(Problem(keys, found, expected, where=where))


def _scalar(kind: str, text: str) -> Any:
    if kind == "bool":
        return text.lower() == "true"
    if kind == "null":
        return None
    if kind == "int":
        return int(text)
    # Python writes .inf and .nan without the dot.
    return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
