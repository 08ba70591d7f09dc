# SPDX-License-Identifier: Apache-2.0
"""DDIM inversion (2010.02502, section 4.3), and paths between noise (section 5.3; 2408.08558).

Travels with the weights.
"""

from dataclasses import dataclass

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from torch import Tensor

from . import checks, krylov, scheduling, tensor_ops

GaussianDDPMScheduler = scheduling.GaussianDDPMScheduler


@dataclass(frozen=True)
class Inversion:
    """DDIM in reverse as a scheduler for `sampling_steps`, from an image to noise.

    Attributes:
        scheduler: with its trajectory.
        timesteps: the trajectory from its last to its second timestep.
    """

    scheduler: GaussianDDPMScheduler
    timesteps: Tensor

    @classmethod
    def of(cls, scheduler: GaussianDDPMScheduler) -> "Inversion":
        """The inversion of a trajectory.

        Raises:
            ValueError: for a trajectory of one step.
        """
        if len(scheduler.timesteps) == 1:
            raise ValueError("`num_inference_steps` must be at least 2 to invert, got 1")
        return cls(scheduler, scheduler.timesteps.flip(0)[:-1])

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """The sample unchanged."""
        return sample

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor) -> DDPMSchedulerOutput:
        """x at the next noisier timestep as `prev_sample`."""
        return DDPMSchedulerOutput(self.scheduler.inverse_step(model_output, timestep, sample))


def slerp(a: Tensor, b: Tensor, weight: Tensor | float) -> Tensor:
    """Points on the great circle from `a` to `b`, for each element of the batch.

    Independent normal noise is nearly orthogonal in many dimensions, and the result is close to
    normal noise; a straight line would have a standard deviation of 0.707 in its middle.

    Args:
        a, b: (B, ...).
        weight: 0 for `a`, 1 for `b`; a number or (B,).

    Raises:
        ValueError: for another number of weights.
    """
    checks.check_tensor("b", b, a)
    x, y = tensor_ops.at_least_float32(a), tensor_ops.at_least_float32(b)  # float16 overflows
    w = torch.as_tensor(weight, dtype=x.dtype, device=x.device).flatten()
    if len(w) not in (1, len(x)):
        raise ValueError(f"`weight` must be a number or have shape ({len(x)},), got {len(w)}")
    w = w.reshape(-1, *(1,) * (x.ndim - 1))
    length = (krylov.dot(x, x) * krylov.dot(y, y)).sqrt()
    angle = (krylov.dot(x, y) / torch.where(length > 0, length, 1)).clamp(-1, 1).acos()
    sine = angle.sin()
    is_straight = (sine < 1e-4) | (length == 0)  # parallel: the limit is a straight line
    safe = torch.where(is_straight, 1, sine)
    of_x = torch.where(is_straight, 1 - w, ((1 - w) * angle).sin() / safe)
    of_y = torch.where(is_straight, w, (w * angle).sin() / safe)
    return (of_x * x + of_y * y).to(a.dtype)


def combine(noise: Tensor, weights: Tensor) -> Tensor:
    """Weighted combinations of independent standard normal noise that are standard normal again.

    Args:
        noise: (N, ...).
        weights: (M, N), any real numbers; the result depends on their ratios only.

    Returns:
        (M, ...).

    Raises:
        ValueError: for weights of another shape, or all 0.

    Source: 2408.08558.
    """
    if weights.ndim != 2 or weights.shape[1] != len(noise):
        raise ValueError(
            f"`weights` must have shape (M, {len(noise)}), one weight for each noise, got"
            f" {tuple(weights.shape)}"
        )
    length = weights.square().sum(1, keepdim=True).sqrt()
    if (length == 0).any():
        raise ValueError("`weights` of a combination must not all be 0")
    return torch.einsum("mn,n...->m...", (weights / length).to(noise), noise)
