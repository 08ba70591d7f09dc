# SPDX-License-Identifier: Apache-2.0
"""Editing with a trained denoiser: inpainting, image to image, inversion and interpolation.

Every function takes a denoiser `(x_t, t)`, a scheduler and tensors of any shape. With Gaussian data
and its exact denoiser each of them is linear, so the law of its result is a closed form, which
the tests compare with samples.

    inpaint         x_0 given the known values                     2201.09865; 2402.02149
    image_to_image  noise to a timestep, then denoise              2108.01073
    invert          the noise that DDIM maps to an image           2010.02502, section 4.3
    interpolate     between images, through their noise            2010.02502, section 5.3
"""

import copy
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from . import checks, sampling_loop, scheduler_interface, scheduling, tensor_ops

SamplingStep = sampling_loop.SamplingStep
Denoiser = tensor_ops.Denoiser
Generators = tensor_ops.Generators
GaussianDDPMScheduler = scheduling.GaussianDDPMScheduler
Product = Callable[[Tensor], Tensor]
T = TypeVar("T")

METHODS = ("covariance", "repaint")
# Conjugate gradients and Lanczos steps of one denoising step. The covariance of x_0 given x_t is
# nearly a multiple of the identity at low noise and of low rank at high noise: few suffice.
NUM_ITERATIONS = 10
MAX_COUNT = 2**16  # more repetitions or images in one call are a slip


# Inpainting -----------------------------------------------------------------------------------


@torch.no_grad()
def inpaint(
    denoiser: Denoiser,
    scheduler: Any,
    x_0: Tensor,
    mask: Tensor,
    *,
    num_inference_steps: int | None = None,
    timesteps: Sequence[int] | None = None,
    method: str = "covariance",
    jump_length: int = 10,
    jump_n_sample: int = 10,
    eta: float = 1.0,
    generator: Generators = None,
    progress: bool = True,
) -> Tensor:
    """Samples of the masked values of `x_0`, given the others.

    "covariance" draws x_0 from p(x_0 | x_t, known values) at every step, a Gaussian whose mean is
    the network's estimate and whose covariance follows from its Jacobian, and takes the posterior
    step from there. Each step costs one network call and 3 * NUM_ITERATIONS vector-Jacobian
    products. "repaint" puts the noised known values in place at every step, and repeats every
    `jump_length` steps `jump_n_sample` times; each step costs one network call.

    Args:
        denoiser: callable (x_t, t); differentiable for "covariance".
        scheduler: a `GaussianDDPMScheduler`; another scheduler of diffusers gives its betas and its
            prediction type.
        x_0: (B, ...), in the range of the training data.
        mask: 1 where values are drawn, 0 where they are known; broadcasts to `x_0`.
        num_inference_steps: K; None for all training timesteps.
        timesteps: the timesteps in place of their number, strictly descending.
        method: "covariance" or "repaint".
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
    is_known = ~checked_mask(mask, x_0)
    ours = with_timesteps(scheduler, num_inference_steps, timesteps)
    clean = tensor_ops.at_least_float32(x_0)
    steps = inpaint_steps(
        denoiser, ours, clean, is_known, tensor_ops.draw_noise(clean, generator), method=method,
        jump_length=jump_length, jump_n_sample=jump_n_sample, eta=eta, generator=generator,
    )  # fmt: skip
    total = num_inpaint_steps(len(ours.timesteps), method, jump_length, jump_n_sample)
    x = last_sample(steps, total, progress)
    return torch.where(is_known, clean, x).to(x_0.dtype)


def checked_mask(mask: Tensor, x_0: Tensor) -> Tensor:
    """The mask as booleans in the shape of `x_0`.

    Raises:
        TypeError, ValueError: as `inpaint`.
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
        raise ValueError("`mask` is empty: it must be 1 where values are drawn")
    if is_drawn.all():
        raise ValueError("`mask` is full: it must be 0 where values are known")
    return is_drawn


