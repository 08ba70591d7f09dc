# SPDX-License-Identifier: Apache-2.0
"""Inpainting: sampling given known values of x_0, by RePaint or the covariance of x_0 given x_t.

RePaint (2201.09865) puts the noised known values in place at every step, and repeats parts of the
trajectory. The covariance method (2402.02149) draws x_0 from p(x_0 | x_t, known values) at every
step, a Gaussian whose covariance follows from the Jacobian of the network, and takes the posterior
step from there. Both are a list of denoisers and a scheduler for `sampling_loop.sampling_steps`.
Travels with the weights.
"""

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import checks, krylov, scheduler_interface, scheduler_outputs, scheduling, tensor_ops

Denoiser = tensor_ops.Denoiser
Generators = tensor_ops.Generators
GaussianDDPMScheduler = scheduling.GaussianDDPMScheduler

METHODS = ("repaint", "covariance")
# Products of each Krylov space. The covariance of x_0 given x_t is nearly a multiple of the
# identity at low noise and of low rank at high noise: few suffice.
NUM_ITERATIONS = 4
MAX_REPEATS = 2**16  # a larger number is a typing error


def checked_mask(mask: Tensor, x_0: Tensor, name: str = "mask") -> Tensor:
    """The mask as booleans in the shape of `x_0`.

    Raises:
        TypeError, ValueError: for a mask that does not broadcast to `x_0`, is empty or full, or has
            other values than 0 and 1.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"`mask` must be a tensor, got {type(mask).__name__}")
    try:
        full = mask.to(x_0.device).broadcast_to(x_0.shape)
    except RuntimeError:
        raise ValueError(
            f"`mask` of shape {tuple(mask.shape)} does not broadcast to `x_0`, {tuple(x_0.shape)}"
        ) from None
    if not ((full == 0) | (full == 1)).all():
        raise ValueError("`mask` must hold 0 (known) and 1 (drawn) only; threshold it first")
    is_drawn = full == 1
    if not is_drawn.any():
        raise ValueError(f"`{name}` is empty: it must be 1 (white) where values are drawn")
    if is_drawn.all():
        raise ValueError(f"`{name}` is full: it must be 0 (black) where values are known")
    return is_drawn


def conditioned(
    denoiser: Denoiser | Sequence[Denoiser],
    scheduler: GaussianDDPMScheduler,
    x_0: Tensor,
    is_known: Tensor,
    *,
    method: str,
    jump_length: int,
    jump_n_sample: int,
    generator: Generators,
) -> tuple[list[Denoiser], Any]:
    """Denoisers, one for each step, and the scheduler that sample x_0 given its known values.

    Args:
        denoiser: callable (x_t, t), or one for each timestep of `scheduler`.
        scheduler: with its trajectory.
        x_0: (B, ...), at least float32.
        is_known: booleans, same shape.
        method: "repaint" or "covariance".
        jump_length: steps that "repaint" goes back at a time.
        jump_n_sample: passes of "repaint" over each of these parts; 1 for no repetition.
        generator: one generator, or a list of B.

    Raises:
        TypeError, ValueError: for an argument out of range.
    """
    checks.check_choice("method", method, METHODS)
    num_steps = len(scheduler.timesteps)
    denoisers = [denoiser] * num_steps if callable(denoiser) else list(denoiser)
    if method == "covariance":
        return _covariance(denoisers, scheduler, x_0, is_known, generator)
    jump_length = checks.to_int("jump_length", jump_length, 1, MAX_REPEATS)
    jump_n_sample = checks.to_int("jump_n_sample", jump_n_sample, 1, MAX_REPEATS)
    positions = repaint_positions(num_steps, jump_length, jump_n_sample)
    repaint = RePaintScheduler(scheduler, x_0, is_known, positions)
    return [denoisers[-1 - position] for position in positions], repaint


def repaint_positions(num_steps: int, jump_length: int, jump_n_sample: int) -> list[int]:
    """The denoising steps of RePaint, as positions in the trajectory, K - 1 the noisiest.

    After a step at a multiple of `jump_length`, noise is added over `jump_length` positions and
    they are denoised again, until the step has been taken `jump_n_sample` times.

    Source: 2201.09865, appendix B.
    """
    num_repeats = dict.fromkeys(range(0, num_steps - jump_length, jump_length), jump_n_sample - 1)
    position, positions = num_steps - 1, []
    while position >= 0:
        positions.append(position)
        if num_repeats.get(position, 0):
            num_repeats[position] -= 1
            position += jump_length
        position -= 1
    return positions


class RePaintScheduler:
    """Steps of RePaint: a denoising step, the noised known values, and noise for a repetition.

    Args:
        scheduler: with its trajectory.
        x_0: (B, ...), at least float32.
        is_known: booleans, same shape.
        positions: result of `repaint_positions`.

    Source: 2201.09865, algorithm 1.
    """

    def __init__(
        self,
        scheduler: GaussianDDPMScheduler,
        x_0: Tensor,
        is_known: Tensor,
        positions: Sequence[int],
    ) -> None:
        self._scheduler, self._x_0, self._is_known = scheduler, x_0, is_known
        self._ascending = scheduler.timesteps.flip(0)
        self._steps = pairwise([*positions, -1])
        self.timesteps = self._ascending[list(positions)]

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """The sample unchanged."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        generator: Generators = None,
        eta: float = 1.0,
    ) -> scheduler_outputs.GaussianDDPMOutput:
        """x_t of the next denoising step, and the estimate of x_0."""
        ours, (position, following) = self._scheduler, next(self._steps)
        result = ours.step(model_output, timestep, sample, generator, eta=eta)
        known = self._x_0
        if position > 0:
            noise = tensor_ops.draw_noise(known, generator)
            known = ours.add_noise(known, noise, int(self._ascending[position - 1]))
        x = torch.where(self._is_known, known, result.prev_sample)
        for t in self._ascending[position : following + 1].tolist():
            x = ours.diffuse_one_step(x, t, tensor_ops.draw_noise(x, generator))
        return scheduler_outputs.GaussianDDPMOutput(x, result.pred_original_sample)


