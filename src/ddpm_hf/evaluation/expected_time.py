"""Expected time of evaluations, stated before the work, from one timed call of the network."""

import copy
import sys
import time
import warnings
from typing import Any

import torch
from tqdm.auto import tqdm

from ddpm_hf.diffusion.eval_mode import evaluating
from ddpm_hf.diffusion.scheduler_interface import set_timesteps
from ddpm_hf.diffusion.timestep_spacings import usual_num_steps
from ddpm_hf.sampling.sampler_choice import sampled_by
from ddpm_hf.scheduler_spec import SchedulerSpec
from ddpm_hf.utils.text import duration

# Fewer batches take too little time to be announced.
_FEW_CALLS = 20


def num_steps_and_calls(
    pipeline: Any, scheduler: str | None, num_inference_steps: int | None
) -> tuple[int, int]:
    """Number of steps K of a sampler, and the number of network calls per image.

    Args:
        pipeline: the model.
        scheduler: name of a scheduler; None for the model's own.
        num_inference_steps: K; None for the usual number of the scheduler.
    Raises:
        ValueError: if the scheduler does not support K steps.
    """
    sampler = SchedulerSpec.parse(scheduler) if scheduler else SchedulerSpec()
    with sampled_by(pipeline, sampler):
        chosen = copy.deepcopy(pipeline.scheduler)
    kind, T = type(chosen).__name__, chosen.config.num_train_timesteps
    K = num_inference_steps or usual_num_steps(kind, T)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the measurement warns again
        set_timesteps(chosen, K, None)
    return K, len(chosen.timesteps)


def announce_time(unet: Any, num_batches: int, batch_size: int, work: str) -> None:
    """Print the expected time of network calls; nothing for few calls.

    Args:
        unet: network of the model.
        num_batches: number of calls per process.
        batch_size: images per call.
        work: what is measured.
    """
    if unet.config.class_embed_type is not None:  # its labels are of any kind
        return
    if num_batches < _FEW_CALLS:
        return
    seconds = num_batches * _seconds_per_call(unet, batch_size)
    text = f"about {duration(seconds)}: {work}, {num_batches:,} network calls"
    tqdm.write(text, file=sys.stderr)


def _seconds_per_call(unet: Any, batch_size: int) -> float:
    """Seconds of one network call, after a first one that warms up."""
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    shape = (batch_size, unet.config.in_channels, height, width)
    x_t = torch.zeros(shape, device=unet.device, dtype=unet.dtype)
    t = torch.zeros(batch_size, dtype=torch.long, device=unet.device)
    seconds = 0.0
    with torch.no_grad(), evaluating(unet):
        for _ in range(2):
            start = time.monotonic()
            output = unet(x_t, t, class_labels=None if unet.class_embedding is None else t)
            output.sample.flatten()[0].item()  # waits for the device
            seconds = time.monotonic() - start
    return seconds
