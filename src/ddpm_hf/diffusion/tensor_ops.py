"""The scheduler's arithmetic on samples: dtypes, noise, thresholding. Travels with the weights."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks, coefficients

Generators = torch.Generator | Sequence[torch.Generator] | None
# (x_t, t) -> the prediction, as a tensor or as the `.sample` of an object.
Denoiser = Callable[[Tensor, Tensor], Any]
WIDE = (torch.float32, torch.float64)


def prediction_of(output: Any) -> Tensor:
    """The tensor of a denoiser's output, which may be an object with `.sample`."""
    prediction: Tensor = output if isinstance(output, Tensor) else output.sample
    return prediction


def at_least_float32(x: Tensor) -> Tensor:
    """x in the dtype that the mathematics is done in."""
    return x if x.dtype in WIDE else x.float()


def with_dtype_of(like: Tensor, x: Tensor) -> Tensor:
    """x in the dtype of `like`."""
    return x if x.dtype == like.dtype else x.to(like.dtype)


def as_tensor(coef: Tensor, like: Tensor) -> Tensor:
    """A coefficient for the caller to keep: a copy, with as many dimensions as `like`."""
    return coef.clone().reshape(coef.shape or (1,) * like.ndim)


def expm1_minus(r: Tensor) -> Tensor:
    """e^r - 1 - r. Near 0 from its series, for the difference has no digits, nor has its gradient.

    The terms that are left out are below 1e-14 of it.
    """
    small = r.clamp(-0.05, 0.05)
    series = torch.full_like(r, 1 / 8)
    for n in (7, 6, 5, 4, 3):
        series = (1 + series * small) / n
    near = (1 + series * small) * small.square() / 2
    return torch.where(small == r, near, r.expm1() - r)


def variance_and_log(
    row: coefficients.Marginal | coefficients.Posterior | coefficients.ReverseVariance, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Variance and log-variance of a row of coefficients, as copies for the caller."""
    return as_tensor(row.variance, like), as_tensor(row.log_variance, like)


def shared_log_variance(row: coefficients.Sharing, v: Tensor) -> Tensor:
    """log of known + added cov / mean(cov), where cov(x_0 | x_t) of each value is what v says.

    v is trained where beta~ is all but the whole variance, so that cov is off by a factor (of 5 in
    the middle of a chain, on MNIST) that m_t puts right; and so that it is 0 at values which then
    do err: a tenth is shared out evenly. At t = 0 the variance is cov, and well trained.
    """
    log_ratio = (v * row.slope + row.log_ratio).clamp(max=80)  # its exp is finite
    cov = log_ratio.expm1().clamp_(min=0)  # over beta~ / coef_x_0^2 of the training spacing
    mean = cov.mean(dim=tuple(range(1, v.ndim)), keepdim=True)
    share = torch.where(mean > 0, cov / mean, 1.0)
    log_variance = (row.known + row.added * (0.9 * share + 0.1)).log()
    return torch.where(row.is_zero > 0, log_ratio, log_variance)


def scaled_noise(
    row: coefficients.Reverse,
    v: Tensor | None,
    x_t: Tensor,
    generator: Generators,
    variance_noise: Tensor | None,
    is_noiseless: bool,
) -> Tensor:
    """The noise of a step times its std: a new tensor, in which the step is then summed up."""
    if variance_noise is not None:
        checks.check_tensor("variance_noise", variance_noise, x_t)
    if is_noiseless:
        return torch.zeros_like(x_t)
    std = row.std if v is None else row.std * row.std_base**v  # 2102.09672, eq. 15
    if variance_noise is None:
        return draw_noise(x_t, generator).mul_(std)
    return with_dtype_of(x_t, variance_noise) * std


def draw_noise(like: Tensor, generator: Generators) -> Tensor:
    """Standard normal noise shaped like `like`, contiguous: the same for every memory format.

    Args:
        like: gives shape, dtype and device.
        generator: one, or one per image; a CPU generator serves every device.
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


def threshold(x_0_hat: Tensor, ratio: float, max_value: float) -> Tensor:
    """Clamp to the quantile s of abs(x_0) of each image, in [1, max_value]; divide by s."""
    magnitudes = x_0_hat.abs().reshape(len(x_0_hat), math.prod(x_0_hat.shape[1:]))
    s = torch.quantile(magnitudes, ratio, dim=1).clamp(1.0, max_value)
    s = s.reshape(-1, *(1,) * (x_0_hat.ndim - 1))
    return x_0_hat.clamp(-s, s) / s
