"""Options declared once, as dataclass fields.

A field states name, type, default, help, bounds and choices. The Python signature
(`takes_options`), the command line (`option_parser`) and the record on disk (`Options.to_dict`)
follow from it.

    @dataclass(frozen=True, kw_only=True)
    class ImageOptions(Options):
        num_images: int = option(16, "number of images", minimum=1)
        seed: int = option(0, "seed of the noise; image i depends on (seed, i) alone", minimum=0)

Messages name an option in backticks, as in "`num_images` must be at least 1, got 0". The command
line replaces the backticked name by the flag (`flags_in_message`), so a message is written once.
"""

import dataclasses
import difflib
import functools
import inspect
import math
import numbers
import os
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ClassVar, Literal, ParamSpec, Self, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
REQUIRED: Any = dataclasses.MISSING
"""Default of an option that must be given."""


def option(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    limit: float | None = None,
    choices: Iterable[Any] | None = None,
    convert: Callable[[Any], Any] | None = None,
    metavar: str | tuple[str, ...] | None = None,
    flag: str | None = None,
    aliases: tuple[str, ...] = (),
    is_path: bool = False,
    is_positional: bool = False,
    is_recorded: bool = True,
) -> Any:
    """A dataclass field with the facts about one option.

    Args:
        default: value when the option is not given; None means "chosen later".
        help: one sentence for `--help`, with units and the meaning of None; other options are named
            in backticks.
        minimum, maximum: inclusive bounds of a number, or of each number in a list.
        limit: largest number that a machine can be asked for; named only where it is exceeded.
        choices: valid values, where the annotation is not a `Literal`.
        convert: returns the value to keep, or raises ValueError; for each item of a list.
        metavar: placeholder of the value in `--help`; a tuple for a fixed number of values.
        flag: flag on the command line; by default `--` and the name with dashes. The flag of a
            boolean that is True by default turns it off.
        aliases: further flags.
        is_path: a leading `~` is expanded to the home directory.
        is_positional: an argument without a flag.
        is_recorded: whether `to_dict` keeps the value.
    """
    facts = {key: value for key, value in locals().items() if key != "default"}
    return dataclasses.field(default=default, metadata=facts)


