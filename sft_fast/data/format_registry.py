"""The open registries of formats and row functions, and what a format function is given.

A format is a function `record -> Conversation`, registered by name, or for a stage that compares
answers `record -> tuple[Conversation, ...]`. Its record carries our field names: the aliases of the
format and the user's `fields` are resolved before it is called.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from sft_fast.data.conversation import LOSS_WEIGHTS, Conversation, checked_text, is_loss_weight
from sft_fast.data.json_records import parse_json, type_name
from sft_fast.registry import PLUGIN_MODULE, Registry, load_file


@dataclass(frozen=True)
class Columns:
    """What the columns of records are, by their names: the same for all records that have these.

    Attributes:
        fields: field -> column.
        choices: field -> columns of which a record may fill one.
        left_out: columns that the user says are not read.
        names: our name -> the source's, of keys and roles of turns.
        media: columns that may hold what is no text.
        unread: columns that no field reads, where there are no choices.
    """

    fields: Mapping[str, str]
    choices: Mapping[str, Sequence[str]] = dataclass_field(default_factory=dict)
    left_out: Collection[str] = ()
    names: Mapping[str, str] = dataclass_field(default_factory=dict)
    media: Collection[str] = ()
    unread: tuple[str, ...] = ()

    def chosen(self, values: Mapping[str, Any]) -> Mapping[str, str]:
        """Field -> column of a record; ValueError where it fills two that could be one field."""
        if not self.choices:
            return self.fields
        columns = dict(self.fields)
        for name, present in self.choices.items():
            filled = [column for column in present if values[column] not in (None, "")]
            if len(filled) > 1:
                raise ValueError(
                    f"the columns {filled[0]!r} and {filled[1]!r} could both be {name!r}; "
                    f"choose with data.fields: {{{name}: {filled[0]}}}"
                )
            columns[name] = (filled or present)[0]
        return columns


class Record(dict[str, Any]):
    """The fields of one record under our names.

    Attributes:
        columns: field -> the name that the source uses.
        aliases: field -> the names that were looked for.
        left_out: columns that the user says are not read.
        names: our name -> the source's, of keys and roles of turns.
        unread: columns that no field reads.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        columns: Columns,
        aliases: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        chosen = self.columns = columns.chosen(values)
        super().__init__({field: values[column] for field, column in chosen.items()})
        self.aliases: Mapping[str, Sequence[str]] = aliases or {}
        self.left_out, self.names = columns.left_out, columns.names
        self.unread = columns.unread
        if columns.choices:
            self.unread = _unread(values, chosen, columns.left_out)
        self._values = values

    def label(self, field: str) -> str:
        """How messages call a field."""
        column = self.columns.get(field, field)
        return f"{field!r}" if column == field else f"{field!r} (column {column!r})"

    def require(self, field: str) -> Any:
        """The value of a field; raises ValueError where the record has none."""
        if field not in self:
            names = ", ".join(self.aliases.get(field, (field,)))
            raise ValueError(
                f"no column for {field!r}: looked for {names}; the record has "
                f"{', '.join(self._values)}. "
                f"Name it with data.fields: {{{field}: <column>}}, or write a format of your own, "
                "which is a short function in a file (data.format: my_format.py)"
            )
        return self[field]

    def optional_text(self, field: str) -> str | None:
        """The text of a field, or None where it is absent, null or blank."""
        value = self.get(field)
        if value is None or not checked_text(value, self.label(field)).strip():
            return None
        return str(value)

    def text(self, field: str) -> str:
        """The text of a field; raises ValueError where it is missing, not text, or blank."""
        checked_text(self.require(field), self.label(field))
        text = self.optional_text(field)
        if text is None:
            raise ValueError(f"{self.label(field)} is empty; give it text or remove the record")
        return text