def inpaint_steps(
    denoiser: Denoiser | Sequence[Denoiser],
    scheduler: GaussianDDPMScheduler,
    x_0: Tensor,
    is_known: Tensor,
    x_T: Tensor,
    *,
    method: str,
    jump_length: int,
    jump_n_sample: int,
    eta: float,
    generator: Generators,
) -> Generator[SamplingStep]:
    """The denoising steps of `inpaint`.

    Args:
        denoiser: callable (x_t, t), or one for each timestep.
        scheduler: with its trajectory.
        x_0: (B, ...), at least float32.
        is_known: booleans, same shape.
        x_T: standard normal noise, same shape.
        method, jump_length, jump_n_sample, eta, generator: as for `inpaint`.
    """
    checks.check_choice("method", method, METHODS)
    num_steps = len(scheduler.timesteps)
    denoisers = [denoiser] * num_steps if callable(denoiser) else list(denoiser)
    if method == "covariance":
        return _conditioned(denoisers, scheduler, x_0, is_known, x_T, eta, generator)
    jump_length = checks.to_int("jump_length", jump_length, 1, len(scheduler))
    jump_n_sample = checks.to_int("jump_n_sample", jump_n_sample, 1, MAX_COUNT)
    visited = repaint_schedule(num_steps, jump_length, jump_n_sample)
    return _repainted(denoisers, scheduler, x_0, is_known, x_T, visited, eta, generator)


def num_inpaint_steps(num_steps: int, method: str, jump_length: int, jump_n_sample: int) -> int:
    """Denoising steps of `inpaint`: network calls of each image, without Jacobian products."""
    if method == "covariance":
        return num_steps
    visited = [num_steps, *repaint_schedule(num_steps, jump_length, jump_n_sample)]
    return sum(after < before for before, after in pairwise(visited))


def repaint_schedule(num_steps: int, jump_length: int, jump_n_sample: int) -> list[int]:
    """The visiting order of RePaint, as positions in the trajectory, K - 1 the noisiest.

    From a position to the next smaller one is a denoising step, to the next larger one a diffusion
    step. Every `jump_length`-th position is reached `jump_n_sample` times.

    Source: 2201.09865, appendix B.
    """
    num_repeats = dict.fromkeys(range(0, num_steps - jump_length, jump_length), jump_n_sample - 1)
    position, visited = num_steps, []
    while position >= 1:
        position -= 1
        visited.append(position)
        if num_repeats.get(position, 0):
            num_repeats[position] -= 1
            visited += range(position + 1, position + jump_length + 1)
            position += jump_length
    return visited


@torch.no_grad()
def _repainted(
    denoisers: Sequence[Denoiser],
    scheduler: GaussianDDPMScheduler,
    x_0: Tensor,
    is_known: Tensor,
    x_t: Tensor,
    visited: Sequence[int],
    eta: float,
    generator: Generators,
) -> Generator[SamplingStep]:
    """2201.09865, algorithm 1. Its own loop, because it also goes up the trajectory."""
    timesteps = scheduler.timesteps.flip(0)  # ascending
    level = len(timesteps)
    for i, position in enumerate(visited):
        if position > level:  # x_t from q(x_t | x_prev)
            noise = tensor_ops.draw_noise(x_t, generator)
            x_t = scheduler.diffuse_one_step(x_t, int(timesteps[level]), noise)
        else:
            t = int(timesteps[position])
            output = _prediction(denoisers[-1 - position], x_t, t)
            result = scheduler.step(output, t, x_t, generator, eta=eta)
            x_prev = result.prev_sample
            if position > 0:
                noise = tensor_ops.draw_noise(x_0, generator)
                known = scheduler.add_noise(x_0, noise, int(timesteps[position - 1]))
                x_prev = torch.where(is_known, known, x_prev)
            is_last = i == len(visited) - 1
            x_0_hat = result.pred_original_sample
            step = SamplingStep(i, timesteps[position], x_t, output, x_prev, x_0_hat, is_last)
            yield step
            if step.is_last:
                return
            x_t = step.prev_sample
        level = position


