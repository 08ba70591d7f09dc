# SPDX-License-Identifier: Apache-2.0
"""Editing with a trained denoiser: inpainting, image to image, inversion and interpolation.

Every function takes a denoiser `(x_t, t)`, a scheduler and tensors of any shape. With Gaussian data
and its exact denoiser each of them is linear, so the law of its result is a closed form, which
the tests compare with samples. Travels with the weights.

    inpaint         x_0 given the known values                     2201.09865; 2402.02149
    image_to_image  noise to a timestep, then denoise              2108.01073
    invert          the noise that DDIM maps to an image           2010.02502, section 4.3
    interpolate     between images, through their noise            2010.02502, section 5.3
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from torch import Tensor
from tqdm.auto import tqdm

from . import (
    checks,
    inpainting,
    krylov,
    sampling_loop,
    scheduler_interface,
    scheduling,
    tensor_ops,
)

Denoiser = tensor_ops.Denoiser
Generators = tensor_ops.Generators
GaussianDDPMScheduler = scheduling.GaussianDDPMScheduler

MAX_COUNT = 2**16  # more images in one call are a slip


@torch.no_grad()
def inpaint(
    denoiser: Denoiser,
    scheduler: Any,
    x_0: Tensor,
    mask: Tensor,
    *,
    num_inference_steps: int | None = None,
    timesteps: Sequence[int] | None = None,
    method: str = "repaint",
    jump_length: int = 10,
    jump_n_sample: int = 10,
    eta: float = 1.0,
    generator: Generators = None,
    progress: bool = True,
) -> Tensor:
    """Samples of the masked values of `x_0`, given the others.

    "repaint" puts the noised known values in place at every step, and repeats every `jump_length`
    steps `jump_n_sample` times; each step costs one network call. With `x_0_mse` in the scheduler,
    `jump_length` 1 is the most accurate. "covariance" draws x_0 from p(x_0 | x_t, known values) at
    every step, a Gaussian whose mean is the network's estimate and whose covariance follows from
    its Jacobian, and takes the posterior step from there; each step costs one network call and
    2 * NUM_ITERATIONS vector-Jacobian products. It is the more accurate one for an exact denoiser.

    Args:
        denoiser: callable (x_t, t); differentiable for "covariance".
        scheduler: a `GaussianDDPMScheduler`; another scheduler of diffusers gives its betas and its
            prediction type.
        x_0: (B, ...), in the range of the training data.
        mask: 1 where values are drawn, 0 where they are known; broadcasts to `x_0`.
        num_inference_steps: K; None for all training timesteps.
        timesteps: the timesteps in place of their number, strictly descending.
        method: "repaint" or "covariance".
        jump_length: steps of the trajectory that "repaint" goes back at a time.
        jump_n_sample: passes of "repaint" over each of these parts; 1 for no repetition.
        eta: scale of the noise of a step, in [0, 1]; 1 is DDPM, 0 DDIM.
        generator: one generator, or a list of B, so that a sample does not depend on its batch.
        progress: show a progress bar.

    Returns:
        (B, ...) in the dtype of `x_0`, equal to `x_0` where the mask is 0.

    Raises:
        TypeError, ValueError: for tensors that do not fit, a mask that is empty, full or holds
            other values than 0 and 1, or an argument out of range.

    Source: RePaint (2201.09865), algorithm 1; covariance: 2402.02149, eq. 7 and 16.
    """
    checks.check_tensor("x_0", x_0)
    is_known = ~inpainting.checked_mask(mask, x_0)
    ours = with_timesteps(scheduler, num_inference_steps, timesteps)
    clean = tensor_ops.at_least_float32(x_0)
    denoisers, conditioned = inpainting.conditioned(
        denoiser, ours, clean, is_known, method=method, jump_length=jump_length,
        jump_n_sample=jump_n_sample, generator=generator,
    )  # fmt: skip
    noise = tensor_ops.draw_noise(clean, generator)
    x = _sample(denoisers, conditioned, noise, progress, generator=generator, eta=eta)
    return torch.where(is_known, clean, x).to(x_0.dtype)


@torch.no_grad()
def image_to_image(
    denoiser: Denoiser,
    scheduler: Any,
    x_0: Tensor,
    *,
    strength: float | None = None,
    log_snr: float | None = None,
    num_inference_steps: int | None = None,
    eta: float = 1.0,
    generator: Generators = None,
    progress: bool = True,
) -> Tensor:
    """Images like `x_0`: noised to a timestep, then denoised from there.

    Args:
        denoiser: callable (x_t, t).
        scheduler: as for `inpaint`.
        x_0: (B, ...), in the range of the training data.
        strength: share of the K steps that are taken, in (0, 1], as in diffusers; 1 starts from
            the noisiest timestep. By default 0.5, unless `log_snr` is given.
        log_snr: natural logarithm of the signal-to-noise ratio to start at, in place of `strength`.
        num_inference_steps: K; None for all training timesteps.
        eta: scale of the noise of a step, in [0, 1]; 1 is DDPM, 0 DDIM.
        generator: one generator, or a list of B.
        progress: show a progress bar.

    Returns:
        (B, ...) in the dtype of `x_0`.

    Raises:
        TypeError, ValueError: for an argument out of range, or a strength below one step.

    Source: SDEdit (2108.01073), algorithm 1.
    """
    checks.check_tensor("x_0", x_0)
    ours = with_timesteps(scheduler, num_inference_steps, None)
    start = start_index(ours, strength, log_snr)
    clean = tensor_ops.at_least_float32(x_0)
    noise = tensor_ops.draw_noise(clean, generator)
    x_t = ours.add_noise(clean, noise, int(ours.timesteps[start]))
    options = {"generator": generator, "eta": eta}
    return _sample(denoiser, ours, x_t, progress, begin_index=start, **options).to(x_0.dtype)


def start_index(scheduler: Any, strength: float | None, log_snr: float | None) -> int:
    """Position in `scheduler.timesteps` that `image_to_image` starts at.

    Raises:
        ValueError: as `image_to_image`.
    """
    if strength is not None and log_snr is not None:
        raise ValueError("pass `strength` or `log_snr`, not both")
    num_steps = len(scheduler.timesteps)
    if log_snr is not None:
        checks.check_float("log_snr", log_snr, "that is finite", -checks.FINITE, checks.FINITE)
        alpha_bar = scheduler.alphas_cumprod.double()[scheduler.timesteps.long().cpu()]
        return _first_of_pair(scheduler, int((alpha_bar.logit() - log_snr).abs().argmin()))
    strength = 0.5 if strength is None else strength
    checks.check_float("strength", strength, "in (0, 1]", checks.ABOVE_0, 1.0)
    num_taken = int(num_steps * strength)
    if num_taken == 0:
        raise ValueError(
            f"`strength` {strength:g} of {num_steps} steps is less than one step; pass at least"
            f" {1 / num_steps:.3g}, or more `num_inference_steps`"
        )
    return _first_of_pair(scheduler, num_steps - num_taken)


def _first_of_pair(scheduler: Any, position: int) -> int:
    """The next position that starts a step: a scheduler of second order has two for each step."""
    return position + -position % getattr(scheduler, "order", 1)


def expected_gain(
    scheduler: Any,
    *,
    strength: float | None = None,
    log_snr: float | None = None,
    num_inference_steps: int | None = None,
    eta: float = 1.0,
    data_std: float = 0.5,
) -> float:
    """Share of the contrast of an image that `image_to_image` keeps, for Gaussian data.

    The derivative of the mean of the result with respect to `x_0`, for data N(0, data_std^2) and
    their exact denoiser: 1 keeps the image, 0 forgets it.

    Args:
        scheduler, strength, log_snr, num_inference_steps, eta: as for `image_to_image`.
        data_std: standard deviation of the data; 0.5 is usual for images in [-1, 1] (2206.00364).
    """
    ours = with_timesteps(scheduler, num_inference_steps, None)
    start = start_index(ours, strength, log_snr)
    ours.set_timesteps(timesteps=ours.timesteps[start:].tolist())
    return gain_along(ours, eta=eta, data_std=data_std)


def gain_along(
    scheduler: GaussianDDPMScheduler, *, eta: float = 1.0, data_std: float = 0.5
) -> float:
    """`expected_gain` of a trajectory that starts at the noised image."""
    timesteps = scheduler.timesteps
    alpha_bar = scheduler.log_snr(timesteps, torch.float64).sigmoid()
    # E[x_0 | x_t] = wiener x_t
    wiener = alpha_bar.sqrt() * data_std**2 / (alpha_bar * data_std**2 + 1 - alpha_bar)
    posterior = inpainting.with_options(
        scheduler,
        prediction_type="sample",
        variance_type="fixed_small",
        clip_sample=False,
        thresholding=False,
    )
    gain = alpha_bar[:1].sqrt()
    for t, w in zip(timesteps.tolist(), wiener, strict=True):
        zero = torch.zeros_like(gain)
        gain = posterior.step(w * gain, t, gain, variance_noise=zero, eta=eta).prev_sample
    return gain.item()


@torch.no_grad()
def invert(
    denoiser: Denoiser,
    scheduler: Any,
    x_0: Tensor,
    *,
    num_inference_steps: int | None = None,
    timesteps: Sequence[int] | None = None,
    progress: bool = True,
) -> Tensor:
    """The noise x_T that `step(..., eta=0)` maps to `x_0`, by DDIM in reverse.

    Args:
        denoiser: callable (x_t, t).
        scheduler: as for `inpaint`.
        x_0: (B, ...), in the range of the training data.
        num_inference_steps: K; None for all training timesteps. The error falls with K.
        timesteps: the timesteps in place of their number, strictly descending.
        progress: show a progress bar.

    Returns:
        (B, ...), at least float32: close to standard normal if `x_0` is like the training data.

    Source: 2010.02502, section 4.3.
    """
    checks.check_tensor("x_0", x_0)
    ours = with_timesteps(scheduler, num_inference_steps, timesteps)
    return _sample(denoiser, Inversion.of(ours), tensor_ops.at_least_float32(x_0), progress)


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
        """Raises ValueError for a trajectory of one step."""
        if len(scheduler.timesteps) == 1:
            raise ValueError("`num_inference_steps` must be at least 2 to invert, got 1")
        return cls(scheduler, scheduler.timesteps.flip(0)[:-1])

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """The sample unchanged."""
        return sample

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor) -> DDPMSchedulerOutput:
        """x at the next noisier timestep as `prev_sample`."""
        return DDPMSchedulerOutput(self.scheduler.inverse_step(model_output, timestep, sample))


@torch.no_grad()
def interpolate(
    denoiser: Denoiser,
    scheduler: Any,
    a: Tensor,
    b: Tensor,
    num_images: int = 7,
    *,
    num_inference_steps: int | None = None,
    progress: bool = True,
) -> Tensor:
    """Images from `a` to `b`, decoded by DDIM from points on the sphere between their noise.

    Args:
        denoiser: callable (x_t, t).
        scheduler: as for `inpaint`.
        a, b: one image each, (C, H, W) or any other shape without a batch.
        num_images: N, with both ends.
        num_inference_steps: K of inversion and decoding; None for all training timesteps.
        progress: show progress bars.

    Returns:
        (N, ...); the first and the last are the reconstructions of `a` and `b`.

    Source: 2010.02502, section 5.3.
    """
    num_images = checks.to_int("num_images", num_images, 2, MAX_COUNT)
    checks.check_tensor("b", b, a)
    ours = with_timesteps(scheduler, num_inference_steps, None)
    ends = tensor_ops.at_least_float32(torch.stack([a, b]))
    noise = _sample(denoiser, Inversion.of(ours), ends, progress)
    weights = torch.linspace(0, 1, num_images, dtype=noise.dtype, device=noise.device)
    first, last = (end.expand(num_images, *a.shape) for end in noise)
    x_t = slerp(first, last, weights)
    return _sample(denoiser, ours, x_t, progress, eta=0.0).to(a.dtype)


def combine(noise: Tensor, weights: Tensor) -> Tensor:
    """Weighted combinations of independent standard normal noise that are standard normal again.

    Args:
        noise: (N, ...).
        weights: (M, N), any real numbers; the result depends on their ratios only.

    Returns:
        (M, ...).

    Raises:
        ValueError: for weights of another shape, or all 0.

    Source: 2408.08558, eq. 4.
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