OPTION_COLUMNS = ("weight", "chat_template_kwargs", "reasoning_effort")
"""Columns that every format with fields reads: a factor of the record's loss, variables of the chat
template, and the one of them that data sets have as a column."""
TELLING_COLUMNS = frozenset(
    (
        *("system", "system_prompt", "instruction", "prompt", "question", "query", "input"),
        *("context", "options", "choices", "tables", "functions", "tools", "history"),
        *("response", "output", "answer", "answers", "completion", "chosen", "rejected"),
        *("rejected_response", "label", "labels", "loss_scale", "loss_weight", "sample_weight"),
        *("reasoning_content", "thinking", "rationale", "mask", "loss_mask"),
        *("messages", "conversations", "conversation", "target", "targets", "summary"),
    )
)
"""Columns whose name says that they change what is trained: one that is not read stops the run."""
MOST_SETS_OF_COLUMNS = 256
MEDIA_COLUMNS = frozenset(("image", "images", "video", "videos", "audio", "audios"))


@dataclass(frozen=True)
class Format:
    """A registered format.

    Attributes:
        name: its name in `data.format`.
        build: Record -> Conversation, or a tuple of those that are compared.
        fields: field -> column names that are looked for; empty: the record is the whole record.
        detect: record -> whether the record is in this format; None: never chosen by "auto".
        names: further names of ours that `data.fields` may map: keys of a turn, and roles.
    """

    name: str
    build: Callable[[Record], Conversation | tuple[Conversation, ...]]
    fields: Mapping[str, tuple[str, ...]]
    detect: Callable[[Mapping[str, Any]], bool] | None
    names: tuple[str, ...] = ()
    _columns: dict[object, Columns] = dataclass_field(
        default_factory=dict, compare=False, repr=False
    )

    def check_mapping(self, mapping: Mapping[str, str | None]) -> None:
        """Raises ValueError where `data.fields` names a field that this format does not have."""
        read = [field for field, column in mapping.items() if column is not None]
        known = {*self.fields, *self.names}
        unknown = [field for field in read if self.fields and field not in known]
        if unknown:
            raise ValueError(
                f"data.fields: the format {self.name!r} has no field {unknown[0]!r}; "
                f"its fields are {', '.join((*self.fields, *self.names))}"
            )

    def read(
        self, values: Mapping[str, Any], mapping: Mapping[str, str | None] | None = None
    ) -> Conversation:
        """Turns a record into a checked conversation.

        Args:
            values: one object of the source.
            mapping: our field -> the source's column; a column -> None: it is not read.

        Raises:
            ValueError: the record does not hold what the format needs, or holds more than it
                reads; or the format gives several conversations.
        """
        group = self.read_group(values, mapping)
        if len(group) != 1:
            raise ValueError(
                f"the format {self.name!r} gives {len(group)} conversations a record; expected one"
            )
        return group[0]

    def read_group(
        self, values: Mapping[str, Any], mapping: Mapping[str, str | None] | None = None
    ) -> tuple[Conversation, ...]:
        """The conversations of a record: one, or those that are compared; otherwise as `read`."""
        record = self._record(values, mapping or {})
        built = self.build(record)
        group = built if isinstance(built, tuple) else (built,)
        if self.fields:
            group = tuple(_with_options(one, values, record) for one in group)
            if record.unread:
                _check_unread(group, record.unread, values, record)
                group = tuple(replace(one, unread=record.unread) for one in group)
        for conversation in group:
            conversation.check()
        return group

    def unread(
        self, values: Mapping[str, Any], mapping: Mapping[str, str | None] | None = None
    ) -> tuple[str, ...]:
        """Columns of a record that have no effect."""
        return self._record(values, mapping or {}).unread if self.fields else ()

    def _record(self, values: Mapping[str, Any], mapping: Mapping[str, str | None]) -> Record:
        key = (tuple(values), tuple(mapping.items()))
        columns = self._columns.get(key)
        if columns is None:
            if len(self._columns) >= MOST_SETS_OF_COLUMNS:
                self._columns.clear()
            columns = self._columns[key] = self._columns_of(*key)
        for column in columns.media:
            if _is_media(values, column):
                raise ValueError(
                    f"the record has {column!r}; only text is trained, so leave out such records, "
                    "or the column if the texts do not need it"
                )
        return Record(values, columns, self.fields)

    def _columns_of(
        self, columns: tuple[str, ...], mapping: tuple[tuple[str, str | None], ...]
    ) -> Columns:
        """What the columns of a record are; ValueError where one that the user names is missing."""
        left_out = {column for column, value in mapping if value is None}
        chosen = {field: column for field, column in mapping if column is not None}
        names = {name: chosen.pop(name) for name in self.names if name in chosen}
        for field, column in chosen.items():
            if column not in columns:
                raise ValueError(
                    f"no column {column!r}, which data.fields gives for {field!r}; "
                    f"the record has {', '.join(columns)}"
                )
        if not self.fields:
            return Columns({name: name for name in columns} | chosen)
        # Of names that differ in capitals alone, the one that is written as ours.
        of_lower = {column.lower(): column for column in columns}
        of_lower |= {column: column for column in columns}
        taken = left_out.union(chosen.values())
        fields, choices = dict(chosen), {}
        for field, aliases in self.fields.items():
            if field in chosen:
                continue
            present = [of_lower[name] for name in aliases if name in of_lower]
            present = [name for name in present if name not in taken]
            if len(present) > 1:
                choices[field] = present
            elif present:
                fields[field] = present[0]
        # Who names a field's column has seen the others that could be it.
        passed_over = {alias for field in chosen for alias in self.fields.get(field, ())}
        is_media = MEDIA_COLUMNS.intersection(columns).difference(taken)
        left_out |= {of_lower[name] for name in passed_over if name in of_lower}
        unread = _unread(columns, fields, left_out)
        return Columns(fields, choices, left_out, names, tuple(sorted(is_media)), unread)


