"""Calibration of the model at the end of a run: what `ddpm-hf calibrate` does."""

from typing import Any

import torch
from accelerate import PartialState

from ddpm_hf.diffusion.atomic_files import read_json, remove_folder
from ddpm_hf.diffusion.config_extension import extension_of
from ddpm_hf.diffusion.pipeline import evaluating
from ddpm_hf.evaluation.checkpoint_calibration import keep_calibration, measure_calibration, rows_of
from ddpm_hf.evaluation.dataset_likelihood import BoundOptions
from ddpm_hf.evaluation.model_images import EvaluationImages
from ddpm_hf.hub.card import write_calibration
from ddpm_hf.text import counted
from ddpm_hf.training.run import Run

MAX_IMAGES = 64


def is_calibrated(run: Run) -> bool:
    """Whether the model of the run has its curve already."""
    config = read_json(run.paths.model.root / "scheduler" / "scheduler_config.json")
    return "x_0_mse" in extension_of(config)


def calibrate_model(run: Run) -> None:
    """Measure the averaged weights, and put the curve into the exported model and its card.

    All processes share the work; what is interrupted is gone on with by the same run.
    """
    images, folder = _images(run), run.paths.root / ".unfinished-calibration"
    options = BoundOptions(seed=run.config.seed, batch_size=len(run.batches.rows(0)))
    with run.state.ema_weights() as unet, evaluating(unet):
        measured = measure_calibration(
            unet, run.components.scheduler, images, options, folder, PartialState()
        )
    if measured is None:  # the main process writes for all
        return
    model = run.paths.model.root
    keep_calibration(measured.scheduler, model, model)
    how = f"predicted from {_described(run)}"
    write_calibration(model, {"rows": rows_of(measured), "how": how})
    remove_folder(folder)


def describe_calibration(run: Run) -> str:
    """What is measured in the end, and what that costs beside the updates."""
    config = run.config
    calls = min(MAX_IMAGES, len(_source(run))) * (len(run.components.scheduler) + 1)
    # An update calls the network forwards and backwards: about three times a call alone.
    cost = calls / (3 * config.max_train_steps * config.batch_size)
    return (
        f"calibrate  {_described(run)}, {len(run.components.scheduler) + 1:,} network calls each, "
        f"in the end: about {cost:.0%} of the time on top"
    )


def _source(run: Run) -> Any:
    return run.components.held_out or run.components.images


def _described(run: Run) -> str:
    kind = "held-out" if run.components.held_out else "training"
    return counted(min(MAX_IMAGES, len(_source(run))), f"{kind} image")


def _images(run: Run) -> EvaluationImages:
    """Some, evenly spread; an image without a class counts as of the null class."""
    source, count = _source(run), min(MAX_IMAGES, len(_source(run)))
    indices = [i * len(source) // count for i in range(count)]
    labels = None if source.labels is None else torch.as_tensor(source.labels)
    if labels is not None:
        config: Any = run.state.unet.config
        labels = torch.where(labels < 0, config.num_class_embeds - 1, labels)
    return EvaluationImages(source, indices, labels, run.components.facts)
