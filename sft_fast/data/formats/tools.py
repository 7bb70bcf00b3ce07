"""The tools on offer, in the words of every provider, as JSON schemas of functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sft_fast.data.json_records import parse_json, type_name


def read_tools(tools: Any, label: str) -> tuple[Mapping[str, Any], ...]:
    """Tools as OpenAI writes them, which is what chat templates expect.

    Args:
        tools: a list, or JSON text of one; each tool an object, or JSON text of one: OpenAI's with
            or without `type: function` around it, Anthropic's, Bedrock's or Gemini's.
        label: how messages call the field.

    Raises:
        ValueError: it is no such list.
    """
    if isinstance(tools, str):
        tools = parse_json(tools, label) if tools.strip() else None
    if isinstance(tools, dict):
        # Bedrock has its list one level down.
        tools = tools.get("tools", [tools])
    if tools is None:
        return ()
    if not isinstance(tools, list):
        raise ValueError(f"{label} is {type_name(tools)}; expected a list of JSON schemas")
    return tuple(function for tool in tools for function in _functions(tool, label))


def _functions(tool: Any, label: str) -> Iterator[dict[str, Any]]:
    if isinstance(tool, str):
        tool = parse_json(tool, f"a tool of {label}")
    if not isinstance(tool, dict):
        raise ValueError(f"a tool of {label} is {type_name(tool)}; expected a JSON schema")
    declared = tool.get("functionDeclarations", tool.get("function_declarations"))
    if declared is not None:
        for function in declared:
            yield _wrapped(function, label)
    elif "toolSpec" in tool:
        spec = dict(tool["toolSpec"])
        schema = spec.pop("inputSchema", {})
        yield _wrapped({**spec, "parameters": schema.get("json", schema)}, label)
    elif "function" in tool:
        yield {**tool, **_wrapped(tool["function"], label)}
    else:
        yield _wrapped(tool, label)


def _wrapped(function: Any, label: str) -> dict[str, Any]:
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"a tool of {label} has no name; expected a JSON schema with 'name'")
    function = dict(function)
    if "input_schema" in function:
        function["parameters"] = function.pop("input_schema")
    if isinstance(function.get("parameters"), str):
        function["parameters"] = parse_json(
            function["parameters"], f"'parameters' of the tool {function['name']!r}"
        )
    function.pop("type", None)
    return {"type": "function", "function": function}
