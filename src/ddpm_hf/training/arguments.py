"""Options of `ddpm-hf train` from the command line and from a YAML recipe."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddpm_hf.diffusion.atomic_files import read_text
from ddpm_hf.training.config import TrainingConfig
from ddpm_hf.training.errors import ConfigError
from ddpm_hf.utils.bounded_yaml import load_yaml
from ddpm_hf.utils.text import did_you_mean, without_secrets

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
    parser, argv = _create_parser(prog), sys.argv[1:] if argv is None else argv
    flags = parser.parse_known_args(argv)[0]
    if flags.config:
        recipe = _read_recipe(Path(flags.config).expanduser())
        # These options exclude each other: a flag also overrides the other one in the recipe.
        for flag, other in (("pretrained", "unet_config"), ("unet_config", "pretrained")):
            if getattr(flags, flag) is not None:
                recipe.pop(other, None)
        parser.set_defaults(**recipe)
    values = vars(parser.parse_args(argv))
    has_recipe, source = values.pop("config") is not None, values.pop("source")
    if source is not None:
        if values["dataset"] not in (None, source) and not has_recipe:
            two = f"{source!r} and {values['dataset']!r}"
            raise ConfigError(without_secrets(f"`dataset` must be one dataset, got {two}"))
        values["dataset"] = source
    if values["dataset"] is None:
        parser.error("no images: pass a folder or a dataset, as in ddpm-hf train ./photos")
    return TrainingConfig(**values)


def _create_parser(prog: str | None) -> argparse.ArgumentParser:
    from ddpm_hf.option_parser import OptionParser  # imports transformers, which takes seconds

    parser = OptionParser(
        [TrainingConfig],
        prog=prog,
        usage=f"{prog or '%(prog)s'} [DATASET] [--config FILE] [--option VALUE ...]",
        description=_DESCRIPTION.replace("PROG", prog or "train.py"),
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


def _read_recipe(path: Path) -> dict[str, Any]:
    """The options in a recipe; argparse converts text such as 1e-4, which YAML reads as a string.

    Raises:
        ConfigError: if the file cannot be read or has an unknown option.
    """
    try:
        recipe = load_yaml(read_text(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the recipe {path}: {error}") from None
    if not isinstance(recipe, dict):
        raise ConfigError(f"the recipe {path} must consist of 'option: value' lines")
    if "allow_pickle" in recipe:  # its name in earlier versions
        recipe["use_safetensors"] = not recipe.pop("allow_pickle")
    known = [field.name for field in dataclasses.fields(TrainingConfig)]
    for key in recipe:
        if key not in known:
            hint = did_you_mean(str(key), known)
            raise ConfigError(f"the recipe {path} has the unknown option {key!r}{hint}")
    if recipe.get("mixed_precision") is False:
        recipe["mixed_precision"] = "no"  # YAML reads a bare no as False
    return recipe
