"""`ddpm-hf calibrate`."""

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

from ddpm_hf.commands.messages import command_messages, say
from ddpm_hf.commands.options import (
    add_comparison,
    add_data,
    add_model_and_data,
    add_work,
    command_parser,
    given,
    load_model,
    path,
    positive_int,
)
from ddpm_hf.text import counted, public_name

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
    """Load model and images, measure, and write what was found.

    Raises:
        ValueError, OSError: if something cannot be loaded or measured, or another process has the
            output.
    """
    from ddpm_hf.locks import exclusive_folder
    from ddpm_hf.shared_work import distributed_state

    state = distributed_state()
    with exclusive_folder(state, options.output, "output"):
        measure(options, state)


def measure(options: argparse.Namespace, state: Any) -> None:
    """What `calibrate` does, in a folder that these processes alone have."""
    from ddpm_hf.diffusion.atomic_files import remove_folder
    from ddpm_hf.evaluation.checkpoint_calibration import measure_calibration
    from ddpm_hf.evaluation.dataset_likelihood import BoundOptions
    from ddpm_hf.evaluation.model_images import images_for
    from ddpm_hf.evaluation.training_record import held_out_by_training
    from ddpm_hf.shared_work import on_main_process

    pipeline = load_model(options).to(state.device)
    evaluator = evaluator_of(options) if options.sweep else None
    data = held_out_by_training(
        data_source(options),
        [options.model],
        revision=options.revision,
        use_safetensors=not options.allow_pickle,
        progress=state.is_main_process,
    )
    if evaluator is not None:
        evaluator.data = data
    part = data.measured()
    images = images_for(
        pipeline.unet,
        data.rows(part.split),
        rows=part.rows,
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
    kept: dict[str, Any] = {"dataset": data.facts() | {"image": images.facts.to_config()["image"]}}

    def keep_curve() -> Any:
        """On the main process, before a sweep that may take long."""
        seconds = time.monotonic() - start
        kept.update(curve_of(options, measured, pipeline.unet, images, how, seconds))
        write(options, kept)
        show_curve(options, kept)
        return kept["scheduler"]

    pipeline.scheduler = on_main_process(state, keep_curve)
    if evaluator is not None:
        from ddpm_hf.evaluation.sweep import sweep

        kept["sweep"] = sweep(pipeline, evaluator, options.output / "sweep")
    state.destroy_process_group()
    if not state.is_main_process:  # the main process writes for all
        return
    remove_folder(unfinished)
    show_sweep(kept)
    files = write(options, kept)
    if options.card:
        write_card(Path(options.model), kept)
    print(f"\nin {files[0]}; for the model in {files[1]}")


def data_source(options: argparse.Namespace) -> Any:
    """The data set that the options name."""
    from ddpm_hf.evaluation.sets import DataSource

    return DataSource(
        options.dataset,
        config_name=options.dataset_config,
        revision=options.dataset_revision,
        **given(options, ("split", "reference_split", "image_column", "on_bad_image")),
    )


def evaluator_of(options: argparse.Namespace) -> Any:
    """What measures the settings of the sweep; without its features it fails before the work."""
    from ddpm_hf.evaluation.measurement import EvaluationOptions, Evaluator
    from ddpm_hf.evaluation.sweep import FIGURE

    names = ("features", "seed", "split", "reference_split", "dataset_config", "dataset_revision",
             "image_column", "class_column", "on_bad_image", "batch_size")  # fmt: skip
    how = given(options, names) | {"num_images": options.sweep_images}
    evaluator = Evaluator(options.dataset, [FIGURE], EvaluationOptions(**how))
    _ = evaluator.network
    return evaluator


def curve_of(
    options: argparse.Namespace, measured: Any, unet: Any, images: Any, how: Any, seconds: float
) -> dict[str, Any]:
    """The curve with what follows from it, and the scheduler that has it."""
    from ddpm_hf.evaluation.checkpoint_calibration import described, timesteps_of

    result = described(measured, images, how) | {"seconds": seconds}
    scheduler = measured.scheduler
    if options.timesteps:
        found = timesteps_of(unet, scheduler, images, options.seed)
        result["calibrated_timesteps"] = found
        scheduler = scheduler.from_config(scheduler.config, calibrated_timesteps=found)
    return {"curve": result, "scheduler": scheduler}


def write(options: argparse.Namespace, kept: dict[str, Any]) -> tuple[Path, Path]:
    """The JSON file, and the configuration of the model's scheduler."""
    from ddpm_hf.evaluation.checkpoint_calibration import FILE_NAME, keep_calibration
    from ddpm_hf.evaluation.report import report_of, write_report

    scheduler, results = kept["scheduler"], [kept["curve"]]
    if swept := kept.get("sweep"):
        scheduler = scheduler.from_config(scheduler.config, recommended=swept["recommended"])
        results.append(swept)
    model = {"name": public_name(options.model), "revision": options.revision}
    file = write_report(options.output, report_of(model, kept["dataset"], results), FILE_NAME)
    return file, keep_calibration(scheduler, Path(options.model), options.output)


def show_curve(options: argparse.Namespace, kept: dict[str, Any]) -> None:
    """Print what few steps lose, and draw it."""
    from ddpm_hf.evaluation.checkpoint_calibration import table

    print(f"{table(kept['curve'])}\nmeasured on {images_of(kept)}")
    for remark in kept["curve"]["remarks"]:
        print(f"note: {remark}")
    draw_picture(kept["curve"], options.output)
    if options.timesteps:
        print("timesteps were found for DDIM and DPM-Solver++ 2M; others are not promised")


def images_of(kept: dict[str, Any]) -> str:
    """How many images the curve is of, and which."""
    from ddpm_hf.evaluation.report import held_out

    dataset, images = kept["dataset"], counted(kept["curve"]["num_images"], "image")
    return f"{images} of {dataset['name']}, {dataset['split']}{held_out(dataset)}"


def show_sweep(kept: dict[str, Any]) -> None:
    """Print what was swept, and what is recommended."""
    from ddpm_hf.evaluation.comparison_report import table

    if swept := kept.get("sweep"):
        chosen = swept["recommended"]
        print(f"\n{table(swept)}\n")
        print(f"recommended: {chosen['scheduler']}, K = {chosen['num_inference_steps']:,}")
        for remark in swept["remarks"]:
            print(remark)


def draw_picture(result: dict[str, Any], folder: Path) -> None:
    """What few steps lose; without the picture the result is no worse."""
    try:
        from ddpm_hf.evaluation.plots import plot_calibration

        plot_calibration(result, folder / "calibration.png")
    except ImportError:
        warnings.warn("no picture without matplotlib: pip install 'ddpm-hf[eval]'", stacklevel=2)
    except Exception as error:
        warnings.warn(f"the picture was not drawn: {error}", stacklevel=2)


def write_card(folder: Path, kept: dict[str, Any]) -> None:
    """Show the tables in the model's card; without that the result is no worse."""
    from ddpm_hf.hub.card import write_calibration

    facts = {"rows": kept["curve"]["rows"], "how": f"predicted from {images_of(kept)}"}
    if swept := kept.get("sweep"):
        facts["sweep"] = {k: v for k, v in swept.items() if k not in ("options", "left_out")}
    try:
        print(f"in {write_calibration(folder, facts)}")
    except (ValueError, OSError) as error:
        warnings.warn(f"the card was not written: {error}", stacklevel=2)
