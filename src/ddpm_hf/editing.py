"""Editing with any denoiser: inpainting, image to image, inversion and interpolation.

Every function takes a denoiser `(x_t, t)`, a scheduler and tensors of any shape; the methods of
`GaussianDDPMPipeline` do the same with images.

    inpaint         x_0 given the known values                     2201.09865; 2402.02149
    image_to_image  noise to a timestep, then denoise              2108.01073
    invert          the noise that DDIM maps to an image           2010.02502, section 4.3
    interpolate     between images, through their noise            2010.02502, section 5.3
    combine, slerp  weighted combinations of noise                 2408.08558
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ddpm_hf.diffusion import image_to_image as starts
from ddpm_hf.diffusion import inpainting
from ddpm_hf.diffusion.checks import MAX_IMAGES, check_tensor, to_int
from ddpm_hf.diffusion.inversion import Inversion, combine, slerp
from ddpm_hf.diffusion.sampling_loop import sampling_steps
from ddpm_hf.diffusion.scheduler_interface import gaussian_copy
from ddpm_hf.diffusion.tensor_ops import Denoiser, Generators, at_least_float32, draw_noise

__all__ = [
    "combine",
    "expected_gain",
    "image_to_image",
    "inpaint",
    "interpolate",
    "invert",
    "slerp",
]


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

    Source: RePaint (2201.09865), algorithm 1; covariance: 2402.02149.
    """
    check_tensor("x_0", x_0)
    is_known = ~inpainting.checked_mask(mask, x_0)
    ours = gaussian_copy(scheduler, num_inference_steps, timesteps)
    clean = at_least_float32(x_0)
    denoisers, conditioned = inpainting.conditioned(
        denoiser, ours, clean, is_known, method=method, jump_length=jump_length,
        jump_n_sample=jump_n_sample, generator=generator,
    )  # fmt: skip
    noise = draw_noise(clean, generator)
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
    check_tensor("x_0", x_0)
    ours = gaussian_copy(scheduler, num_inference_steps, None)
    start = starts.start_index(ours, strength, log_snr)
    clean = at_least_float32(x_0)
    noise = draw_noise(clean, generator)
    x_t = ours.add_noise(clean, noise, int(ours.timesteps[start]))
    options = {"generator": generator, "eta": eta}
    return _sample(denoiser, ours, x_t, progress, begin_index=start, **options).to(x_0.dtype)


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
    ours = gaussian_copy(scheduler, num_inference_steps, None)
    start = starts.start_index(ours, strength, log_snr)
    return starts.expected_gain(ours, start, eta, data_std)


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
    check_tensor("x_0", x_0)
    ours = gaussian_copy(scheduler, num_inference_steps, timesteps)
    return _sample(denoiser, Inversion.of(ours), at_least_float32(x_0), progress)


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
    num_images = to_int("num_images", num_images, 2, MAX_IMAGES)
    check_tensor("b", b, a)
    ours = gaussian_copy(scheduler, num_inference_steps, None)
    ends = at_least_float32(torch.stack([a, b]))
    noise = _sample(denoiser, Inversion.of(ours), ends, progress)
    weights = torch.linspace(0, 1, num_images, dtype=noise.dtype, device=noise.device)
    first, last = (end.expand(num_images, *a.shape) for end in noise)
    x_t = slerp(first, last, weights)
    return _sample(denoiser, ours, x_t, progress, eta=0.0).to(a.dtype)


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
    steps = sampling_steps(denoiser, scheduler, x_T, begin_index=begin_index, **step_options)
    total = len(scheduler.timesteps) - begin_index
    for step in tqdm(steps, total=total, disable=not progress, leave=False):
        x_0: Tensor = step.prev_sample
    return x_0
