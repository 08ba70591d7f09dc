"""What the parsers of the commands share."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm_hf.scheduler_spec import SchedulerSpec

if TYPE_CHECKING:
    from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline


def command_parser(name: str, usage: str, text: str) -> argparse.ArgumentParser:
    """A parser for `ddpm-hf NAME`; its text is shown as it is written."""
    return argparse.ArgumentParser(
        prog=f"ddpm-hf {name}",
        usage=f"ddpm-hf {name} {usage}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def positive_int(text: str) -> int:
    """`type=` of an option that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def path(text: str) -> Path:
    """`type=` of a path: `~` is home in `--output=~/x` too, where no shell expands it."""
    return Path(text).expanduser()


def model_name(text: str) -> str:
    """`type=` of a repository on the Hub or a folder."""
    return str(path(text)) if text.startswith("~") else text


def sampler(text: str) -> str:
    """`type=` of a scheduler with its options."""
    try:
        return str(SchedulerSpec.parse(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which model."""
    parser.add_argument(
        "model", type=model_name, metavar="MODEL", help="Hub repository or folder of a model"
    )


def add_model_files(group: Any) -> None:
    """Which files of the model."""
    group.add_argument(
        "--revision",
        metavar="NAME",
        help="branch, tag or commit of the model on the Hub (default: main)",
    )
    group.add_argument("--variant", metavar="NAME", help="variant of the weights, such as fp16")
    group.add_argument(
        "--allow-pickle",
        action="store_true",
        help="open the pickled .bin weights of an old repository; they could run code, so only for"
        " authors you trust",
    )


def load_model(options: argparse.Namespace) -> "GaussianDDPMPipeline":
    """The model that these options name.

    Raises:
        ValueError, OSError: if there is none, or it cannot be loaded.
    """
    from ddpm_hf.hub.load import load

    return load(
        options.model,
        revision=options.revision,
        variant=options.variant,
        use_safetensors=not options.allow_pickle,
    )


def add_model_and_data(parser: argparse.ArgumentParser) -> None:
    """Which model, and which images it is measured on."""
    add_model(parser)
    add_dataset(parser)


def add_dataset(parser: argparse.ArgumentParser, how_many: str | None = None) -> None:
    """Which images a model is measured on."""
    parser.add_argument(
        "dataset",
        nargs=how_many,
        type=model_name,
        metavar="DATASET",
        help="folder of images, parquet or arrow files, or a data set on the Hub; its images get "
        "the model's size and mode",
    )


def add_data(group: Any, how_many: str = "all") -> None:
    """Which of the images."""
    group.add_argument(
        "--split",
        metavar="NAME",
        help="of the data set, with images that the model was not trained on (default: test or "
        "validation, where there is one; else what the training of the model held out itself)",
    )
    group.add_argument(
        "--num-images",
        type=positive_int,
        metavar="N",
        help=f"so many, drawn by the seed (default: {how_many})",
    )
    group.add_argument("--dataset-config", metavar="NAME", help="configuration of a Hub data set")
    group.add_argument(
        "--dataset-revision", metavar="NAME", help="branch, tag or commit of a Hub data set"
    )
    group.add_argument(
        "--image-column", metavar="NAME", help="column of the images, if there are several"
    )
    group.add_argument(
        "--class-column",
        metavar="NAME",
        help="column of the classes, for a class-conditional model (default: the one declared so)",
    )
    group.add_argument(
        "--on-bad-image",
        choices=("error", "skip"),
        default="error",
        help="what to do about images that cannot be read (default: %(default)s)",
    )


def add_comparison(group: Any) -> None:
    """What drawn images are compared with, and by what; None where it is not said."""
    group.add_argument(
        "--features",
        metavar="NAME",
        help="what images are compared by: a vision model of transformers by name or folder; "
        "efficientnet-lite0, which needs no download (extra eval); or pixels (default: "
        "facebook/dinov2-base)",
    )
    group.add_argument(
        "--reference-split",
        metavar="NAME",
        help="of the images that drawn ones are compared with; those of --split, which the model "
        "was not trained on, give what is possible (default: train)",
    )


def given(options: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Those of the options that have a value; what is left out has its default in Python."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def add_work(group: Any) -> None:
    """How the measuring is done, and how the model is loaded."""
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="the noise of image i depends on the seed and on i alone (default: %(default)s)",
    )
    group.add_argument(
        "--batch-size",
        type=positive_int,
        default=64,
        metavar="N",
        help="images at once, as memory allows (default: %(default)s)",
    )
    add_model_files(group)
