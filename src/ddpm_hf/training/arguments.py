"""The options of a run from the command line and from a YAML recipe."""

import argparse
import difflib
import sys
import typing
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from ddpm_hf.text import without_secrets
from ddpm_hf.training.config import ConfigError, TrainingConfig
from ddpm_hf.training.options import (
    DataOptions,
    EvaluationOptions,
    ModelOptions,
    OptimizationOptions,
    OutputOptions,
    ValidationOptions,
)

_DESCRIPTION = """
train on a folder of images or any data set, or go on with a run that was interrupted

  PROG ./photos                     size, network, batch and length proposed
  PROG ./photos --resolution 64     every proposal can be overridden
  PROG user/dataset                 a data set of the Hub
  PROG ./photos --pretrained google/ddpm-cifar10-32     fine-tune a model
  PROG ./photos --config recipe.yaml                    options from a file

The plan is printed before the first update. The model, grids of samples and the losses
go to runs/NAME. Stop at any time; the same command again goes on where it was.
"""


def parse_config(argv: Sequence[str] | None = None, prog: str | None = None) -> TrainingConfig:
    """The configuration from a command line; flags win over the recipe given by `--config`.

    Args:
        argv: the arguments, by default those of this process.
        prog: the command's name in the help text.
    Raises:
        ConfigError: for a bad value, an unknown recipe key or an unreadable recipe.
        SystemExit: for `--help` (0) and unknown flags (2), as argparse does.
    """
    parser, argv = _parser(prog), _flags_alone(sys.argv[1:] if argv is None else argv)
    flags = parser.parse_known_args(argv)[0]
    recipe = flags.config
    if recipe:
        options = _read_recipe(Path(recipe).expanduser())
        # These two exclude each other: a flag wins over the other one of the recipe, too.
        for flag, other in (("pretrained", "unet_config"), ("unet_config", "pretrained")):
            if getattr(flags, flag) is not None:
                options.pop(other, None)
        parser.set_defaults(**options)
    given = vars(parser.parse_args(argv))
    given.pop("config")
    source = given.pop("source")
    if source is not None:
        if given["dataset"] not in (None, source) and not recipe:
            two = f"two data sets given: {source!r} and {given['dataset']!r}"
            raise ConfigError(without_secrets(two))
        given["dataset"] = source
    if given["dataset"] is None:
        parser.error("which images? Give a folder or a data set: ddpm-hf train ./photos")
    return TrainingConfig(**given)


def _parser(prog: str | None) -> argparse.ArgumentParser:
    from transformers import HfArgumentParser

    parser: argparse.ArgumentParser = HfArgumentParser(
        [
            DataOptions,
            ModelOptions,
            OptimizationOptions,
            ValidationOptions,
            EvaluationOptions,
            OutputOptions,
        ],
        prog=prog,
        usage=f"{prog or '%(prog)s'} [DATASET] [--config FILE] [--option VALUE ...]",
        description=_DESCRIPTION.replace("PROG", prog or "train.py"),
        formatter_class=_HelpWithDefaults,
        allow_abbrev=False,
    )
    parser.add_argument(
        "source", nargs="?", metavar="DATASET", help="the images: same as --dataset"
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML recipe, such as the config.yaml of a run; flags win over it",
    )
    return parser


def _flags_alone(argv: Sequence[str]) -> list[str]:
    """`--random-flip ./photos` as `--random-flip true ./photos`: a switch takes no data set.

    `--no-compile` is `--compile false`, and so for every switch.
    """
    hints = typing.get_type_hints(TrainingConfig)
    names = [name for name, hint in hints.items() if hint in (bool, bool | None)]
    switches = {f"--{name.replace('_', '-')}" for name in names}
    words, following = [], [*argv[1:], ""]
    for word, after in zip(argv, following, strict=False):
        if word.startswith("--no-") and word.replace("no-", "", 1) in switches:
            words += [word.replace("no-", "", 1), "false"]
            continue
        alone = word in switches and after.lower() not in ("true", "false", "yes", "no", "1", "0")
        words += [word, "true"] if alone else [word]
    return words


class _HelpWithDefaults(
    argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter
):
    """Each flag once, in its dashed form, with its default unless that is 'proposed' (None)."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or isinstance(action.default, bool):
            return action.help
        return super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        flag = action.option_strings[-1]
        if action.choices:
            return f"{flag} {{{','.join(map(str, action.choices))}}}"
        kind = {int: "N", float: "X"}.get(action.type, "NAME")  # type: ignore[call-overload]
        return flag if action.nargs == "?" else f"{flag} {action.metavar or kind}"


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the recipe {path}: {error}") from error
    if not isinstance(recipe, dict):
        raise ConfigError(f"the recipe {path} must hold 'option: value' lines")
    known = {option.name for option in fields(TrainingConfig)}
    for key in recipe:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise ConfigError(f"the recipe {path} has the unknown option {key!r}{hint}")
    if recipe.get("mixed_precision") is False:
        recipe["mixed_precision"] = "no"  # YAML reads a bare no as False
    # It reads 1e-4 as text; argparse converts a text default by the option's own type.
    return recipe
