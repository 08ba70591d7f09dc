"""Command line of a dataclass of options: `HfArgumentParser` with positional arguments, switches,
groups and the checks of `ddpm_hf.options`.

Importing this module imports transformers, so a command imports it only when it parses.
"""

import argparse
import copy
import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from transformers import HfArgumentParser

from ddpm_hf.options import REQUIRED, flag_of, flags_in_message, kinds_of
from ddpm_hf.utils.text import did_you_mean

Kind = TypeVar("Kind")
_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def parse_options(
    kind: type[Kind], argv: Sequence[str], *, prog: str, usage: str, description: str
) -> Kind:
    """Parse a command line into a dataclass of options.

    Args:
        kind: subclass of `Options`; its base classes are the groups in `--help`.
        argv: the arguments.
        prog: name of the command.
        usage: the arguments in one line.
        description: text above the options in `--help`, shown as written.
    Raises:
        OptionError: for an invalid value.
        SystemExit: for `--help` (0), and for unknown flags and missing arguments (2).
    """
    parser = OptionParser([kind], prog=prog, usage=f"{prog} {usage}", description=description)
    return kind(**vars(parser.parse_intermixed_args(list(argv))))


class OptionParser(HfArgumentParser):  # type: ignore[misc]
    """Parser of the options in dataclasses.

    Each base class with a title in `_argument_group_name` is a group in `--help`. Values are
    checked by the dataclass, not here. A boolean has the switches `--name` and `--no-name`;
    `--name true` and `--name false` also work.

    Args:
        kinds: dataclasses of options.
        **kwargs: of `argparse.ArgumentParser`.
    """

    def __init__(self, kinds: Sequence[type], **kwargs: Any) -> None:
        super().__init__(kinds, formatter_class=_HelpFormatter, allow_abbrev=False, **kwargs)

    def parse_known_args(  # type: ignore[no-untyped-def]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ):
        """As in `argparse.ArgumentParser`, after spelling switches without a value."""
        switches = {
            flag: action
            for action in self._actions
            if isinstance(action, argparse.BooleanOptionalAction)
            for flag in action.option_strings
            if not flag.startswith("--no-")
        }
        words = None if args is None else _without_switch_values(list(args), switches)
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> None:
        """As in `argparse.ArgumentParser`, with dashed flags and a hint for unknown arguments."""
        message = re.sub(r"--[\w-]*_[\w-]*/", "", message)  # of "--max_steps/--max-steps"
        unknown = message.partition("unrecognized arguments: ")[2].partition(" ")[0]
        hint = "; quote paths that contain spaces" if unknown else ""
        if unknown.startswith("-"):
            flags = [flag for action in self._actions for flag in _shown_flags(action)]
            hint = did_you_mean(unknown.partition("=")[0], flags)
        super().error(message + hint)

    def _add_dataclass_arguments(self, dtype: type) -> None:
        hints = typing.get_type_hints(dtype)
        fields = {field.name: field for field in dataclasses.fields(dtype)}
        groups: dict[str | None, Any] = {None: self}
        for group in reversed(dtype.__mro__):
            own = [fields.pop(name) for name in inspect.get_annotations(group) if name in fields]
            title = vars(group).get("_argument_group_name")
            if own and title not in groups:
                groups[title] = self.add_argument_group(title)
            for field in own:
                declared = copy.copy(field)
                declared.type = hints[field.name]
                help = flags_in_message(field.metadata["help"], dtype)
                declared.metadata = {**field.metadata, "help": help}  # type: ignore[assignment]
                self._parse_dataclass_field(groups[title], declared)

    @staticmethod
    def _parse_dataclass_field(parser: Any, field: "dataclasses.Field[Any]") -> None:
        """Add one option: `HfArgumentParser` derives the type, `_Declaration` adds our facts."""
        declaration = _Declaration(parser, field)
        if any(kind is bool for kind in kinds_of(field.type)):
            declaration.add_switch()
            return
        plain = copy.copy(field)
        plain.metadata = {}  # type: ignore[assignment]
        plain.type = _parsed_type(field.type)
        HfArgumentParser._parse_dataclass_field(
            SimpleNamespace(add_argument=declaration.add_value), plain
        )


@dataclasses.dataclass(frozen=True)
class _Declaration:
    """One option on the way from its field to `add_argument`."""

    parser: Any
    field: "dataclasses.Field[Any]"

    @property
    def flags(self) -> list[str]:
        """All flags; the last one is shown in the help."""
        flag = flag_of(self.field)
        underscored = [] if self.field.metadata.get("flag") else [f"--{self.field.name}"]
        others = [*underscored, *self.field.metadata.get("aliases", ())]
        return [*(other for other in others if other != flag), flag]

    @property
    def help(self) -> str:
        """The help text, with the default unless that is None or a boolean."""
        text, default = self.field.metadata["help"], self.field.default
        if default is not REQUIRED and default is not None and not isinstance(default, bool):
            shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else default
            text = f"{text} (default: {shown})"
        return text.replace("%", "%%")  # type: ignore[no-any-return]

    def add_switch(self) -> None:
        """Add a boolean option."""
        default, facts = self.field.default, {"dest": self.field.name, "help": self.help}
        if default is True and self.field.metadata.get("flag"):
            self.parser.add_argument(*self.flags, action="store_false", **facts)
            return
        action = argparse.BooleanOptionalAction
        self.parser.add_argument(*self.flags, action=action, default=default, **facts)
        self.parser._actions[-1].help = self.help  # argparse of Python < 3.13 adds the default

    def add_value(self, *_: str, choices: Any = None, **kwargs: Any) -> None:
        """Add an option with one or more values; the arguments are those of `add_argument`."""
        facts = self.field.metadata
        choices = choices or facts.get("choices")
        listed = f"{{{','.join(map(str, choices))}}}" if choices else None
        by_type = {int: "N", float: "X"}.get(kwargs["type"], "NAME")
        metavar = facts.get("metavar") or listed or by_type
        if isinstance(metavar, tuple):
            kwargs["nargs"] = len(metavar)
        kwargs |= {"help": self.help, "metavar": metavar}
        if self.field.default is not REQUIRED:
            kwargs["default"] = self.field.default
        if not facts.get("is_positional"):
            kwargs["dest"] = self.field.name
            self.parser.add_argument(*self.flags, **kwargs)
            return
        is_required = kwargs.pop("required", False)
        if not is_required and "nargs" not in kwargs:
            kwargs["nargs"] = "?"
        self.parser.add_argument(self.field.name, **kwargs)


def _parsed_type(annotation: Any) -> Any:
    """The type that one word of the command line is parsed into; the dataclass converts further."""
    kinds = kinds_of(annotation)
    if not {Any, str, Path}.isdisjoint(kinds):  # Path("") would be the current folder
        return str
    for kind in kinds:
        if typing.get_origin(kind) in (list, tuple):
            return list[_parsed_type(typing.get_args(kind)[0])]  # type: ignore[misc]
    return annotation


def _without_switch_values(words: list[str], switches: Mapping[str, argparse.Action]) -> list[str]:
    """`--x` for `--x true` and `--x=true`, `--no-x` for `--x false`; other words stay.

    So a switch does not take the word that follows it, which may be a dataset.
    """
    spelled: list[str] = []
    rest = iter(enumerate(words, 1))
    for place, word in rest:
        flag, is_joined, value = word.partition("=")
        value = (value if is_joined else "".join(words[place : place + 1])).lower()
        if flag not in switches or value not in _WORDS:
            spelled.append(word)
            continue
        spelled.append(switches[flag].option_strings[-1 if not _WORDS[value] else 0])
        if not is_joined:
            next(rest)
    return spelled


def _shown_flags(action: argparse.Action) -> list[str]:
    """Its dashed flags, without the spelling with underscores that is also accepted."""
    return [flag for flag in action.option_strings if "_" not in flag]


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows each option once, by its dashed flag; lines break at spaces only."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        flags = _shown_flags(action)
        if isinstance(action, argparse.BooleanOptionalAction):
            on, off = flags[0], flags[-1]
            return on if action.default is False else f"{on}, {off}"
        if not flags or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{flags[-1]} {self._format_args(action, 'VALUE')}"
