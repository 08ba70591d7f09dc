"""`ddpm-hf calibrate`."""

import argparse
from pathlib import Path

from ddpm_hf.commands.messages import command_messages, say
from ddpm_hf.commands.options import (
    add_comparison,
    add_data,
    add_model_and_data,
    add_work,
    command_parser,
    given,
    path,
    positive_int,
)

NUM_IMAGES = 256
# Without it they would do nothing.
OF_THE_SWEEP = ("sweep_images", "features", "reference_split")
HELP = "measure once what a model loses in few steps, and the best variances for them"
EXAMPLES = """
measure once what a model loses in few steps, and the best variances for them

  ddpm-hf calibrate runs/photos/model ./photos --num-images 256
  ddpm-hf calibrate runs/photos/model ./photos --timesteps      for DDIM and DPM-Solver++, too
  ddpm-hf calibrate runs/photos/model ./photos --sweep --sweep-images 4000
                                             which sampler in how many steps is as good as all
  ddpm-hf sample runs/photos/model --num-inference-steps 50     samples with these variances
  ddpm-hf evaluate runs/photos/model ./photos --num-inference-steps 25
  accelerate launch --num-processes 4 -m ddpm_hf calibrate runs/photos/model ./photos

Why so many steps? One pass over every timestep measures how far the network's estimate of the
image is off. From that follow bits/dim of any number of steps, and the variances with which few
steps lose the least; they are kept in the model's scheduler_config.json, where diffusers' own
scheduler does not mind them. No weight changes. What is interrupted goes on by the same command.

--sweep draws images by seven samplers in 5 to 100 steps, and measures the Frechet distance of each
to real ones. The cheapest that is the best or too close to it to tell is kept in the model, too:
`ddpm-hf sample` then takes it, and says so. The choice is as sure as the number of images makes it.
"""


def run(argv: list[str]) -> int:
    """Calibrate as `argv` says."""
    options = parser().parse_args(argv)
    with command_messages(None):
        if options.card and not Path(options.model).is_dir():
            raise ValueError(
                f"card is for the folder of a model, and {options.model!r} is none: calibrate your"
                " copy of it, then `ddpm-hf push` it"
            )
        if not options.sweep and (useless := [*given(options, OF_THE_SWEEP)]):
            raise ValueError(f"--{useless[0].replace('_', '-')} needs --sweep")
        try:
            calibrate(options)
        except KeyboardInterrupt:
            say("ddpm-hf: what is measured so far is kept; the same command goes on")
            raise
    return 0


def parser() -> argparse.ArgumentParser:
    """What `ddpm-hf calibrate` understands."""
    parser = command_parser("calibrate", "MODEL DATASET [--option VALUE ...]", EXAMPLES)
    add_model_and_data(parser)
    add_data(parser.add_argument_group("which images"), f"{NUM_IMAGES}, or all if fewer")
    group = parser.add_argument_group("where it goes, and how")
    group.add_argument(
        "--output",
        type=path,
        default=Path("calibration"),
        metavar="FOLDER",
        help="folder for calibration.json and the picture; for a model of the Hub, also for its"
        " scheduler_config.json (default: %(default)s)",
    )
    group.add_argument(
        "--timesteps",
        action="store_true",
        help="also find the timesteps for DDIM and DPM-Solver++ 2M in 5 to 25 steps, against 100"
        " steps of the same network: some 4,000 calls of 32 images",
    )
    group.add_argument(
        "--card", action="store_true", help="show the tables in the card of the model's folder"
    )
    add_work(group)
    group = parser.add_argument_group("the sweep")
    group.add_argument(
        "--sweep",
        action="store_true",
        help="also find the sampler and the number of steps that `ddpm-hf sample` shall take",
    )
    group.add_argument(
        "--sweep-images",
        type=positive_int,
        metavar="N",
        help="images drawn of each setting; fewer than the features have dimensions tell apart "
        "little, and too few steps look enough (default: as many as they are compared with, at "
        "most 10,000)",
    )
    add_comparison(group)
    return parser


def calibrate(options: argparse.Namespace) -> None:
    """Calibrate the model, and print what was measured.

    Raises:
        ValueError, OSError: see `calibrate_checkpoint`.
    """
    from ddpm_hf.evaluation.checkpoint_calibration import calibrate_checkpoint
    from ddpm_hf.shared_work import distributed_state

    names = ("features", "num_images", "seed", "split", "reference_split", "dataset_config",
             "dataset_revision", "image_column", "class_column", "on_bad_image", "batch_size",
             "revision", "variant", "timesteps", "sweep", "sweep_images", "card")  # fmt: skip
    calibration = calibrate_checkpoint(
        options.model,
        options.dataset,
        output=options.output,
        use_safetensors=not options.allow_pickle,
        **given(options, names),
    )
    is_main = distributed_state().is_main_process
    distributed_state().destroy_process_group()
    if is_main:
        print(calibration)
        if calibration.card is not None:
            print(f"in {calibration.card}")
        print(f"\nin {calibration.file}; for the model in {calibration.scheduler_config}")
