# SPDX-License-Identifier: Apache-2.0
"""Image to image (SDEdit, 2108.01073): where to start, and how much of the image is kept.

Travels with the weights.
"""

import math
from typing import Any

import torch
from torch import Tensor

from . import checks, scheduler_interface


def start_index(scheduler: Any, strength: float | None, log_snr: float | None) -> int:
    """Position in `scheduler.timesteps` that image to image starts at.

    Args:
        scheduler: with its trajectory.
        strength: share of the steps that are taken, in (0, 1]; 0.5 by default.
        log_snr: natural logarithm of the signal-to-noise ratio to start at, instead of `strength`.

    Raises:
        TypeError, ValueError: for both, a value out of range, or a strength below one step.
    """
    if strength is not None and log_snr is not None:
        raise ValueError("pass `strength` or `log_snr`, not both")
    num_steps = len(scheduler.timesteps)
    if log_snr is not None:
        checks.check_finite_float("log_snr", log_snr)
        alpha_bar = scheduler.alphas_cumprod.double()[scheduler.timesteps.long().cpu()]
        return _first_of_pair(scheduler, int((alpha_bar.logit() - log_snr).abs().argmin()))
    strength = 0.5 if strength is None else strength
    checks.check_float("strength", strength, "in (0, 1]", checks.ABOVE_0, 1.0)
    num_taken = int(num_steps * strength)
    if num_taken == 0:
        raise ValueError(
            f"`strength` {strength:g} of {num_steps} steps is less than one step; pass at least"
            f" {math.ceil(1000 / num_steps) / 1000:g}, or more `num_inference_steps`"
        )
    return _first_of_pair(scheduler, num_steps - num_taken)


def _first_of_pair(scheduler: Any, position: int) -> int:
    """The next position that starts a step: a scheduler of second order has two for each step."""
    return position + -position % getattr(scheduler, "order", 1)


def noised(scheduler: Any, x_0: Tensor, noise: Tensor, start: int) -> Tensor:
    """x_t at a position of the trajectory, in the scheduler's own scale."""
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    t = scheduler.timesteps[start : start + 1].expand(len(x_0)).to(x_0.device)
    x_t: Tensor = scheduler.add_noise(x_0, noise, t)
    return x_t


def expected_gain(
    scheduler: Any, start: int, eta: float | None = None, data_std: float = 0.5
) -> float:
    """Share of the contrast of an image that image to image keeps, for Gaussian data.

    The derivative of the mean of the result with respect to x_0, for data N(0, data_std^2) and
    their exact denoiser: 1 keeps the image, 0 forgets it.

    Args:
        scheduler: with its trajectory.
        start: result of `start_index`.
        eta: scale of the noise of a step; None for 1 with schedulers of DDPM, 0 with others.
        data_std: standard deviation of the data; 0.5 is usual for images in [-1, 1] (2206.00364).
    """
    eta = float("DDPM" in type(scheduler).__name__) if eta is None else eta
    timesteps = scheduler.timesteps[start:].long().unique().flip(0)
    posterior = scheduler_interface.with_options(
        scheduler,
        timesteps.tolist(),
        prediction_type="sample",
        variance_type="fixed_small",
        clip_sample=False,
        thresholding=False,
    )
    alpha_bar = posterior.log_snr(timesteps, torch.float64).sigmoid()
    # E[x_0 | x_t] = wiener x_t
    wiener = alpha_bar.sqrt() * data_std**2 / (alpha_bar * data_std**2 + 1 - alpha_bar)
    gain, zero = alpha_bar[:1].sqrt(), torch.zeros_like(alpha_bar[:1])
    for t, w in zip(timesteps.tolist(), wiener, strict=True):
        gain = posterior.step(w * gain, t, gain, variance_noise=zero, eta=eta).prev_sample
    return gain.item()