def _conditioned(
    denoisers: Sequence[Denoiser],
    scheduler: GaussianDDPMScheduler,
    x_0: Tensor,
    is_known: Tensor,
    x_T: Tensor,
    eta: float,
    generator: Generators,
) -> Generator[SamplingStep]:
    """Steps q(x_prev | x_t, x_0) with x_0 drawn from p(x_0 | x_t, known values)."""
    unclipped = _changed(scheduler, clip_sample=False, thresholding=False)
    clipping = _changed(scheduler, prediction_type="sample", variance_type="fixed_small")
    posterior = _changed(clipping, clip_sample=False, thresholding=False)
    last = int(scheduler.timesteps[-1])

    def draw(denoiser: Denoiser, x_t: Tensor, t: int) -> Tensor:
        estimate = LinearisedEstimate(denoiser, unclipped, x_t, t)
        mean = estimate.x_0_hat + estimate.regress(x_0 - estimate.x_0_hat, is_known)
        mean = clipping.p_mean_variance(mean, t, x_t).pred_original_sample
        if t == last:
            return mean
        noise = estimate.scaled_noise(tensor_ops.draw_noise(x_t, generator))
        return mean + noise - estimate.regress(noise, is_known)  # Matheron's rule

    conditional = [
        partial(_at_host_timestep, partial(draw, denoiser), t)
        for denoiser, t in zip(denoisers, scheduler.timesteps.tolist(), strict=True)
    ]
    return sampling_loop.sampling_steps(conditional, posterior, x_T, generator=generator, eta=eta)


def _at_host_timestep(
    draw: Callable[[Tensor, int], Tensor], host_t: int, x_t: Tensor, t: Tensor
) -> Tensor:
    return draw(x_t, host_t)


class LinearisedEstimate:
    """p(x_0 | x_t) as a Gaussian: the network's estimate of x_0 and products by its covariance.

    C = (1 - alpha_bar) / sqrt(alpha_bar) d x_0_hat / d x_t, exact for an exact network, of which
    only vector-Jacobian products are computed.

    Args:
        denoiser: callable (x_t, t), differentiable.
        scheduler: gives the estimate of x_0; without clip, through which no gradient passes.
        x_t: (B, ...), at least float32.
        t: timestep of the trajectory.

    Attributes:
        x_0_hat: the mean, (B, ...).

    Raises:
        ValueError: if the network's output has no gradient with respect to x_t.

    Source: 2402.02149, eq. 7.
    """

    def __init__(
        self, denoiser: Denoiser, scheduler: GaussianDDPMScheduler, x_t: Tensor, t: int
    ) -> None:
        with torch.enable_grad():
            self._x_t = x_t.detach().requires_grad_()
            output = _prediction(denoiser, self._x_t, t)
            self._x_0_hat = scheduler.p_mean_variance(output, t, self._x_t).pred_original_sample
        if not output.requires_grad:
            raise ValueError(
                "`denoiser` returned a tensor without gradient; remove torch.no_grad() and"
                " .detach() from it, or use `method` 'repaint'"
            )
        log_snr = scheduler.log_snr(t, torch.float64).item()
        # (1 - alpha_bar) / sqrt(alpha_bar) = 1 / sqrt(SNR (1 + SNR))
        self._scale = math.exp(-log_snr / 2) / math.sqrt(1 + math.exp(log_snr))
        self.x_0_hat = self._x_0_hat.detach()

    def covariance(self, x: Tensor) -> Tensor:
        """C x, (B, ...): one vector-Jacobian product."""
        (product,) = torch.autograd.grad(self._x_0_hat, self._x_t, x, retain_graph=True)
        return product * self._scale

    def regress(self, gap: Tensor, is_known: Tensor) -> Tensor:
        """C H' (H C H')^-1 H gap: how the mean of x_0 moves when known values move by `gap`."""
        weights = conjugate_gradients(lambda x: self.covariance(x) * is_known, gap * is_known)
        return self.covariance(weights)

    def scaled_noise(self, noise: Tensor) -> Tensor:
        """C^(1/2) noise: a sample of N(0, C)."""
        return lanczos_square_root(self.covariance, noise)


