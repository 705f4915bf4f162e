"""Checks of what a file says: each field has the type that its reader expects."""

import reprlib
from dataclasses import dataclass
from typing import Any

_TYPES = {
    int: ("an integer", (int,)),
    float: ("a number", (int, float)),
    str: ("a string", (str,)),
    bool: ("true or false", (bool,)),
}


@dataclass(frozen=True)
class Maybe:
    """A field that may be absent, as in files of older versions."""

    schema: Any


@dataclass(frozen=True)
class Nullable:
    """A value that may be null."""

    schema: Any


def check(value: Any, schema: Any, where: object, field: str = "") -> None:
    """Raise ValueError, with ``where`` and the field, unless a value of JSON fits a schema.

    A schema is a type; ``[schema]``, a list of such; ``{str: schema}``, an object with any names;
    or an object with these names, beside which others may stand.
    """
    if isinstance(schema, Nullable):
        if value is not None:
            check(value, schema.schema, where, field)
    elif isinstance(schema, list):
        _check_type(value, "a list", (list, tuple), where, field)
        for index, each in enumerate(value):
            check(each, schema[0], where, f"{field}[{index}]")
    elif isinstance(schema, dict):
        _check_type(value, "an object", (dict,), where, field)
        _check_fields(value, schema, where, field)
    else:
        expected, types = _TYPES[schema]
        _check_type(value, expected, types, where, field)


def _check_fields(value: dict, schema: dict, where: object, field: str) -> None:
    if str in schema:
        for name, each in value.items():
            check(each, schema[str], where, f"{field}[{reprlib.repr(name)}]")
        return
    for name, inner in schema.items():
        inside = f"{field}.{name}" if field else name
        optional = isinstance(inner, Maybe)
        if name in value:
            check(value[name], inner.schema if optional else inner, where, inside)
        elif not optional:
            raise ValueError(f"{where}: the field {inside} is missing")


def _check_type(value: Any, expected: str, types: tuple, where: object, field: str) -> None:
    if type(value) not in types:
        place = f"the field {field}" if field else "it"
        raise ValueError(f"{where}: {place} must be {expected}, got {reprlib.repr(value)}")
