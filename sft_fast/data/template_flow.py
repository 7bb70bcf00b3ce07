"""What a chat template does with the contents of turns, read from its code.

A template that only writes contents, between texts that do not depend on them, renders every chat
of one structure alike: what one chat shows holds for all. The code is read in the safe direction:
whatever is not known to be harmless counts as a use of the content.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import nodes

CONTENT = "content"
# True or false for every text that is not blank.
_TYPE_TESTS = frozenset(
    ("string", "defined", "undefined", "none", "mapping", "iterable", "sequence", "number")
)
_NEIGHBOURS = frozenset(("previtem", "nextitem", "changed"))
_LENGTH = frozenset(("length", "count"))


def only_writes_contents(template: str, marks: Collection[str]) -> bool:
    """Whether a template writes the contents of turns as they are, or trimmed, and no more.

    Holds for contents that are texts, not blank, and hold none of `marks`.

    Args:
        template: Jinja.
        marks: strings that contents are searched for by the caller.
    """
    from jinja2 import Environment, nodes
    from jinja2.exceptions import TemplateSyntaxError

    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except TemplateSyntaxError:
        return False
    if any(tree.find_all((nodes.AssignBlock, nodes.FilterBlock, nodes.CallBlock, nodes.Macro))):
        return False
    flow = _Flow(frozenset(marks))
    while flow.learn(tree):
        pass
    return flow.is_harmless(tree)


class _Flow:
    """Names that hold a turn, a list of turns, or a content, and the check of their uses."""

    def __init__(self, marks: frozenset[str]) -> None:
        self._marks = marks
        self._turns: set[Any] = {"messages"}
        self._contents: set[Any] = set()

    def learn(self, tree: nodes.Template) -> bool:
        """Adds the names that are bound to what is known; whether there was one."""
        from jinja2 import nodes

        before = len(self._turns) + len(self._contents)
        for loop in tree.find_all(nodes.For):
            if self._is_turn(loop.iter) and isinstance(loop.target, nodes.Name):
                self._turns.add(loop.target.name)
        for assign in tree.find_all(nodes.Assign):
            target = self._key(assign.target)
            if self._is_turn(assign.node):
                self._turns.add(target)
            elif any(self._is_content(node) for node in _with_parts(assign.node)):
                self._contents.add(target)
        return len(self._turns) + len(self._contents) > before

    def is_harmless(self, node: nodes.Node, is_written: bool = False) -> bool:
        """Whether nothing below a node depends on a content.

        Args:
            node: of the code.
            is_written: its value goes to the output, or to a name whose uses are looked at.
        """
        from jinja2 import nodes

        if self._is_content(node):
            return is_written
        if self._is_turn(node):
            return False
        if isinstance(node, nodes.Call) and self._is_part_of_turn(node.node):
            # A method: it may give the content.
            return False
        if self._is_part_of_turn(node):
            # Another key of a turn: the structure has it.
            return self._attribute(node) is not None
        if self._attribute(node) in _NEIGHBOURS:
            return False
        if isinstance(node, nodes.For) and self._is_turn(node.iter):
            parts = [*node.body, *node.else_, *([node.test] if node.test else [])]
            return all(self.is_harmless(part) for part in parts)
        if isinstance(node, nodes.Filter) and node.name in _LENGTH and self._is_turn(node.node):
            return True
        if isinstance(node, nodes.Assign):
            return self._is_turn(node.node) or self.is_harmless(node.node, is_written=True)
        if isinstance(node, nodes.Test) and self._is_content(node.node):
            return node.name in _TYPE_TESTS
        if isinstance(node, nodes.Compare) and self._is_turn(node.ops[0].expr):
            # Whether a turn has a key.
            return len(node.ops) == 1 and isinstance(node.expr, nodes.Const)
        if isinstance(node, nodes.Compare) and self._is_content(node.ops[0].expr):
            mark = node.expr.value if isinstance(node.expr, nodes.Const) else None
            is_search = len(node.ops) == 1 and node.ops[0].op in ("in", "notin")
            return is_search and isinstance(mark, str) and mark.strip() in self._marks
        if isinstance(node, nodes.If | nodes.CondExpr) and self._is_content(node.test):
            # A text that is not blank is true.
            return all(self.is_harmless(part, is_written) for part in _others(node, node.test))
        if isinstance(node, nodes.Not) and self._is_content(node.node):
            return True
        keeps = isinstance(node, nodes.Add | nodes.Concat | nodes.CondExpr | nodes.Output)
        keeps = keeps or (isinstance(node, nodes.Filter) and node.name == "trim" and not node.args)
        passes = isinstance(node, nodes.Output) or (is_written and keeps)
        return all(self.is_harmless(part, passes) for part in node.iter_child_nodes())

    def _is_turn(self, node: nodes.Node | None) -> bool:
        """A turn, or a list of turns."""
        from jinja2 import nodes

        if isinstance(node, nodes.Getitem) and self._attribute(node) is None:
            return self._is_turn(node.node)
        return node is not None and self._key(node) in self._turns

    def _is_content(self, node: nodes.Node) -> bool:
        if self._key(node) in self._contents:
            return True
        # Of whatever: it may be a turn that came another way.
        return self._attribute(node) == CONTENT

    def _is_part_of_turn(self, node: nodes.Node) -> bool:
        from jinja2 import nodes

        return isinstance(node, nodes.Getattr | nodes.Getitem) and self._is_turn(node.node)

    def _attribute(self, node: nodes.Node) -> str | None:
        """The constant name that a node takes of its value."""
        from jinja2 import nodes

        if isinstance(node, nodes.Getattr):
            return str(node.attr)
        if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
            return node.arg.value if isinstance(node.arg.value, str) else None
        return None

    def _key(self, node: nodes.Node) -> Any:
        """What a name, or an attribute of a namespace, is called."""
        from jinja2 import nodes

        if isinstance(node, nodes.Name):
            return node.name
        if isinstance(node, nodes.NSRef):
            return (node.name, node.attr)
        if isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name):
            return (node.node.name, node.attr)
        return None


def _with_parts(node: nodes.Node) -> list[nodes.Node]:
    from jinja2 import nodes

    return [node, *node.find_all(nodes.Node)]


def _others(node: nodes.Node, test: nodes.Node) -> list[nodes.Node]:
    return [part for part in node.iter_child_nodes() if part is not test]
