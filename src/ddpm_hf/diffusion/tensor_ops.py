"""Tensor operations of the scheduler: dtypes, noise, thresholding. Travels with the weights."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks, coefficient_tables

Generators = torch.Generator | Sequence[torch.Generator] | None
# (x_t, t) -> network output: a tensor, or an object with a tensor `sample`.
Denoiser = Callable[[Tensor, Tensor], Any]
RowWithVariance = (
    coefficient_tables.Marginal | coefficient_tables.Posterior | coefficient_tables.ReverseVariance
)
WIDE = (torch.float32, torch.float64)


def prediction_of(output: Any) -> Tensor:
    """The tensor of a denoiser's output, which may be an object with `.sample`."""
    prediction: Tensor = output if isinstance(output, Tensor) else output.sample
    return prediction


def at_least_float32(x: Tensor) -> Tensor:
    """x as float32, or unchanged if it is float32 or float64."""
    return x if x.dtype in WIDE else x.float()


def with_dtype_of(like: Tensor, x: Tensor) -> Tensor:
    """x in the dtype of `like`."""
    return x if x.dtype == like.dtype else x.to(like.dtype)


def checked(name: str, x: Tensor) -> Tensor:
    """A floating-point tensor (B, ...), as at least float32.

    Raises:
        TypeError, ValueError: for another dtype or no dimension, naming the argument.
    """
    checks.check_tensor(name, x)
    return at_least_float32(x)


def checked_pair(name: str, x: Tensor, other_name: str, other: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors of one shape and device in the dtype of the first, as at least float32.

    Raises:
        TypeError, ValueError: for another dtype, shape or device, naming the argument.
    """
    wide = checked(name, x)
    checks.check_tensor(other_name, other, x)
    return wide, with_dtype_of(wide, other)


def copy_like(coef: Tensor, like: Tensor) -> Tensor:
    """A copy of a coefficient, which the caller may modify, with the dimensions of `like`."""
    return coef.clone().reshape(coef.shape or (1,) * like.ndim)


def expm1_minus(r: Tensor) -> Tensor:
    """e^r - 1 - r, by its series near 0, where the difference and its gradient lose all digits.

    The truncated terms are below 1e-14 of the result.
    """
    small = r.clamp(-0.05, 0.05)
    series = torch.full_like(r, 1 / 8)
    for n in (7, 6, 5, 4, 3):
        series = (1 + series * small) / n
    near = (1 + series * small) * small.square() / 2
    return torch.where(small == r, near, r.expm1() - r)


def variance_and_log(row: RowWithVariance, like: Tensor) -> tuple[Tensor, Tensor]:
    """Copies of the variance and the log-variance among coefficients."""
    return copy_like(row.variance, like), copy_like(row.log_variance, like)


def pixel_log_variance(row: coefficient_tables.PixelVariance, v: Tensor) -> Tensor:
    """log(posterior + calibrated cov / mean(cov)), where cov is var(x_0 | x_t) as predicted by v.

    v is trained on the training chain, where beta~ is nearly the whole variance. The predicted cov
    is therefore wrong by a factor (5 in the middle of a chain, on MNIST), which m_t corrects, and 0
    for some values whose estimate has an error. A tenth of the calibrated variance is therefore
    distributed evenly. At t = 0 the variance is cov itself, which is trained accurately.
    """
    log_ratio = (v * row.slope + row.log_ratio).clamp(max=80)  # its exp is finite
    cov = log_ratio.expm1().clamp_(min=0)  # over beta~ / coef_x_0^2 of the training spacing
    mean = cov.mean(dim=tuple(range(1, v.ndim)), keepdim=True)
    share = torch.where(mean > 0, cov / mean, 1.0)
    log_variance = (row.posterior + row.calibrated * (0.9 * share + 0.1)).log()
    return torch.where(row.is_zero > 0, log_ratio, log_variance)


def scaled_noise(
    row: coefficient_tables.ReverseStep,
    v: Tensor | None,
    x_t: Tensor,
    generator: Generators,
    variance_noise: Tensor | None,
    is_noiseless: bool,
) -> Tensor:
    """Noise of a step times its standard deviation, as a new tensor that may be modified."""
    if variance_noise is not None:
        checks.check_tensor("variance_noise", variance_noise, x_t)
    if is_noiseless:
        return torch.zeros_like(x_t)
    std = row.std if v is None else row.std * row.std_base**v  # 2102.09672, eq. 15
    if variance_noise is None:
        return draw_noise(x_t, generator).mul_(std)
    return with_dtype_of(x_t, variance_noise) * std


def draw_noise(like: Tensor, generator: Generators) -> Tensor:
    """Standard normal noise, contiguous so that it does not depend on the memory format.

    Args:
        like: tensor with the shape, dtype and device of the noise.
        generator: a single generator, or one per image; a CPU generator works for every device.
    """
    if generator is None:
        return torch.randn_like(like, memory_format=torch.contiguous_format)
    if isinstance(generator, torch.Generator):
        noise = torch.empty_like(
            like, device=generator.device, memory_format=torch.contiguous_format
        )
        return noise.normal_(generator=generator).to(like.device)
    checks.check_generators(generator, len(like))
    return torch.stack([draw_noise(x, g) for x, g in zip(like, generator, strict=True)])


def x_0_of_prediction(
    prediction_type: str,
    prediction: Tensor,
    x_t: Tensor,
    signal: Tensor | float,
    sigma: Tensor | float,
) -> Tensor:
    """Estimate of x_0, without clipping.

    Args:
        prediction_type: "epsilon", "sample" or "v_prediction".
        prediction: output of the network, (B, C, ...).
        x_t: noisy images, same shape.
        signal: sqrt(alpha_bar).
        sigma: sqrt(1 - alpha_bar).
    Source: DDPM (2006.11239), eq. 4; v: 2202.00512.
    """
    if prediction_type == "epsilon":
        return (x_t - sigma * prediction) / signal
    if prediction_type == "v_prediction":
        return signal * x_t - sigma * prediction
    return prediction


def threshold(x_0_hat: Tensor, ratio: float, max_value: float) -> Tensor:
    """Clamp each image to [-s, s] and divide by s, a quantile of abs(x_0) in [1, max_value]."""
    if x_0_hat.numel() == 0:
        return x_0_hat  # without a quantile
    magnitudes = x_0_hat.abs().reshape(len(x_0_hat), math.prod(x_0_hat.shape[1:]))
    s = torch.quantile(magnitudes, ratio, dim=1).clamp(1.0, max_value)
    s = s.reshape(-1, *(1,) * (x_0_hat.ndim - 1))
    return x_0_hat.clamp(-s, s) / s
