"""Values of tables in the types that JSON has, with no more than the data holds.

A column of a table has one type, so every object in it has the keys of all records, null where its
own record had none: the arguments of every tool call, for example. What the column's type says of
a null decides: an object of a struct holds padding, but not in a field that is null everywhere,
which only the data can have made; an object of a JSON column holds what was written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import numpy as np

Convert = Callable[[Any], Any]
_SHORT_FLOATS = {"float16": np.float16, "halffloat": np.float16, "float32": np.float32}
_TEXT_TYPES = ("timestamp", "date", "time", "duration", "decimal")


def record_converter(features: Mapping[str, Any] | None) -> Convert:
    """What makes a record of JSON's types of one of a `datasets` data set.

    Columns that are null stay. Times become ISO 8601, decimals their digits, and short floats the
    number that was written.

    Args:
        features: column -> its type; None: not known, then every null in an object is padding.
    """
    if features is None:
        return lambda record: {column: _unpadded(value) for column, value in record.items()}
    converters = {
        column: convert
        for column, feature in features.items()
        if (convert := _converter(feature)) is not None
    }
    if not converters:
        return lambda record: record

    def convert_record(record: dict[str, Any]) -> dict[str, Any]:
        changed = {
            column: convert(record[column])
            for column, convert in converters.items()
            if record.get(column) is not None
        }
        return {**record, **changed}

    return convert_record


def as_json(value: object) -> str:
    """What JSON has no type for, as a text that a reader knows.

    Raises:
        TypeError: a value that no table of texts and numbers holds.
    """
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Decimal | UUID | timedelta):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def _converter(feature: Any) -> Convert | None:
    """What converts a value of a type that is not null; None: it stays as it is."""
    if isinstance(feature, Mapping):
        return _struct_converter(feature)
    if isinstance(feature, list):
        return _list_converter(feature[0])
    inner = getattr(feature, "feature", None)
    if inner is not None:
        return _list_converter(inner)
    dtype = getattr(feature, "dtype", None)
    if not isinstance(dtype, str) or type(feature).__name__ != "Value":
        return None
    if dtype in _SHORT_FLOATS:
        kind = _SHORT_FLOATS[dtype]
        return lambda value: float(str(kind(value)))
    return as_json if dtype.startswith(_TEXT_TYPES) else None


def _struct_converter(fields: Mapping[str, Any]) -> Convert:
    converters = {key: _converter(feature) for key, feature in fields.items()}
    written = {key for key, feature in fields.items() if getattr(feature, "dtype", "") == "null"}

    def convert_struct(value: Mapping[str, Any]) -> dict[str, Any]:
        converted: dict[str, Any] = {}
        for key, part in value.items():
            if part is None:
                if key in written:
                    converted[key] = None
                continue
            convert = converters.get(key)
            converted[key] = part if convert is None else convert(part)
        return converted

    return convert_struct


def _list_converter(feature: Any) -> Convert | None:
    convert = _converter(feature)
    if convert is None:
        return None
    return lambda values: [None if value is None else convert(value) for value in values]


def _unpadded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unpadded(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_unpadded(part) for part in value]
    try:
        return as_json(value)
    except TypeError:
        return value