def conjugate_gradients(
    product: Product, target: Tensor, num_iterations: int = NUM_ITERATIONS
) -> Tensor:
    """Solution x of A x = target, for each element of the batch; no iteration waits for a device.

    Args:
        product: x -> A x, symmetric and positive on the space of the targets.
        target: (B, ...).
        num_iterations: at most; not more than there are values.
    """
    x, residual, direction = torch.zeros_like(target), target, target
    square = _dot(residual, residual)
    enough = square * torch.finfo(target.dtype).eps ** 2
    for _ in range(min(num_iterations, target[0].numel())):
        image = product(direction)
        is_active = square > enough
        step = torch.where(is_active, square / _dot(direction, image), 0)
        x = x + step * direction
        residual = residual - step * image
        new = _dot(residual, residual)
        direction = residual + torch.where(is_active, new / square, 0) * direction
        square = new
    return x


def lanczos_square_root(
    product: Product, noise: Tensor, num_iterations: int = NUM_ITERATIONS
) -> Tensor:
    """A^(1/2) noise by the Lanczos method, for each element of the batch.

    Args:
        product: x -> A x, symmetric and positive.
        noise: (B, ...).
        num_iterations: dimension of the Krylov space; the result is exact at the number of values.
    """
    length = _dot(noise, noise).sqrt()
    basis, diagonal, offdiagonal = [noise / length], [], []
    for i in range(min(num_iterations, noise[0].numel())):
        image = product(basis[i])
        diagonal.append(_dot(image, basis[i]))
        for vector in basis:  # against the rounding errors of all earlier ones, too
            image = image - _dot(image, vector) * vector
        norm = _dot(image, image).sqrt()
        offdiagonal.append(norm)
        # A space that the product does not leave: the following vectors are 0.
        basis.append(torch.where(norm > 1e-7 * diagonal[0].abs(), image / norm, 0))
    tridiagonal = _tridiagonal(diagonal, offdiagonal[:-1])
    values, vectors = torch.linalg.eigh(tridiagonal)
    root = (vectors * values.clamp(min=0).sqrt()[:, None]) @ vectors.mT
    weights = root[:, :, 0].to(noise.dtype) * length.flatten()[:, None]
    stacked = torch.stack(basis[:-1], dim=1)
    result: Tensor = torch.einsum("bk,bk...->b...", weights, stacked)
    return result


def _tridiagonal(diagonal: list[Tensor], offdiagonal: list[Tensor]) -> Tensor:
    matrix = torch.diag_embed(torch.stack([x.flatten() for x in diagonal], dim=1))
    if offdiagonal:
        beside = torch.stack([x.flatten() for x in offdiagonal], dim=1)
        matrix = matrix + beside.diag_embed(1) + beside.diag_embed(-1)
    return matrix.double()


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """The inner product of each element of the batch, (B, 1, ...)."""
    return (x * y).sum(dim=tuple(range(1, x.ndim)), keepdim=True)