def _covariance(
    denoisers: Sequence[Denoiser],
    scheduler: GaussianDDPMScheduler,
    x_0: Tensor,
    is_known: Tensor,
    generator: Generators,
) -> tuple[list[Denoiser], GaussianDDPMScheduler]:
    """Steps q(x_prev | x_t, x_0) with x_0 drawn from p(x_0 | x_t, known values)."""
    timesteps = scheduler.timesteps.tolist()
    with_options = partial(scheduler_interface.with_options, scheduler, timesteps)
    unclipped = {"clip_sample": False, "thresholding": False}
    of_x_0 = {"prediction_type": "sample", "variance_type": "fixed_small"}
    differentiable, clipping = with_options(**unclipped), with_options(**of_x_0)
    posterior = with_options(**unclipped, **of_x_0)

    def draw(denoiser: Denoiser, t: int, x_t: Tensor, _: Tensor) -> Tensor:
        estimate = LinearisedEstimate(denoiser, differentiable, x_t, t)
        # The mean is clipped as in every step; a clipped draw would have too small a variance.
        sample = clipping.p_mean_variance(estimate.x_0_hat, t, x_t).pred_original_sample
        if t != timesteps[-1]:
            sample = sample + estimate.scaled_noise(tensor_ops.draw_noise(x_t, generator))
        sample = sample + estimate.regress(x_0 - sample, is_known)  # Matheron's rule
        return torch.where(is_known, x_0, sample)

    draws: list[Denoiser] = [
        partial(draw, *each) for each in zip(denoisers, timesteps, strict=True)
    ]
    return draws, posterior


class LinearisedEstimate:
    """p(x_0 | x_t) as a Gaussian: the network's estimate of x_0 and products by its covariance.

    C = (1 - alpha_bar) / sqrt(alpha_bar) d x_0_hat / d x_t, which is exact for an exact network.
    Only vector-Jacobian products are computed.

    Args:
        denoiser: callable (x_t, t), differentiable.
        scheduler: gives the estimate of x_0; without clip, through which no gradient passes.
        x_t: (B, ...), at least float32.
        t: timestep of the trajectory.

    Attributes:
        x_0_hat: the mean, (B, ...).

    Raises:
        ValueError: if the network's output has no gradient with respect to x_t.

    Source: 2402.02149.
    """

    def __init__(
        self, denoiser: Denoiser, scheduler: GaussianDDPMScheduler, x_t: Tensor, t: int
    ) -> None:
        with torch.enable_grad():
            self._x_t = x_t.detach().requires_grad_()
            output = denoiser(self._x_t, torch.full((len(x_t),), t, device=x_t.device))
            output = tensor_ops.prediction_of(output)
            self._x_0_hat = scheduler.p_mean_variance(output, t, self._x_t).pred_original_sample
        if not output.requires_grad:
            raise ValueError(
                "`denoiser` returned a tensor without gradient; remove torch.no_grad(),"
                " torch.inference_mode() and .detach(), or use `method` 'repaint'"
            )
        snr = math.exp(scheduler.log_snr(t, torch.float64).item())
        # (1 - alpha_bar) / sqrt(alpha_bar). Without signal x_0_hat tells nothing about C: 0.
        self._scale = 1 / math.sqrt(snr * (1 + snr)) if snr > 0 else 0.0
        is_epsilon = scheduler.config.prediction_type == "epsilon"
        self._output_scale = math.sqrt(snr / (1 + snr)) if is_epsilon else 1.0
        self.x_0_hat = self._x_0_hat.detach()

    def covariance(self, x: Tensor) -> Tensor:
        """C x for x of norm 1, (B, ...): one vector-Jacobian product."""
        # The factor of the output goes first: in float16, others would overflow.
        (product,) = torch.autograd.grad(
            self._x_0_hat, self._x_t, x * self._output_scale, retain_graph=True
        )
        return product * (self._scale / self._output_scale)

    def regress(self, gap: Tensor, is_known: Tensor) -> Tensor:
        """C H' (H C H' + s^2)^-1 H gap: how the mean of x_0 moves when known values move by `gap`.

        s^2 is the error of C, see `krylov.KrylovSpace.regression`.
        """
        space = krylov.KrylovSpace.of(self.covariance, gap * is_known, NUM_ITERATIONS, is_known)
        return space.regression()

    def scaled_noise(self, noise: Tensor) -> Tensor:
        """C^(1/2) noise: a sample of N(0, C)."""
        return krylov.KrylovSpace.of(self.covariance, noise, NUM_ITERATIONS).square_root()
