"""Options of `ddpm-hf train` from the command line and from a YAML recipe."""

import argparse
import dataclasses
import difflib
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ddpm_hf.options import Options
from ddpm_hf.text import without_secrets
from ddpm_hf.training.config import TrainingConfig
from ddpm_hf.training.errors import ConfigError
from ddpm_hf.training.options import (
    DataOptions,
    ModelOptions,
    OptimizationOptions,
    OutputOptions,
    PeriodicEvaluationOptions,
    ValidationOptions,
)

_DESCRIPTION = """
train on a folder of images or any dataset, or resume an interrupted run

  PROG ./photos                     size, network, batch and length are proposed
  PROG ./photos --resolution 64     override any proposal
  PROG user/dataset                 train on a dataset of the Hub
  PROG ./photos --pretrained google/ddpm-cifar10-32     fine-tune a model
  PROG ./photos --config recipe.yaml                    options from a file

The plan is printed before the first update. Model, sample grids and losses are written to
runs/NAME. Stop at any time; run the same command again to resume.
"""


def parse_config(argv: Sequence[str] | None = None, prog: str | None = None) -> TrainingConfig:
    """The configuration from a command line; flags override the recipe given by `--config`.

    Args:
        argv: the arguments, by default those of this process.
        prog: name of the command in the help text.
    Raises:
        ConfigError: for an invalid value, an unknown recipe key or an unreadable recipe.
        SystemExit: for `--help` (0) and unknown flags (2), as argparse does.
    """
    parser, argv = _parser(prog), _flags_alone(sys.argv[1:] if argv is None else argv)
    flags = parser.parse_known_args(argv)[0]
    recipe = flags.config
    if recipe:
        options = _read_recipe(Path(recipe).expanduser())
        # These options exclude each other: a flag also overrides the other one in the recipe.
        for flag, other in (("pretrained", "unet_config"), ("unet_config", "pretrained")):
            if getattr(flags, flag) is not None:
                options.pop(other, None)
        if "use_safetensors" in options:
            options["allow_pickle"] = not options.pop("use_safetensors")
        parser.set_defaults(**options)
    values = vars(parser.parse_args(argv))
    values.pop("config")
    values["use_safetensors"] = not values.pop("allow_pickle")
    source = values.pop("source")
    if source is not None:
        if values["dataset"] not in (None, source) and not recipe:
            two = f"{source!r} and {values['dataset']!r}"
            raise ConfigError(without_secrets(f"`dataset` must be one dataset, got {two}"))
        values["dataset"] = source
    if values["dataset"] is None:
        parser.error("no dataset: pass a folder of images or a dataset: ddpm-hf train ./photos")
    return TrainingConfig(**values)


def _parser(prog: str | None) -> argparse.ArgumentParser:
    from transformers import HfArgumentParser

    groups = [
        DataOptions,
        ModelOptions,
        OptimizationOptions,
        ValidationOptions,
        PeriodicEvaluationOptions,
        OutputOptions,
    ]
    parser: argparse.ArgumentParser = HfArgumentParser(
        [_flags_of(group) for group in groups],
        prog=prog,
        usage=f"{prog or '%(prog)s'} [DATASET] [--config FILE] [--option VALUE ...]",
        description=_DESCRIPTION.replace("PROG", prog or "train.py"),
        formatter_class=_HelpWithDefaults,
        allow_abbrev=False,
    )
    parser.add_argument(
        "source", nargs="?", metavar="DATASET", help="training images: same as --dataset"
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML recipe, such as the config.yaml of a run; flags override it",
    )
    return parser


def _flags_of(group: type[Options]) -> Any:
    """The options as `HfArgumentParser` takes them: with help as the only metadata."""
    hints = typing.get_type_hints(group)
    flags: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(group):
        name, default = field.name, field.default
        if field.metadata["flag"]:  # turns the option off
            name, default = field.metadata["flag"].strip("-").replace("-", "_"), not default
        flag = dataclasses.field(default=default, metadata={"help": field.metadata["help"]})
        flags.append((name, hints[field.name], flag))
    title: Any = getattr(group, "_argument_group_name", None)
    return dataclasses.make_dataclass(
        group.__name__, flags, kw_only=True, namespace={"_argument_group_name": title}
    )


def _flags_alone(argv: Sequence[str]) -> list[str]:
    """`--random-flip ./photos` as `--random-flip true ./photos`, and `--no-x` as `--x false`."""
    hints = typing.get_type_hints(TrainingConfig)
    names = [name for name, hint in hints.items() if hint in (bool, bool | None)]
    switches = {f"--{name.replace('_', '-')}" for name in [*names, "allow_pickle"]}
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
    """Each flag once, with dashes, and its default unless that is None or a boolean."""

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
        raise ConfigError(f"the recipe {path} must consist of 'option: value' lines")
    if "allow_pickle" in recipe:  # recipes of version 0.1
        recipe["use_safetensors"] = not recipe.pop("allow_pickle")
    known = {field.name for field in dataclasses.fields(TrainingConfig)}
    for key in recipe:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise ConfigError(f"the recipe {path} has the unknown option {key!r}{hint}")
    if recipe.get("mixed_precision") is False:
        recipe["mixed_precision"] = "no"  # YAML reads a bare no as False
    # YAML reads 1e-4 as text; argparse converts a text default by the type of the option.
    return recipe