# Image to image, inversion, interpolation -----------------------------------------------------


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
    steps = sampling_loop.sampling_steps(
        denoiser, ours, x_t, begin_index=start, generator=generator, eta=eta
    )
    return last_sample(steps, len(ours.timesteps) - start, progress).to(x_0.dtype)


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
        return int((alpha_bar.logit() - log_snr).abs().argmin())
    strength = 0.5 if strength is None else strength
    checks.check_float("strength", strength, "in (0, 1]", checks.ABOVE_0, 1.0)
    num_taken = int(num_steps * strength)
    if num_taken == 0:
        raise ValueError(
            f"`strength` {strength:g} of {num_steps} steps is less than one step; pass at least"
            f" {1 / num_steps:.3g}, or more `num_inference_steps`"
        )
    return num_steps - num_taken


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
    posterior = _changed(
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
    steps = inversion_steps(denoiser, ours, tensor_ops.at_least_float32(x_0))
    return last_sample(steps, len(ours.timesteps) - 1, progress)


@torch.no_grad()
def inversion_steps(
    denoiser: Denoiser | Sequence[Denoiser], scheduler: GaussianDDPMScheduler, x_0: Tensor
) -> Generator[SamplingStep]:
    """The steps of `invert`; `prev_sample` is x at the next noisier timestep.

    Args:
        denoiser: callable (x_t, t), or one for each timestep.
        scheduler: with its trajectory.
        x_0: (B, ...), at least float32.
    """
    timesteps = scheduler.timesteps.flip(0)  # ascending
    last = len(timesteps) - 1
    if last == 0:
        raise ValueError("`num_inference_steps` must be at least 2 to invert, got 1")
    denoisers = [denoiser] * len(timesteps) if callable(denoiser) else list(denoiser)[::-1]
    x_t = x_0
    for i, t in enumerate(timesteps[:-1]):
        output = _prediction(denoisers[i], x_t, int(t))
        x_next = scheduler.inverse_step(output, int(t), x_t)
        step = SamplingStep(i, t, x_t, output, x_next, None, i == last - 1)
        yield step
        if step.is_last:
            return
        x_t = step.prev_sample


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
    visited = ours.timesteps.tolist()
    ends = torch.stack([a, b])
    noise = invert(denoiser, ours, ends, timesteps=visited, progress=progress)
    weights = torch.linspace(0, 1, num_images, dtype=noise.dtype, device=noise.device)
    first, last = (end.expand(num_images, *a.shape) for end in noise)
    x_t = slerp(first, last, weights)
    steps = sampling_loop.sampling_steps(denoiser, ours, x_t, eta=0.0)
    return last_sample(steps, len(visited), progress).to(a.dtype)


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
    """
    checks.check_tensor("b", b, a)
    w = torch.as_tensor(weight, dtype=a.dtype, device=a.device).reshape(-1, *(1,) * (a.ndim - 1))
    cosine = _dot(a, b) / (_dot(a, a) * _dot(b, b)).sqrt()
    angle = cosine.clamp(-1, 1).acos()
    sine = angle.sin()
    is_straight = sine < 1e-4  # parallel: the limit is a straight line
    safe = torch.where(is_straight, 1, sine)
    of_a = torch.where(is_straight, 1 - w, ((1 - w) * angle).sin() / safe)
    of_b = torch.where(is_straight, w, (w * angle).sin() / safe)
    return of_a * a + of_b * b


# Schedulers and calls -------------------------------------------------------------------------


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


def _changed(scheduler: GaussianDDPMScheduler, **config: Any) -> GaussianDDPMScheduler:
    """A copy with other options and the same trajectory, and without the calibration."""
    config |= {"x_0_mse": None, "calibrated_timesteps": None, "recommended": None}
    changed: GaussianDDPMScheduler = GaussianDDPMScheduler.from_config(scheduler.config, **config)
    changed.set_timesteps(timesteps=scheduler.timesteps.tolist())
    return changed


def _prediction(denoiser: Denoiser, x_t: Tensor, t: int) -> Tensor:
    return tensor_ops.prediction_of(denoiser(x_t, torch.full((len(x_t),), t, device=x_t.device)))


def last_sample(steps: Iterable[SamplingStep], total: int, progress: bool) -> Tensor:
    """The result of a loop over steps, with a progress bar."""
    for step in _with_progress(steps, total, progress):
        x = step.prev_sample
    return x


def _with_progress(steps: Iterable[T], total: int, progress: bool) -> Iterator[T]:
    yield from tqdm(steps, total=total, disable=not progress, leave=False)
