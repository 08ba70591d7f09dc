"""The options of `ddpm-hf sample`."""

import argparse
from pathlib import Path
from typing import Any

from ddpm_hf.commands.options import (
    add_model,
    add_model_files,
    command_parser,
    model_name,
    path,
    positive_int,
    sampler,
)
from ddpm_hf.scheduler_spec import NAMES_HELP

EXAMPLES = """
draw images from a model on the Hub or in a folder

  ddpm-hf sample runs/photos/model                      one grid, samples.png
  ddpm-hf sample runs/photos/model --output images      a folder, one file each
  ddpm-hf sample google/ddpm-cifar10-32 --scheduler DDIM      50 steps, not 1,000
  ddpm-hf sample runs/photos/model --thorough           all steps, where fewer are recommended
  ddpm-hf sample runs/pets/model --class-labels cat dog       of each in turn
  ddpm-hf sample runs/photos/model --num-images 50000 --output photos.npz
                                       to evaluate; what is interrupted goes on by the same command
  accelerate launch --num-processes 4 -m ddpm_hf sample runs/photos/model --num-images 50000
      --output photos.parquet          the same images, four at a time

Image i depends on the seed and on i alone, whatever the number of images and of processes. Its bits
are the same at one --batch-size on one kind of device (on a CPU, with one OMP_NUM_THREADS). With
others, sums are rounded in another order: 28x28 digits in 50 steps of eta 0, drawn 1, 7 or 64 at
once by 1 or 2 threads, differed by at most 7e-6 of the range from those drawn 16 at once, and no
pixel of 8 bits differed.
"""
SPACINGS = ("leading", "linspace", "trailing", "quadratic")
CALIBRATED_SPACINGS = ("likelihood", "calibrated")
FORMATS = ("png", "npz", "npy", "parquet")


def parser() -> argparse.ArgumentParser:
    """What `ddpm-hf sample` understands."""
    parser = command_parser("sample", "MODEL [--option VALUE ...]", EXAMPLES)
    add_model(parser)
    _add_what(parser.add_argument_group("what is drawn"))
    _add_how(parser.add_argument_group("how it is drawn"))
    _add_where(parser.add_argument_group("where it goes"))
    add_model_files(parser.add_argument_group("which files of the model"))
    return parser


def _add_what(group: Any) -> None:
    group.add_argument(
        "--num-images",
        type=positive_int,
        default=16,
        metavar="N",
        help="how many images (default: %(default)s)",
    )
    group.add_argument(
        "--class-labels",
        nargs="+",
        metavar="CLASS",
        help="for a class-conditional model: names or numbers of classes, given to the images in "
        "turn (default: every class)",
    )
    group.add_argument(
        "--guidance-scale",
        type=float,
        metavar="S",
        help="classifier-free guidance: above 1, images are more typical of their class and vary "
        "less (default: 1, which is none; 2 with --guide)",
    )
    group.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="guide only where the log of the signal-to-noise ratio is in this range, such as -3 4",
    )
    group.add_argument(
        "--guide",
        type=model_name,
        metavar="MODEL",
        help="guide away from this weaker model, such as an early checkpoint of the same run, in "
        "the place of the null class; works without classes, too",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="image i depends on the seed and on i alone (default: %(default)s)",
    )


def _add_how(group: Any) -> None:
    group.add_argument(
        "--scheduler",
        type=sampler,
        metavar="NAME",
        help=f"in place of the model's own: {NAMES_HELP}",
    )
    group.add_argument(
        "--num-inference-steps",
        type=positive_int,
        metavar="K",
        help="denoising steps: fewer are faster, more are better (default: the scheduler's usual "
        "number; of DDPM: as many as the model was trained with)",
    )
    group.add_argument(
        "--timestep-spacing",
        choices=(*SPACINGS, *CALIBRATED_SPACINGS),
        metavar="NAME",
        help=f"which timesteps those are: {', '.join(SPACINGS)}; or, of a model after `ddpm-hf "
        "calibrate`, likelihood, or calibrated for DDIM (default: the model's)",
    )
    group.add_argument(
        "--eta",
        type=float,
        help="noise in each step: 1: DDPM; 0: deterministic DDIM, which needs fewer steps (default:"
        " the scheduler's)",
    )
    group.add_argument(
        "--thorough",
        action="store_true",
        help="all the steps that the model was trained with, by DDPM. Without this and the four "
        "options above, what `ddpm-hf calibrate --sweep` recommends is taken, where there is that",
    )
    group.add_argument(
        "--optimize",
        action="store_true",
        help="first measure what makes the network fast on this device (memory format, bf16, "
        "compiled kernels, number of threads), as far as so many images are worth it; they then "
        "differ by rounding, and a line says how far",
    )
    group.add_argument(
        "--batch-size",
        type=positive_int,
        default=16,
        metavar="N",
        help="images drawn at once, as memory allows (default: %(default)s)",
    )


def _add_where(group: Any) -> None:
    group.add_argument(
        "--output",
        type=path,
        metavar="PATH",
        help="an image file, such as x.png, for one grid of all; x.npz, x.npy or x.parquet; else a "
        "folder for one file each (default: samples.png). But for a grid, PATH.json beside it says "
        "how they were drawn",
    )
    group.add_argument(
        "--format",
        choices=FORMATS,
        help="png; npz: `arr_0` is (N, height, width, channels), 8 or 16 bits as the model was "
        "trained, and `arr_1` the classes; npy: the same pixels as float32 in [0, 1]; parquet: "
        "`image` and `label`, for datasets.load_dataset (default: as --output says)",
    )
    group.add_argument("--overwrite", action="store_true", help="replace images of before")


def output_path(output: Path | None, form: str | None) -> Path:
    """Where the images go, by --output and --format.

    Raises:
        ValueError: if these two do not fit together.
    """
    if output is None:
        return Path(f"samples.{form or 'png'}")
    suffix = output.suffix.lower()
    if form in (None, "png") and suffix.removeprefix(".") not in FORMATS[1:]:
        return output
    if form is None or suffix == f".{form}":
        return output
    if suffix.removeprefix(".") in FORMATS:
        raise ValueError(f"--format {form} does not fit --output {output}; leave one of them out")
    return output.with_name(f"{output.name}.{form}")