def _unread(
    columns: Iterable[str], fields: Mapping[str, str], left_out: Collection[str]
) -> tuple[str, ...]:
    """The columns that no field reads."""
    read = {*fields.values(), *left_out, *OPTION_COLUMNS}
    return tuple(column for column in columns if column not in read)


def _with_options(
    conversation: Conversation, values: Mapping[str, Any], record: Record
) -> Conversation:
    """Applies the columns of OPTION_COLUMNS that no field has taken."""
    if all(name not in values for name in OPTION_COLUMNS):
        return conversation
    taken = {*record.columns.values(), *record.left_out}
    weight = None if "weight" in taken else values.get("weight")
    if weight is not None:
        if not is_loss_weight(weight):
            raise ValueError(
                f"'weight' is {weight!r}; expected {LOSS_WEIGHTS}. If it is no factor of the loss: "
                "data.fields: {weight: null}"
            )
        if not conversation.messages:
            raise ValueError("'weight' is for turns; leave it out with data.fields: {weight: null}")
        messages = tuple(replace(m, weight=m.weight * weight) for m in conversation.messages)
        conversation = replace(conversation, messages=messages)
    options = None if "chat_template_kwargs" in taken else values.get("chat_template_kwargs")
    if options is not None:
        if isinstance(options, str):
            options = parse_json(options, "'chat_template_kwargs'")
        if not isinstance(options, dict):
            raise ValueError(f"'chat_template_kwargs' is {type_name(options)}; expected an object")
        options = {name: value for name, value in options.items() if value is not None}
        for name, value in conversation.template_options.items():
            if options.get(name, value) != value:
                raise ValueError(f"{name!r} of a turn and 'chat_template_kwargs' differ; keep one")
        options = {**conversation.template_options, **options}
        conversation = replace(conversation, template_options=options)
    effort = None if "reasoning_effort" in taken else values.get("reasoning_effort")
    if effort is not None:
        given = {"reasoning_effort": checked_text(effort, "'reasoning_effort'")}
        if conversation.template_options.get("reasoning_effort", effort) != effort:
            raise ValueError(
                "'reasoning_effort' and 'chat_template_kwargs' differ, or a turn does; keep one"
            )
        options = {**conversation.template_options, **given}
        conversation = replace(conversation, template_options=options)
    return conversation


def _check_unread(
    group: Sequence[Conversation], unread: Sequence[str], values: Mapping[str, Any], record: Record
) -> None:
    """Raises ValueError for a column that says by its name that it matters, and is not read.

    A text that stands in a turn is no loss: data sets often hold a part of the chat once more.
    """
    for column in unread:
        value = values[column]
        if column.lower() not in TELLING_COLUMNS or value in (None, "", [], {}):
            continue
        if isinstance(value, str) and any(value in m.content for c in group for m in c.messages):
            continue
        fields = ", ".join(record.aliases)
        raise ValueError(
            f"the column {column!r} is not read, and its name says that it matters; name the field "
            f"that it is with data.fields ({fields}), or leave it out with data.fields: "
            f"{{{column}: null}}"
        )


