"""Options declared once, as dataclass fields.

A field states name, type, default, help, bounds and choices. The Python signature
(`takes_options`), the command line (`commands.parser`) and the record on disk (`Options.to_dict`)
all follow from it.

    @dataclass(frozen=True, kw_only=True)
    class SamplingOptions(Options):
        num_images: int = option(16, "number of images", minimum=1, metavar="N")
        seed: int = option(0, "seed of the noise; image i depends on (seed, i) alone", minimum=0)

Messages name an option in backticks, as in "`num_images` must be at least 1, got 0". The command
line replaces the backticked name by the flag of the option, so a message is written once.
"""

import dataclasses
import difflib
import functools
import inspect
import math
import os
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal, ParamSpec, Self, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def option(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: Iterable[str] | None = None,
    metavar: str | tuple[str, ...] | None = None,
    flag: str | None = None,
    is_path: bool = False,
    is_positional: bool = False,
    is_recorded: bool = True,
) -> Any:
    """A dataclass field with everything that is known about one option.

    Args:
        default: value when the option is not given; None means "chosen later".
        help: one sentence for `--help`, with units and the meaning of None.
        minimum, maximum: inclusive bounds of a number.
        choices: valid values, where the annotation is not a `Literal`.
        metavar: placeholder of the value in `--help`.
        flag: flag on the command line; by default `--` and the name with dashes. A flag of a
            boolean that is True by default turns it off.
        is_path: a leading `~` means the home folder.
        is_positional: an argument without a flag.
        is_recorded: whether `to_dict` keeps the value.
    """
    facts = {key: value for key, value in locals().items() if key not in ("default", "help")}
    return dataclasses.field(default=default, metadata={"help": help, **facts})


class OptionError(ValueError):
    """An option with an invalid value; the message names option, value, choices and fix."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Base of the option groups: checks types, choices and bounds on construction.

    Raises:
        OptionError: for a value of the wrong type, outside the bounds, or not among the choices.
    """

    _error: ClassVar[type[ValueError]] = OptionError

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = self._checked(field, hints[field.name], getattr(self, field.name))
            object.__setattr__(self, field.name, value)

    @classmethod
    def from_keywords(cls, **given: Any) -> Self:
        """The options from keyword arguments.

        Raises:
            TypeError: for an unknown name, with close matches.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=3)
                hint = f"; did you mean {' or '.join(close)}?" if close else ""
                raise TypeError(f"unexpected keyword argument {name!r}{hint}")
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """The recorded options as JSON values."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.metadata.get("is_recorded", True)
        }

    def _checked(self, field: "dataclasses.Field[Any]", annotation: Any, value: Any) -> Any:
        name, facts = field.name, field.metadata
        if isinstance(value, Path) and Path not in _kinds(annotation):
            value = str(value)
        kinds = _kinds(annotation)
        if value is None and type(None) in kinds:
            return None
        if facts.get("is_path") and isinstance(value, str) and value.startswith("~"):
            value = os.path.expanduser(value)
        if Path in kinds and isinstance(value, str):
            value = Path(value)
        if float in kinds and type(value) is int:
            value = float(value)
        choices = [c for k in kinds if typing.get_origin(k) is Literal for c in typing.get_args(k)]
        choices = choices or list(facts.get("choices") or ())
        if choices:
            if any(v not in choices for v in (value if isinstance(value, list) else [value])):
                raise self._error(f"`{name}` must be one of {choices}, got {value!r}")
            return value
        if Any not in kinds and not isinstance(value, tuple(_plain(k) for k in kinds)):
            wanted = " or ".join(_plain(k).__name__ for k in kinds if k is not type(None))
            raise self._error(f"`{name}` must be of type {wanted}, got {value!r}")
        if isinstance(value, bool) and bool not in kinds and Any not in kinds:
            raise self._error(f"`{name}` must be a number, got {value!r}")
        self._check_bounds(name, value, facts)
        return value

    def _check_bounds(self, name: str, value: Any, facts: Any) -> None:
        low, high = facts.get("minimum"), facts.get("maximum")
        for number in value if isinstance(value, list) else [value]:
            if low is not None and not number >= low:
                raise self._error(f"`{name}` must be at least {low}, got {number}")
            if high is not None and not number <= high:
                raise self._error(f"`{name}` must be at most {high}, got {number}")
            if isinstance(number, float) and not math.isfinite(number):
                raise self._error(f"`{name}` must be finite, got {number}")


def _kinds(annotation: Any) -> tuple[Any, ...]:
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return typing.get_args(annotation)
    return (annotation,)


def _plain(kind: Any) -> type:
    """`list` for `list[int]`."""
    plain: type = typing.get_origin(kind) or kind
    return plain


def flag_of(field: "dataclasses.Field[Any]") -> str:
    """The flag of an option on the command line."""
    return field.metadata.get("flag") or "--" + field.name.replace("_", "-")


def takes_options(kind: type[Options]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: shows the fields of `kind` in the signature in place of `**options`.

    The function receives them as keywords and builds `kind.from_keywords(**options)`.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        hints = typing.get_type_hints(kind)
        added = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=hints[field.name],
            )
            for field in dataclasses.fields(kind)
            if field.name not in signature.parameters
        ]

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return function(*args, **kwargs)

        call.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
        return call

    return decorate
