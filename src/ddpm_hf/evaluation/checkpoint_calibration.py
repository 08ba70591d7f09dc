"""`calibrate_checkpoint`: error curve of a checkpoint, kept in its scheduler configuration.

`ddpm_hf.calibrate` measures a network on images in memory; this measures a checkpoint on a
dataset, in shards that all ranks share, and writes the results.
"""

import json
import os
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from diffusers import UNet2DModel

from ddpm_hf.calibration import Calibration, calibration_of, with_curve, without_curve
from ddpm_hf.diffusion.atomic_files import read_json, remove_folder, write_text
from ddpm_hf.diffusion.checkpoint_limits import component_folder
from ddpm_hf.diffusion.conditioning import denoiser_of
from ddpm_hf.diffusion.config_extension import extension_of, with_extension
from ddpm_hf.diffusion.scheduler_interface import num_outputs
from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler
from ddpm_hf.evaluation.calibration_results import (
    CheckpointCalibration,
    StepsRow,
    Timesteps,
    calibration_curve,
    predicted_steps,
)
from ddpm_hf.evaluation.data_source import DataSource
from ddpm_hf.evaluation.dataset_likelihood import BoundMeasurement, BoundOptions
from ddpm_hf.evaluation.evaluate import Evaluator
from ddpm_hf.evaluation.figures import ImageFormat, ModelSourceFacts
from ddpm_hf.evaluation.model_images import EvaluationImages
from ddpm_hf.evaluation.recorded_hold_out import as_in_training
from ddpm_hf.evaluation.result_files import CALIBRATION_FILE, results_folder, write_result
from ddpm_hf.evaluation.result_pictures import save_calibration_plot
from ddpm_hf.evaluation.results import utc_now
from ddpm_hf.evaluation.sweep import FIGURE, sweep
from ddpm_hf.evaluation_options import CalibrationOptions
from ddpm_hf.hub.card import write_calibration
from ddpm_hf.hub.load import load
from ddpm_hf.likelihood import BitsPerDim
from ddpm_hf.model_options import LoadOptions
from ddpm_hf.options import takes_options
from ddpm_hf.paths import model_of_run, run_of_checkpoint
from ddpm_hf.randomness import seed_of
from ddpm_hf.trajectory_timesteps import SAMPLERS, trajectory_matching_timesteps
from ddpm_hf.utils.shared_work import distributed_state, on_main_process
from ddpm_hf.utils.text import public_name

NUM_IMAGES = 256
NUM_TRAJECTORIES = 32  # of the search for timesteps


@takes_options(CalibrationOptions)
def calibrate_checkpoint(
    model: str | os.PathLike[str],
    dataset: Any,
    *,
    output: str | os.PathLike[str] = "calibration",
    progress: bool = True,
    **options: Any,
) -> CheckpointCalibration:
    """Measure the error of a checkpoint at every timestep, and write it into its configuration.

    From the curve follow bits/dim of any number of steps and the variances that lose the least. The
    weights do not change. Call it on all ranks of `accelerate launch`; an interrupted calibration
    resumes with the same `output`.

    Args:
        model: name or folder. A folder gets the curve in its scheduler_config.json; that of a run
            stands for its model.
        dataset: held-out images; see `evaluate`.
        output: folder for calibration.json and the plot; for a model on the Hub, also for its
            scheduler_config.json.
        progress: show progress bars.
        **options: see `evaluation_options.CalibrationOptions`.
    Returns:
        the calibration, on every rank.
    Raises:
        ValueError, OSError: if something cannot be loaded or measured, or another process uses
            `output`.
        TypeError: for an unknown option.
    """
    chosen, name = CalibrationOptions(**options), os.fspath(model)
    if Path(name).is_dir():
        name = str(model_of_run(Path(name)))
    if run_of_checkpoint(Path(name)):
        raise ValueError(
            f"{name} is a training checkpoint, which must not be changed: calibrate the model of"
            " the run"
        )
    if chosen.card and not Path(name).is_dir():
        raise ValueError(
            f"`card` needs the folder of a model, got {name!r}: calibrate a local copy, then"
            " `ddpm-hf push` it"
        )
    state = distributed_state()
    progress = progress and state.is_main_process
    with results_folder(state, output) as folder:
        return _calibrate(name, dataset, chosen, folder, state, progress)


