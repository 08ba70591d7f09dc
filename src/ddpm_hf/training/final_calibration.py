"""Calibration of the exported model at the end of a run, as `ddpm-hf calibrate` does."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState

from ddpm_hf.diffusion.atomic_files import read_json, remove_folder
from ddpm_hf.diffusion.config_extension import extension_of
from ddpm_hf.diffusion.eval_mode import evaluating
from ddpm_hf.evaluation.checkpoint_calibration import measure_calibration, save_calibration
from ddpm_hf.evaluation.dataset_likelihood import BoundMeasurement, BoundOptions
from ddpm_hf.evaluation.model_images import EvaluationImages
from ddpm_hf.training.dataset_setup import RunImages, in_few_shards
from ddpm_hf.training.run import Run
from ddpm_hf.training.signals import StopSignal
from ddpm_hf.utils.text import counted

MAX_IMAGES = 64


def is_calibrated(run: Run) -> bool:
    """Whether the exported model has a calibration."""
    config = read_json(run.paths.model.root / "scheduler" / "scheduler_config.json")
    return "x_0_mse" in extension_of(config)


def calibrate_model(run: Run) -> None:
    """Calibrate the EMA weights, and write the result to the exported model and its card.

    The ranks share the work. A stop signal ends it at the next network call; it continues when the
    run is resumed.
    """
    images, folder = _calibration_images(run), run.paths.root / ".unfinished-calibration"
    options = BoundOptions(seed=run.config.seed, batch_size=run.micro_batch_size)
    try:
        with run.state.ema_weights() as unet, evaluating(unet), _interruptible(unet, run.stop):
            measurement = BoundMeasurement(unet, run.components.scheduler, images, options)
            measured = measure_calibration(measurement, folder, PartialState())
    except InterruptedError:  # on all ranks
        return
    if measured is None:  # only the main process writes
        return
    save_calibration(measured, run.paths.model.root, f"predicted from {_describe_images(run)}")
    remove_folder(folder)


@contextmanager
def _interruptible(unet: torch.nn.Module, stop: StopSignal) -> Iterator[None]:
    """Raise InterruptedError at the first call of `unet` after a stop signal."""

    def check(*_: object) -> None:
        if stop.received is not None:
            raise InterruptedError("the run was asked to stop")

    hook = unet.register_forward_pre_hook(check)
    try:
        yield
    finally:
        hook.remove()


def describe_calibration(run: Run) -> str:
    """A line of the plan: what is measured at the end, and its cost relative to training."""
    num_calls = len(run.components.scheduler) + 1
    return (
        f"calibrate  {_describe_images(run)}, {num_calls:,} network calls each, at the end: adds "
        f"about {calibration_cost(run):.0%} of the time"
    )


def calibration_cost(run: Run) -> float:
    """Time of the calibration relative to that of the updates."""
    num_calls = len(run.components.scheduler) + 1
    num_images = min(MAX_IMAGES, len(_source(run)))
    return run.relative_cost(num_images * num_calls, run.config.max_train_steps)


def _source(run: Run) -> RunImages:
    return in_few_shards(run.components.held_out or run.components.images, MAX_IMAGES)


def _describe_images(run: Run) -> str:
    kind = "held-out" if run.components.held_out else "training"
    return counted(min(MAX_IMAGES, len(_source(run))), f"{kind} image")


def _calibration_images(run: Run) -> EvaluationImages:
    """At most `MAX_IMAGES` images, evenly spread; unlabelled images get the null class."""
    source, count = _source(run), min(MAX_IMAGES, len(_source(run)))
    indices = [i * len(source) // count for i in range(count)]
    labels = None if source.labels is None else torch.as_tensor(source.labels)
    if labels is not None:
        config: Any = run.state.unet.config
        labels = torch.where(labels < 0, config.num_class_embeds - 1, labels)
    return EvaluationImages(source, indices, labels, run.components.facts)
