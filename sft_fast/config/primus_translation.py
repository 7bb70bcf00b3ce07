"""One Primus file on its way into a tree of our keys: what all parts of the translation use."""

from typing import Any

from sft_fast.config.primus_arguments import DEFAULTS, MODULE_FILE, Fixed, Target
from sft_fast.config.validation import Tree, ValueOrigin
from sft_fast.config.yaml_source import Document, KeyPath, dotted
from sft_fast.errors import Problem, show


class Translation:
    """A file, and the tree that it becomes.

    Attributes:
        document: The file, with those that it extends.
        tree: What it means in our keys.
        module: Path of its only module, ("modules", name).
        base: Path of the module's arguments, ("modules", name, "overrides").
        arguments: Those that have a value.
        defaults: What an argument is where the file says nothing.
    """

    def __init__(self, document: Document) -> None:
        self.document = document
        self.tree = Tree(document.name, problems=list(document.problems))
        self.module: KeyPath = ()
        self.base: KeyPath = ()
        self.arguments: dict[str, Any] = {}
        self.defaults = dict(DEFAULTS)

    def problem(self, path: KeyPath, found: str, expected: str, fix: str = "") -> None:
        """Says what is wrong at a path of the file."""
        where = self.document.where(path)
        self.tree.problems.append(Problem((dotted(path),), found, expected, fix, where))

    def note(self, text: str) -> None:
        """Says what is accepted and means something else, or nothing, here."""
        self.tree.notes.append(text)

    def value(self, name: str) -> Any:
        """An argument, or its default."""
        return self.arguments.get(name, self.defaults.get(name))

    def set(self, key: str, value: Any, path: KeyPath, name: str) -> None:
        """Gives a key of ours the value of what the file calls `name`."""
        self.tree.set(tuple(key.split(".")), value, ValueOrigin(self.document.where(path), name))

    def set_argument(self, name: str, target: Target) -> None:
        """Gives the target of an argument its value."""
        where = self.document.where((*self.base, name))
        if name not in self.arguments:
            where = f"{self.document.where(self.base)} (default of {MODULE_FILE})"
        value = target.convert(self.value(name))
        self.tree.set(tuple(target.key.split(".")), value, ValueOrigin(where, name))

    def check_fixed(
        self, table: dict[str, Fixed], values: dict[str, Any] | None = None, *inside: str
    ) -> None:
        """Says which of `values`, by default the arguments, do not agree with a table."""
        values = self.arguments if values is None else values
        for name, fixed in table.items():
            value = values.get(name)
            if value is not None and value not in fixed.values:
                allowed = " or ".join(show(item) for item in fixed.values) or "null"
                found, path = show(value), (*self.base, *inside, name)
                self.problem(path, found, f"{allowed}, because {fixed.reason}", f"remove {name}")