def _is_media(values: Mapping[str, Any], column: str) -> bool:
    """Whether a column holds media, or the name of one that a text refers to."""
    value = values[column]
    if isinstance(value, str):
        return bool(value) and f"<{column.removesuffix('s')}>" in repr(values)
    return bool(value)


Build = Callable[[Record], Conversation | tuple[Conversation, ...]]
BuildT = TypeVar("BuildT", bound=Build)
RowFunction = Callable[[Conversation, random.Random], Conversation]
formats: Registry[Format] = Registry("format", "data.format", reserved=("auto",))
row_functions: Registry[RowFunction] = Registry("row function", "data.row_functions")


def register_format(
    name: str,
    *,
    fields: Mapping[str, tuple[str, ...]] | None = None,
    detect: Callable[[Mapping[str, Any]], bool] | None = None,
    names: tuple[str, ...] = (),
) -> Callable[[BuildT], BuildT]:
    """Registers a function `record -> Conversation` as the format `name`; for a stage that compares
    answers it returns a tuple of conversations.

    Args:
        name: value of `data.format`.
        fields: field -> column names to look for, in words that users know; None: the function
            gets every column as it is.
        detect: whether a record is in this format, for "auto"; asked in the order of registration.
        names: further names that `data.fields` may map, see `Record.names`.

    Raises:
        ValueError: the name is taken.
    """

    def register(build: BuildT) -> BuildT:
        formats.add(name, Format(name, build, fields or {}, detect, names))
        return build

    return register


def format_names() -> tuple[str, ...]:
    """Registered names, sorted."""
    return tuple(sorted(formats.entries))


def get_format(name: str) -> Format:
    """The format registered as `name`.

    Raises:
        ValueError: there is none; the message lists what exists and the nearest name.
    """
    return formats.get(name)


def detect_format(
    columns: Sequence[str],
    first_record: Mapping[str, Any],
    fields: Mapping[str, str | None] | None = None,
) -> str:
    """Name of the first registered format that recognises a source.

    Args:
        columns: the column names of the source.
        first_record: its first record.
        fields: our field -> the source's column; the record is looked at under our names too.

    Raises:
        ValueError: none does; the message says what the record has.
    """
    record = dict.fromkeys(columns) | dict(first_record)
    named = {field: column for field, column in (fields or {}).items() if column is not None}
    left_out = {column for column, value in (fields or {}).items() if value is None}
    record = {column: value for column, value in record.items() if column not in left_out}
    record = {column.lower(): value for column, value in record.items()} | record
    record |= {field: record.get(column) for field, column in named.items()}
    for candidate in formats.entries.values():
        if candidate.detect is not None and candidate.detect(record):
            return candidate.name
    raise ValueError(
        f"cannot tell the format from the columns {', '.join(columns)}{_seen(record)}; set "
        f"data.format to one of {', '.join(format_names())}, and data.fields where the columns "
        "have other names; or name a file with a format of your own, which is a short function "
        "(data.format: my_format.py)"
    )


def _seen(record: Mapping[str, Any]) -> str:
    """What a record that no format recognises looks like."""
    texts = []
    if {"chosen", "rejected"} <= set(record):
        texts.append(
            "pairs of answers are for preference training; to train the chosen ones alone: "
            "data.format: prompt_completion, data.fields: {completion: chosen, rejected: null}"
        )
    if "parent_id" in record or "parent_message_id" in record:
        texts.append(
            "one message a record: write each path from the first message to an answer as one "
            "record of messages"
        )
    for column, value in record.items():
        if not isinstance(value, list) or not value:
            continue
        if not isinstance(value[0], dict):
            texts.append(f"the first entry of {column!r} is {type_name(value[0])}, not an object")
        elif len(record) == 1 and column not in ("messages", "conversations", "conversation"):
            texts.append(f"if {column!r} holds the records, write that list alone to the file")
        else:
            keys = ", ".join(value[0]) or "nothing"
            texts.append(
                f"the first entry of {column!r} has {keys}; turns have role and content, or from "
                "and value"
            )
    return "".join(f" ({text})" for text in texts[:1])