def _calibrate(
    model: str,
    dataset: Any,
    options: CalibrationOptions,
    folder: Path,
    state: PartialState,
    progress: bool,
) -> CheckpointCalibration:
    pipeline = load(model, **options.keywords(LoadOptions)).to(state.device)
    data = as_in_training(DataSource(dataset, options), [model], options, progress=progress)
    evaluator = None
    if options.sweep:
        evaluator = Evaluator(data, [FIGURE], options.sweep_options(), progress=progress)
        _ = evaluator.network  # fails before the work, if at all
    images = data.likelihood_images(pipeline.unet, default=NUM_IMAGES, progress=progress)
    how = BoundOptions(seed=options.seed, batch_size=options.batch_size)
    unfinished, start = folder / ".unfinished-calibration", time.monotonic()
    measurement = BoundMeasurement(pipeline.unet, pipeline.scheduler, images, how)
    measured = measure_calibration(measurement, unfinished, state, progress=progress)

    def write_curve() -> tuple[CheckpointCalibration, GaussianDDPMScheduler]:
        """Write the curve before a sweep, which can take long."""
        if measured is None:
            raise RuntimeError("only the main process has the measurement")
        seconds, scheduler = time.monotonic() - start, measured.scheduler
        curve = calibration_curve(measured, images.indices, options.seed, seconds)
        if options.timesteps:
            timesteps = search_timesteps(pipeline.unet, scheduler, images, options.seed)
            curve = replace(curve, calibrated_timesteps=timesteps)
            scheduler = scheduler.from_config(scheduler.config, calibrated_timesteps=timesteps)
        result = CheckpointCalibration(
            model=ModelSourceFacts(name=public_name(model), revision=options.revision),
            dataset=replace(data.facts(), image=ImageFormat.of(images.facts)),
            results=(curve,),
        )
        save_calibration_plot(curve, folder)
        return _written(result, scheduler, model, folder), scheduler

    result, scheduler = on_main_process(state, write_curve)
    if evaluator is not None:
        pipeline.scheduler = scheduler
        swept = sweep(pipeline, evaluator, folder / "sweep")
        scheduler = scheduler.from_config(scheduler.config, recommended=swept.recommended.to_dict())
        result = replace(result, results=(result.curve, swept), created=utc_now())
        result = on_main_process(state, lambda: _written(result, scheduler, model, folder))
    return on_main_process(state, lambda: _finish(result, model, unfinished, options.card))


def measure_calibration(
    measurement: BoundMeasurement, folder: Path, state: PartialState, *, progress: bool = True
) -> Calibration | None:
    """Measure the error at every timestep.

    The result does not depend on the number of ranks, or on interruptions.

    Args:
        measurement: of the whole chain; the curve of its scheduler is ignored.
        folder: holds unfinished shards.
        state: the ranks, which share the work.
        progress: show progress bars.
    Returns:
        the calibration on the main rank, None on others.
    """
    scheduler = without_curve(GaussianDDPMScheduler.from_config(measurement.scheduler.config))

    def measure(**changes: Any) -> BitsPerDim | None:
        changed = replace(measurement, **changes)
        timed = changed.bound(folder / changed.key[:16], state, progress=progress)
        return None if timed is None else timed[0]

    chain = measure(scheduler=scheduler)
    shared: list[Any] = [with_curve(scheduler, chain) if chain else None]
    broadcast_object_list(shared)  # the variance of the decoder depends on all images
    end = measure(scheduler=shared[0], options=replace(measurement.options, timesteps=(0,)))
    if chain is None or end is None:
        return None
    return calibration_of(scheduler, chain, end)


def search_timesteps(
    unet: UNet2DModel, scheduler: GaussianDDPMScheduler, images: EvaluationImages, seed: int
) -> Timesteps:
    """Search timesteps for each sampler and number of steps, on noise with the classes in turn."""
    seeds = [seed_of(seed, "timesteps", i) for i in range(NUM_TRAJECTORIES)]
    shape, generators = images.images.shape, [torch.Generator().manual_seed(s) for s in seeds]
    noise = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(unet.device)
    labels = None
    if images.labels is not None:
        classes = sorted({*images.labels.tolist()})
        in_turn = [classes[i % len(classes)] for i in range(NUM_TRAJECTORIES)]
        labels = torch.tensor(in_turn, device=unet.device)
    T, channels = len(scheduler), num_outputs(unet.config, scheduler)
    return {
        sampler: trajectory_matching_timesteps(
            denoiser_of(unet, labels, channels),
            scheduler,
            noise,
            sampler=sampler,
            max_num_steps=min(25, T),
            num_fine_steps=min(100, T),
        )
        for sampler in SAMPLERS
    }


def _written(
    result: CheckpointCalibration, scheduler: GaussianDDPMScheduler, model: str, folder: Path
) -> CheckpointCalibration:
    file = write_result(folder, result, CALIBRATION_FILE)
    config = write_scheduler_config(scheduler, Path(model), folder)
    return replace(result, file=file, scheduler_config=config)


def _finish(
    result: CheckpointCalibration, model: str, unfinished: Path, has_card: bool
) -> CheckpointCalibration:
    """Remove the shards, and write the card; an error of the card becomes a warning."""
    remove_folder(unfinished)
    if not has_card:
        return result
    steps, how = result.curve.steps, f"predicted from {result.image_source}"
    try:
        return replace(result, card=write_calibration(model, steps, how, result.sweep))
    except (ValueError, OSError) as error:
        warnings.warn(f"the card was not written: {error}", stacklevel=2)
        return result


def save_calibration(calibration: Calibration, model: Path, how: str) -> tuple[StepsRow, ...]:
    """Write a calibration into the scheduler configuration and the card of a checkpoint.

    Args:
        calibration: of the checkpoint.
        model: its folder.
        how: description of the images, for the card.
    Returns:
        predicted bits/dim of K steps.
    """
    write_scheduler_config(calibration.scheduler, model, model)
    rows = predicted_steps(calibration)
    write_calibration(model, rows, how)
    return rows


def write_scheduler_config(scheduler: GaussianDDPMScheduler, model: Path, output: Path) -> Path:
    """Write the curve into scheduler_config.json; other keys stay unchanged.

    Args:
        scheduler: with the curve.
        model: folder of the model; if it is not one, the full configuration goes to `output`.
        output: a folder.
    Returns:
        the path of the configuration.
    """
    if not model.is_dir():
        path = output / "scheduler_config.json"
        write_text(path, scheduler.to_json_string())
        return path
    path = component_folder(model, "scheduler") / "scheduler_config.json"
    config = with_extension(read_json(path), extension_of(scheduler.config))
    write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return path
