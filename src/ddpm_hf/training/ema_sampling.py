"""Images from the averaged weights of a run, drawn by all processes."""

import copy
from typing import Any

from torch import Tensor

from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline
from ddpm_hf.pictures import Pixels
from ddpm_hf.sampling import draw_images
from ddpm_hf.training.run import Run


def draw_share(run: Run, num_images: int, class_labels: list[int] | None) -> list[Pixels]:
    """This process's images of `num_images` in the order of the processes, or some more.

    By deterministic DDIM in `sample_inference_steps`. What comes of it after a signal to stop is
    not fit for use.

    Args:
        run: its seed decides the images.
        num_images: of all processes.
        class_labels: given to the images in turn.
    """
    config, count = run.config, -(-num_images // run.accelerator.num_processes)

    def interrupt_if_stopped(
        pipeline: Any, i: int, t: Any, tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        pipeline._interrupt = run.stop.received is not None
        return tensors

    with run.state.ema_weights() as unet:
        # A copy: sampling with fewer steps changes what "previous step" means.
        scheduler = copy.deepcopy(run.components.scheduler)
        return draw_images(
            GaussianDDPMPipeline(unet=unet, scheduler=scheduler),
            count,
            first=run.accelerator.process_index * count,
            class_labels=class_labels,
            # What training fits into memory, drawing does.
            batch_size=len(run.batches.rows(0)),
            seed=config.seed,
            progress=run.accelerator.is_main_process,
            num_inference_steps=min(config.sample_inference_steps, len(scheduler)),
            eta=0.0,
            callback_on_step_end=interrupt_if_stopped,
        )