def register_row_function(name: str) -> Callable[[RowFunction], RowFunction]:
    """Registers a function (conversation, random) -> conversation under `data.row_functions`.

    It may change what the model reads (a system message, another wording of the question), never
    what it learns to write. Its random numbers depend on the conversation only, so that every
    build gives the same result.

    Raises:
        ValueError: the name is taken.
    """

    def register(function: RowFunction) -> RowFunction:
        row_functions.add(name, function)
        return function

    return register


def load_format(reference: str) -> Format:
    """A registered format, or one out of a file: `my_format.py`, or `my_formats.py:name`.

    Raises:
        ValueError: there is none of this name, or the file does not register exactly one.
    """
    return formats.get(_resolve(reference, formats))


def load_row_function(reference: str) -> RowFunction:
    """A registered row function, or one out of a file, written as for `load_format`.

    Raises:
        ValueError: as `load_format`.
    """
    return row_functions.get(_resolve(reference, row_functions))


def apply_row_function(reference: str, conversation: Conversation) -> Conversation:
    """Calls a row function and checks that what is learnt stayed the same.

    Raises:
        ValueError: an assistant turn was changed, added, removed or reordered, or a text was.
    """
    function = load_row_function(reference)
    name = _resolve(reference, row_functions)
    seed = xxhash.xxh3_64_intdigest(f"{name}\0{conversation!r}".encode())
    changed = function(conversation, random.Random(seed))
    if not isinstance(changed, Conversation):
        raise ValueError(f"the row function {name!r} returned no Conversation but {changed!r}")
    changed.check()
    if _learnt(changed) != _learnt(conversation):
        raise ValueError(f"the row function {name!r} changed an assistant turn; it may not")
    return changed


def code_digest(format_names: Sequence[str], row_functions: Sequence[str]) -> str:
    """xxh3_128 of the code of formats and row functions that do not come with sft_fast.

    For code in a file it is the whole file, so that its helpers count too.
    """
    functions = [get_format(name).build for name in format_names]
    functions += [load_row_function(name) for name in row_functions]  # type: ignore[misc]
    codes = [code_of_function(function) for function in functions if not is_ours(function)]
    return xxhash.xxh3_128_hexdigest("\0".join(codes).encode()) if codes else ""


def can_be_loaded_elsewhere(format_names: Sequence[str], row_functions: Sequence[str]) -> bool:
    """Whether another process finds these: they are ours, named with their file, or a plugin's."""
    ours = all(":" in name or name.endswith(".py") for name in row_functions)
    return ours and all(
        ".py" in name or name in formats.files or is_ours(get_format(name).build)
        for name in format_names
    )


def _learnt(conversation: Conversation) -> list[Any]:
    return [m for m in conversation.messages if m.role == "assistant"] + [conversation.text]


def _resolve(reference: str, registry: Registry[Any]) -> str:
    """The registered name behind a reference; a file is run the first time that it is named."""
    path, colon, name = reference.partition(":")
    if not path.endswith(".py"):
        return reference
    names = registry.names_of(load_file(path, registry.key))
    if colon and name in names:
        return name
    if colon or len(names) != 1:
        found = ", ".join(names) or "nothing"
        raise ValueError(
            f"{registry.key}: {reference} does not name one {registry.kind}; {path} registers "
            f"{found}. Write {path}:<name>"
        )
    return names[0]


def is_ours(function: Any) -> bool:
    """Whether a function comes with sft_fast."""
    return str(function.__module__).startswith("sft_fast.")


def code_of_function(function: Any) -> str:
    """Its code; of a function in a plugin the whole file, so that its helpers count too."""
    # None: made by exec.
    if (function.__module__ or "").startswith(PLUGIN_MODULE):
        return Path(function.__code__.co_filename).read_text(encoding="utf-8")
    try:
        return inspect.getsource(function)
    except OSError:
        # Defined in an interactive session: only the compiled code is left.
        return repr((function.__code__.co_code, function.__code__.co_consts))
