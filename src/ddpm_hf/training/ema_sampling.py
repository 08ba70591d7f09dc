"""Sampling from the EMA weights of a run, shared by all ranks."""

import copy
from typing import Any

from torch import Tensor

from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline
from ddpm_hf.pictures import Pixels
from ddpm_hf.sampling import draw_images
from ddpm_hf.training.run import Run

_MAX_CLASSES_DRAWN = 64  # rows of a grid that can be looked through


def draw_share(run: Run, num_images: int, class_labels: list[int] | None) -> list[Pixels]:
    """This rank's share of `num_images` samples, in `sample_inference_steps` steps of DDIM (eta 0).

    Concatenated by rank, the shares have at least `num_images`. After a stop signal sampling ends
    early, with unfinished images.

    Args:
        run: its seed determines the images.
        num_images: number of images over all ranks.
        class_labels: assigned to the images cyclically.
    """
    config, count = run.config, -(-num_images // run.accelerator.num_processes)

    def interrupt_if_stopped(
        pipeline: Any, i: int, t: Any, tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        pipeline._interrupt = run.stop.received is not None
        return tensors

    with run.state.ema_weights() as unet:
        # A copy: `set_timesteps` changes the scheduler that training uses.
        scheduler = copy.deepcopy(run.components.scheduler)
        return draw_images(
            GaussianDDPMPipeline(unet=unet, scheduler=scheduler),
            count,
            first=run.accelerator.process_index * count,
            class_labels=class_labels,
            batch_size=run.micro_batch_size,
            seed=config.seed,
            progress=run.accelerator.is_main_process,
            num_inference_steps=min(config.sample_inference_steps, len(scheduler)),
            eta=0.0,
            callback_on_step_end=interrupt_if_stopped,
        )


def grid_of(run: Run) -> tuple[int, list[int] | None]:
    """Number of images in a sample grid, and the class of each; None without classes.

    A grid has equally many images of each class, at least one.
    """
    classes, count = run.components.facts.trained_classes, run.config.num_samples
    if not classes or count == 0:
        return count, None
    each = max(1, count // len(classes))
    labels = [label for label in classes[:_MAX_CLASSES_DRAWN] for _ in range(each)]
    return len(labels), labels
