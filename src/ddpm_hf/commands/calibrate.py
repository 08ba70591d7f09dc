"""`ddpm-hf calibrate`."""

from dataclasses import dataclass
from pathlib import Path

from ddpm_hf.commands.messages import command_options, resume_hint
from ddpm_hf.evaluation_options import DATASET_HELP, CalibrationOptions
from ddpm_hf.model_options import ModelArgument
from ddpm_hf.options import REQUIRED, for_user, option
from ddpm_hf.paths import output_folder
from ddpm_hf.utils.connection import check_dataset

HELP = "measure what a model loses in few steps, and the best variances for them"
DESCRIPTION = """
measure what a model loses in few steps, and the best variances for them

  ddpm-hf calibrate runs/photos/model ./photos --num-images 256
  ddpm-hf calibrate runs/photos/model ./photos --timesteps      also for DDIM and DPM-Solver++
  ddpm-hf calibrate runs/photos/model ./photos --sweep --sweep-images 4000
                                             the cheapest sampler that is as good as all steps
  ddpm-hf sample runs/photos/model --num-inference-steps 50     samples with these variances
  ddpm-hf evaluate runs/photos/model ./photos --num-inference-steps 25
  accelerate launch --num-processes 4 -m ddpm_hf calibrate runs/photos/model ./photos

One pass over all timesteps measures the mean squared error of the network's estimate of x_0. It
determines bits/dim for any number of steps, and the variances with which few steps lose the least.
The result is stored in the model's scheduler_config.json; the schedulers of diffusers ignore it.
The weights do not change. Repeat an interrupted command to resume it.

--sweep draws images with seven samplers in 5 to 100 steps and measures their Frechet distance to
real images. The cheapest setting that is the best, or not distinguishable from the best, is stored
in the model, too: `ddpm-hf sample` uses it by default and prints it. More images make the choice
more certain.
"""


@dataclass(frozen=True, kw_only=True)
class CalibrateCommand(CalibrationOptions, ModelArgument):
    """Options of `ddpm-hf calibrate`."""

    dataset: str = option(
        REQUIRED,
        DATASET_HELP,
        metavar="DATASET",
        is_path=True,
        is_positional=True,
    )
    output: Path = option(
        Path("calibration"),
        "folder for calibration.json and the plot; for a model on the Hub, also for its"
        " scheduler_config.json",
        metavar="FOLDER",
        is_path=True,
        convert=output_folder,
    )


def run(argv: list[str]) -> int:
    """Calibrate a model."""
    usage = "MODEL DATASET [--option VALUE ...]"
    with command_options(CalibrateCommand, argv, "calibrate", usage, DESCRIPTION) as options:
        from ddpm_hf.commands.model_checks import check_model, downloaded_models

        check_model(options.model)
        check_dataset(options.dataset)
        models = [] if options.card else [options.model]  # `card` needs a local model
        with downloaded_models(models, options), resume_hint("measurements"):
            calibrate(options)
    return 0


def calibrate(options: CalibrateCommand) -> None:
    """Calibrate the model and print the result.

    Raises:
        ValueError, OSError: see `calibrate_checkpoint`.
    """
    from ddpm_hf.evaluation.checkpoint_calibration import calibrate_checkpoint
    from ddpm_hf.utils.shared_work import leave_process_group

    calibration = calibrate_checkpoint(
        options.model,
        options.dataset,
        output=options.output,
        **options.keywords(CalibrationOptions),
    )
    if leave_process_group():
        print(for_user(f"{calibration}"))
        if calibration.card is not None:
            print(f"in {calibration.card}")
        print(f"\nin {calibration.file}; for the model in {calibration.scheduler_config}")
