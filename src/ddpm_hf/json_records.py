"""Conversion between frozen dataclasses and JSON objects, checked against the annotations."""

import dataclasses
import sys
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, Self

from ddpm_hf.options import Options

JsonObject = dict[str, Any]
Row = dict[str, str | int | float | None]


def renamed(key: str) -> Any:
    """A field with another name in the JSON object."""
    return dataclasses.field(metadata={"key": key})


def optional() -> Any:
    """A field that is left out of the JSON object when it is None."""
    return dataclasses.field(default=None, metadata={"is_optional": True})


def inlined() -> Any:
    """An optional record whose keys stand directly in the JSON object of its owner."""
    return dataclasses.field(default=None, metadata={"is_inlined": True})


def excluded() -> Any:
    """A field that is not part of the JSON object."""
    return dataclasses.field(default=None, metadata={"is_excluded": True})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """Base of dataclasses that are stored as JSON objects, one key per field."""

    def to_dict(self) -> JsonObject:
        """The JSON object."""
        content: JsonObject = {}
        for field in dataclasses.fields(self):
            value, facts = getattr(self, field.name), field.metadata
            if facts.get("is_excluded") or (value is None and _may_be_missing(field)):
                continue
            if facts.get("is_inlined"):
                content |= value.to_dict()
            else:
                content[_key(field)] = _to_json(value)
        return content

    @classmethod
    def of(cls, source: object, **values: Any) -> Self:
        """Create a record from `values`; other fields are copied from `source` if it has them."""
        names = {field.name for field in dataclasses.fields(cls)} - values.keys()
        shared = {name: getattr(source, name) for name in names if hasattr(source, name)}
        return cls(**shared, **values)

    @classmethod
    def from_dict(cls, content: JsonObject) -> Self:
        """The record of a JSON object; unknown keys are ignored.

        Raises:
            ValueError: if a key is missing, or its value is not of the annotated type.
        """
        if not isinstance(content, dict):
            raise ValueError(f"{cls.__name__} must be a JSON object, got {content!r:.100}")
        hints = typing.get_type_hints(cls)
        return cls(**dict(_decoded_fields(cls, hints, content)))


def _decoded_fields(
    kind: type[Record], hints: JsonObject, content: JsonObject
) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(kind):
        key, facts = _key(field), field.metadata
        if facts.get("is_excluded"):
            continue
        if facts.get("is_inlined"):
            (record,) = (k for k in typing.get_args(hints[field.name]) if k is not type(None))
            if dataclasses.fields(record)[0].name in content:
                yield field.name, record.from_dict(content)
        elif key in content:
            yield field.name, from_json(hints[field.name], content[key])
        elif not _may_be_missing(field):
            raise ValueError(f"{kind.__name__} has no {key!r}")


def _key(field: "dataclasses.Field[Any]") -> str:
    return field.metadata.get("key") or field.name


def _may_be_missing(field: "dataclasses.Field[Any]") -> bool:
    return bool(field.metadata.get("is_optional") or field.metadata.get("is_inlined"))


def _to_json(value: Any) -> Any:
    if isinstance(value, Record | Options):
        return value.to_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, tuple | list):
        return [_to_json(item) for item in value]
    if isinstance(value, dict):
        return {key: _to_json(item) for key, item in value.items()}
    return value


def from_json(annotation: Any, value: Any) -> Any:
    """Convert a JSON value to the annotated type.

    Raises:
        ValueError: if it is not of the annotated type.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return _first_match(arguments, value)
    if origin is Literal and value in arguments:
        return value
    if origin is tuple and isinstance(value, list | tuple):
        if arguments[-1] is Ellipsis:
            return tuple(from_json(arguments[0], item) for item in value)
        return tuple(from_json(kind, item) for kind, item in zip(arguments, value, strict=True))
    if origin is list and isinstance(value, list):
        return [from_json(arguments[0], item) for item in value]
    if origin is dict and isinstance(value, dict):
        of_key, of_item = arguments
        return {of_key(key): from_json(of_item, item) for key, item in value.items()}
    if origin is None and _is_instance(annotation, value):
        return value
    if dataclasses.is_dataclass(annotation) and isinstance(value, dict):
        return _dataclass_of(annotation, value)
    raise ValueError(f"expected {annotation}, got {value!r:.100}")


def _first_match(kinds: tuple[Any, ...], value: Any) -> Any:
    for kind in kinds:
        try:
            return from_json(kind, value)
        except ValueError as error:
            last = error
    raise last


def _is_instance(annotation: Any, value: Any) -> bool:
    if annotation is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and abs(value) <= sys.float_info.max  # neither infinite nor NaN
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(annotation, type) and isinstance(value, annotation)


def _dataclass_of(kind: Any, content: JsonObject) -> Any:
    if issubclass(kind, Record):
        return kind.from_dict(content)
    try:
        return kind(**content)
    except TypeError as error:
        raise ValueError(f"{error}") from None