class OptionError(ValueError):
    """An option with an invalid value; the message names option, value, choices and fix."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Base class of option groups: checks types, choices and bounds on construction.

    Raises:
        TypeError: for an unknown name, with close matches.
        OptionError: for a value of the wrong type, outside the bounds, or not among the choices.
    """

    _error: ClassVar[type[ValueError]] = OptionError

    def __new__(cls, *_: Any, **given: Any) -> Self:
        """Refuse unknown names; the error of a dataclass suggests none."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=3)
                hint = f"; did you mean {' or '.join(close)}?" if close else ""
                raise TypeError(f"unexpected keyword argument {name!r}{hint}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = self._checked(field, kinds_of(hints[field.name]), getattr(self, field.name))
            object.__setattr__(self, field.name, value)

    def keywords(self, group: "type[Options] | None" = None) -> dict[str, Any]:
        """The values of the options in `group` (default: all) by name."""
        return {
            field.name: getattr(self, field.name) for field in dataclasses.fields(group or self)
        }

    def to_dict(self) -> dict[str, Any]:
        """The recorded options as JSON values."""
        recorded = {f.name for f in dataclasses.fields(self) if f.metadata.get("is_recorded", True)}
        return {name: value for name, value in self.keywords().items() if name in recorded}

    def _checked(self, field: "dataclasses.Field[Any]", kinds: tuple[Any, ...], value: Any) -> Any:
        name, facts = field.name, field.metadata
        if value is None and type(None) in kinds:
            return None
        if facts.get("is_path") and value == "":
            raise self._error(f"`{name}` must not be empty")
        value = _converted(value, kinds, facts.get("is_path", False))
        items = value if isinstance(value, list | tuple) else [value]
        choices = _choices(kinds) or list(facts.get("choices") or ())
        if choices and any(item not in choices for item in items):
            raise self._error(f"`{name}` must be one of {choices}, got {value!r}")
        if not _choices(kinds):
            self._check_type(name, kinds, value)
        for number in items:
            self._check_bounds(name, number, facts.get("minimum"), facts.get("maximum"))
            self._check_bounds(name, number, None, facts.get("limit"))
        if (convert := facts.get("convert")) is None:
            return value
        try:
            return [convert(item) for item in items] if isinstance(value, list) else convert(value)
        except ValueError as error:
            raise self._error(f"`{name}`: {error}") from None

    def _check_type(self, name: str, kinds: tuple[Any, ...], value: Any) -> None:
        if Any in kinds:
            return
        if isinstance(value, bool) and bool not in kinds:
            raise self._error(f"`{name}` must not be a boolean, got {value!r}")
        if not isinstance(value, tuple(_plain(kind) for kind in kinds)):
            expected = " or ".join(_plain(k).__name__ for k in kinds if k is not type(None))
            raise self._error(f"`{name}` must be of type {expected}, got {value!r}")

    def _check_bounds(self, name: str, value: Any, low: float | None, high: float | None) -> None:
        if low is not None and high is not None and not low <= value <= high:
            raise self._error(f"`{name}` must be in [{low}, {high}], got {value}")
        if low is not None and not value >= low:
            raise self._error(f"`{name}` must be at least {low}, got {value}")
        if high is not None and not value <= high:
            raise self._error(f"`{name}` must be at most {high}, got {value}")
        if isinstance(value, float) and not math.isfinite(value):
            raise self._error(f"`{name}` must be finite, got {value}")


def _converted(value: Any, kinds: tuple[Any, ...], is_path: bool) -> Any:
    """`value` in the annotated type, where the conversion loses nothing."""
    plain = [_plain(kind) for kind in kinds]
    is_text = isinstance(value, str | bytes | Mapping)
    if (list in plain or tuple in plain) and isinstance(value, Iterable) and not is_text:
        items = [_converted(item, (str,), is_path) if is_path else item for item in value]
        return tuple(items) if tuple in plain else items
    if isinstance(value, os.PathLike) and (Path in kinds or str in kinds):
        value = str(value)
    if is_path and isinstance(value, str) and value.startswith("~"):
        value = os.path.expanduser(value)
    if Path in kinds and isinstance(value, str):
        return Path(value)
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral) and int in kinds:  # also NumPy's integers
        return int(value)
    return float(value) if isinstance(value, numbers.Real) and float in kinds else value


def kinds_of(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation alone."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return typing.get_args(annotation)
    return (annotation,)


def _choices(kinds: tuple[Any, ...]) -> list[Any]:
    return [
        c for kind in kinds if typing.get_origin(kind) is Literal for c in typing.get_args(kind)
    ]


def _plain(kind: Any) -> type:
    """`list` for `list[int]`."""
    plain: type = typing.get_origin(kind) or kind
    return plain


def flag_of(field: "dataclasses.Field[Any]") -> str:
    """The flag of an option on the command line; the placeholder of a positional argument."""
    facts = field.metadata
    if facts.get("is_positional"):
        return str(facts.get("metavar") or field.name.upper())
    return facts.get("flag") or "--" + field.name.replace("_", "-")


def flags_in_message(message: str, kind: type) -> str:
    """Replace the backticked options of `kind` in `message` by their flags.

    "`use_safetensors=False`", the other value of a boolean, becomes the flag that sets it.

    Args:
        message: text of an error or a warning.
        kind: a dataclass of options.
    """
    for field in dataclasses.fields(kind):
        flag = flag_of(field)
        if isinstance(field.default, bool):
            off = "--no-" + flag.removeprefix("--")
            turned = off if field.default and not field.metadata.get("flag") else flag
            message = message.replace(f"`{field.name}={not field.default}`", turned)
        message = message.replace(f"`{field.name}`", flag)
    return message


_COMMAND: ContextVar[type | None] = ContextVar("command", default=None)


@contextmanager
def naming_flags_of(kind: type | None) -> Iterator[None]:
    """Make `for_user` replace the backticked options of `kind` by their flags in the block.

    Args:
        kind: the options of a command; None for no replacement.
    """
    token = _COMMAND.set(kind)
    try:
        yield
    finally:
        _COMMAND.reset(token)


def for_user(message: str) -> str:
    """`message` with flags inside a command, unchanged in Python."""
    kind = _COMMAND.get()
    return flags_in_message(message, kind) if kind else message


def takes_options(kind: type[Options]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: shows the fields of `kind` in the signature in place of `**options`.

    The function receives them as keywords and builds `kind(**options)`.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        hints = typing.get_type_hints(kind)
        added = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.default is REQUIRED else field.default,
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
