"""`ddpm-hf calibrate`."""

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

from ddpm_hf.commands.messages import flags_in_messages, say
from ddpm_hf.commands.options import (
    add_data,
    add_model_and_data,
    add_work,
    command_parser,
    load_model,
    path,
)
from ddpm_hf.names import public_name
from ddpm_hf.wording import counted

NUM_IMAGES = 256
HELP = "measure once what a model loses in few steps, and the best variances for them"
EXAMPLES = """
measure once what a model loses in few steps, and the best variances for them

  ddpm-hf calibrate runs/photos/model ./photos --num-images 256
  ddpm-hf calibrate runs/photos/model ./photos --timesteps      for DDIM and DPM-Solver++, too
  ddpm-hf sample runs/photos/model --num-inference-steps 50     samples with these variances
  ddpm-hf evaluate runs/photos/model ./photos --num-inference-steps 25
  accelerate launch --num-processes 4 -m ddpm_hf calibrate runs/photos/model ./photos

Why so many steps? One pass over every timestep measures how far the network's estimate of the
image is off. From that follow bits/dim of any number of steps, and the variances with which few
steps lose the least; they are kept in the model's scheduler_config.json, where diffusers' own
scheduler does not mind them. No weight changes. What is interrupted goes on by the same command.
"""


def run(argv: list[str]) -> int:
    """Calibrate as `argv` says."""
    options = parser().parse_args(argv)
    with flags_in_messages(vars(options)):
        if options.card and not Path(options.model).is_dir():
            raise ValueError(
                f"card is for the folder of a model, and {options.model!r} is none: calibrate your"
                " copy of it, then `ddpm-hf push` it"
            )
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
        "--card", action="store_true", help="show the table in the card of the model's folder"
    )
    add_work(group)
    return parser


def calibrate(options: argparse.Namespace) -> None:
    """Load model and images, measure, and write what was found.

    Raises:
        ValueError, OSError: if something cannot be loaded or measured.
    """
    from ddpm_hf.diffusion.files import remove_folder
    from ddpm_hf.evaluation.calibration import (
        FILE_NAME,
        described,
        keep_calibration,
        measure_calibration,
        table,
        timesteps_of,
    )
    from ddpm_hf.evaluation.images import images_for
    from ddpm_hf.evaluation.likelihood import BoundOptions
    from ddpm_hf.evaluation.report import report_of, write_report
    from ddpm_hf.evaluation.sets import DataSource
    from ddpm_hf.parts import join_processes

    options.output.mkdir(parents=True, exist_ok=True)  # fails before the work, if at all
    state = join_processes()
    pipeline = load_model(options).to(state.device)
    data = DataSource(
        options.dataset,
        options.split,
        config_name=options.dataset_config,
        revision=options.dataset_revision,
    )
    images = images_for(
        pipeline.unet,
        data.rows(data.measured_split()),
        num_images=options.num_images,
        at_most=NUM_IMAGES,
        seed=options.seed,
        image_column=options.image_column,
        label_column=options.class_column or True,
        on_bad_image=options.on_bad_image,
        progress=state.is_main_process,
    )
    how = BoundOptions(seed=options.seed, batch_size=options.batch_size)
    unfinished = options.output / ".unfinished-calibration"
    start = time.monotonic()
    measured = measure_calibration(
        pipeline.unet, pipeline.scheduler, images, how, unfinished, state
    )
    state.destroy_process_group()
    if measured is None:  # the main process writes for all
        return
    result = described(measured, images, how) | {"seconds": time.monotonic() - start}
    scheduler = measured.scheduler
    if options.timesteps:
        found = timesteps_of(pipeline.unet, scheduler, images, options.seed)
        result["calibrated_timesteps"] = found
        scheduler = scheduler.from_config(scheduler.config, calibrated_timesteps=found)
    dataset = data.facts() | {"image": images.facts.to_config()["image"]}
    model = {"name": public_name(options.model), "revision": options.revision}
    file = write_report(options.output, report_of(model, dataset, [result]), FILE_NAME)
    kept = keep_calibration(scheduler, Path(options.model), options.output)
    remove_folder(unfinished)
    print(table(result))
    for remark in result["remarks"]:
        print(f"note: {remark}")
    draw_picture(result, options.output)
    if options.card:
        write_card(Path(options.model), result, dataset)
    if options.timesteps:
        print("timesteps were found for DDIM and DPM-Solver++ 2M; others are not promised")
    print(f"\nin {file}; for the model in {kept}")


def draw_picture(result: dict[str, Any], folder: Path) -> None:
    """What few steps lose; without the picture the result is no worse."""
    try:
        from ddpm_hf.evaluation.plots import plot_calibration

        plot_calibration(result, folder / "calibration.png")
    except ImportError:
        warnings.warn("no picture without matplotlib: pip install 'ddpm-hf[eval]'", stacklevel=2)
    except Exception as error:
        warnings.warn(f"the picture was not drawn: {error}", stacklevel=2)


def write_card(folder: Path, result: dict[str, Any], dataset: dict[str, Any]) -> None:
    """Show the table in the model's card; without that the result is no worse."""
    from ddpm_hf.hub.card import write_calibration

    images = counted(result["num_images"], "image")
    how = f"predicted from {images} of {dataset['name']}, {dataset['split']}"
    try:
        print(f"in {write_calibration(folder, {'rows': result['rows'], 'how': how})}")
    except (ValueError, OSError) as error:
        warnings.warn(f"the card was not written: {error}", stacklevel=2)