def slerp(a: Tensor, b: Tensor, weight: Tensor | float) -> Tensor:
    """Points on the great circle from `a` to `b`, for each element of the batch.

    Between independent normal noise the result is normal noise again; a straight line would have a
    standard deviation of 0.707 in its middle.

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


def with_timesteps(
    scheduler: Any, num_inference_steps: int | None, timesteps: Sequence[int] | None
) -> GaussianDDPMScheduler:
    """A copy of the scheduler, with its trajectory."""
    scheduler_interface.check_scheduler(scheduler)
    is_ours = isinstance(scheduler, GaussianDDPMScheduler)
    ours: GaussianDDPMScheduler = (
        copy.deepcopy(scheduler) if is_ours else GaussianDDPMScheduler.from_config(scheduler.config)
    )
    if num_inference_steps is None and timesteps is None:
        timesteps = range(len(ours) - 1, -1, -1)
    ours.set_timesteps(num_inference_steps, timesteps=timesteps)
    return ours


def _sample(
    denoiser: Denoiser | Sequence[Denoiser],
    scheduler: Any,
    x_T: Tensor,
    progress: bool,
    *,
    begin_index: int = 0,
    **step_options: Any,
) -> Tensor:
    """The last sample of `sampling_steps`, with a progress bar."""
    steps = sampling_loop.sampling_steps(
        denoiser, scheduler, x_T, begin_index=begin_index, **step_options
    )
    total = len(scheduler.timesteps) - begin_index
    for step in tqdm(steps, total=total, disable=not progress, leave=False):
        x_0: Tensor = step.prev_sample
    return x_0
