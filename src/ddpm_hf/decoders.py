"""Decoders of the variational bound: -log p(x_0 | x_t) at the last step, per value, in nats.

A pixel of b bits stands for a bin of [-1, 1]: level k is centred at 2 k / (2^b - 1) - 1 and reaches
half way to its neighbours; the first and the last bin extend to infinity (2006.11239, eq. 13).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddpm_hf.diffusion.checks import check_choice
from ddpm_hf.diffusion.image_format import BIT_DEPTHS

# (x_0, mean, log_variance) -> -log p(x_0), in nats, per value.
Decoder = Callable[[Tensor, Tensor, Tensor], Tensor]

DECODERS = ("exact", "tanh", "continuous")
# In levels. float32 images of 16 bits are within 0.004 of a level; other data rarely are by chance.
_GRID_TOLERANCE = 0.02
# Smallest probability of a bin in the code of Ho et al.
_TANH_FLOOR = 1e-12


def decoder_of(name: str, bit_depth: int = 8) -> Decoder:
    """Function that computes the negative log-likelihood of x_0 at the last step.

    Args:
        name: "exact", the probability of the bin under the normal distribution; "tanh", the
            approximation behind the published numbers, with its floor of 1e-12; "continuous", the
            density at x_0, for data that lie on no grid (bits/dim may be negative, and depend on
            the unit of the data).
        bit_depth: bits per channel of the images, 8 or 16; ignored for "continuous".
    Raises:
        ValueError: if name or bit depth is unknown.
    """
    check_choice("decoder", name, DECODERS)
    if bit_depth not in BIT_DEPTHS:
        raise ValueError(f"`bit_depth` must be 8 or 16, got {bit_depth!r}")
    if name == "continuous":
        return _continuous
    nll = _exact if name == "exact" else _tanh
    return lambda x_0, mean, log_variance: nll(x_0, mean, log_variance, 1 / (2**bit_depth - 1))


def check_images(x_0: Tensor, decoder: str, bit_depth: int, name: str = "images") -> None:
    """Check that the decoder is defined for these images. Synchronises with their device.

    Args:
        x_0: the images.
        decoder, bit_depth: as for `decoder_of`.
        name: argument name.
    Raises:
        ValueError: if values are not finite or, except for "continuous", outside [-1, 1] or off the
            grid of the bit depth.
    """
    if x_0.numel() == 0:
        return
    lowest, highest = (value.item() for value in x_0.aminmax())
    if not math.isfinite(lowest + highest):
        raise ValueError(f"`{name}` must be finite, got values in {lowest:g}..{highest:g}")
    if decoder == "continuous":
        return
    if max(-lowest, highest) > 1 + 1e-4:  # tolerates rounding, also of float16
        raise ValueError(
            f"`{name}` must be in [-1, 1], got {lowest:g}..{highest:g}; scale pixels 0..255 as"
            " x / 127.5 - 1, or set `decoder` to 'continuous' for data that are not pixels"
        )
    level = (x_0.float() + 1) * (2**bit_depth - 1) / 2
    off = (level - level.round()).abs()
    if (worst := off.max().item()) > _GRID_TOLERANCE:
        share = (off > _GRID_TOLERANCE).double().mean().item()
        raise ValueError(
            f"`{name}` ({x_0.dtype}) must be on the {bit_depth}-bit grid for `decoder` {decoder!r},"
            f" got {share:.1%} of the values off by up to {worst:.2f} of a level; pass float32"
            " images that were not resized after decoding, set `bit_depth` to 16 for 16-bit images,"
            " or set `decoder` to 'continuous' for data without a grid"
        )


def _edges(x_0: Tensor, half_bin: float) -> tuple[Tensor, Tensor]:
    """Masks of the values in the first and in the last bin."""
    return x_0 < half_bin - 1, x_0 > 1 - half_bin


def _exact(x_0: Tensor, mean: Tensor, log_variance: Tensor, half_bin: float) -> Tensor:
    """-log(Phi(upper) - Phi(lower)), computed from log Phi to be accurate far in the tails."""
    is_first, is_last = _edges(x_0, half_bin)
    precision, offset = (-log_variance / 2).exp(), x_0 - mean
    upper = torch.where(is_last, math.inf, (offset + half_bin) * precision)
    lower = torch.where(is_first, -math.inf, (offset - half_bin) * precision)
    # In the upper tail both Phi round to 1: use the mirror image.
    is_above = offset > 0
    upper, lower = torch.where(is_above, -lower, upper), torch.where(is_above, -upper, lower)
    log_upper = _log_ndtr(upper)
    log_mass = log_upper + _log1mexp(_log_ndtr(lower) - log_upper)
    # For a bin much narrower than the normal distribution the difference loses its digits.
    z, half = offset * precision, half_bin * precision
    is_narrow = ~(is_first | is_last) & (half < 0.05) & ((z * half).abs() < 0.1)
    log_narrow = _log_mass_of_narrow_bin(torch.where(is_narrow, z, 0.0), half.clamp(max=0.05))
    return -torch.where(is_narrow, log_narrow, log_mass)


def _log_mass_of_narrow_bin(z: Tensor, half: Tensor) -> Tensor:
    """log(Phi(z + half) - Phi(z - half)) as log density, width and a Taylor series in half^2.

    The terms are Hermite polynomials of z over (2 n + 1)!; the fifth is below 1e-13.
    """
    y, h = z.square(), half.square()
    series = (
        h / 6 * ((y - 1) + h / 20 * ((y - 6) * y + 3 + h / 42 * (((y - 15) * y + 45) * y - 15)))
    )
    return series.log1p() - y / 2 + half.log() + math.log(2 / math.pi) / 2


class _LogNdtr(torch.autograd.Function):
    """log Phi(z) with an accurate gradient.

    The gradient of torch 2.13, exp(-z^2 / 2 - log Phi(z)), is off by 4 % at z = -1,000 in float32
    and by 1 % at -1e7 in float64.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        log_p: Tensor = torch.special.log_ndtr(z)
        return log_p

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        grad_z: Tensor = grad * (math.sqrt(2 / math.pi) / torch.special.erfcx(z * -math.sqrt(0.5)))
        return grad_z


def _log_ndtr(z: Tensor) -> Tensor:
    log_p: Tensor = _LogNdtr.apply(z)  # type: ignore[no-untyped-call]
    return log_p


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, to full precision and with a finite gradient."""
    # Closer to 0 is rounding error; it takes a standard deviation of hundreds of image ranges.
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    is_near = x > -math.log(2)
    near = (-torch.where(is_near, x, -1.0).expm1()).log()
    far = (-torch.where(is_near, -1.0, x).exp()).log1p()
    return torch.where(is_near, near, far)


def _tanh(x_0: Tensor, mean: Tensor, log_variance: Tensor, half_bin: float) -> Tensor:
    """Approximation with floor in the code of DDPM and Improved DDPM."""
    is_first, is_last = _edges(x_0, half_bin)
    precision, offset = (-log_variance / 2).exp(), x_0 - mean
    upper = torch.where(is_last, 1.0, _tanh_cdf((offset + half_bin) * precision))
    lower = torch.where(is_first, 0.0, _tanh_cdf((offset - half_bin) * precision))
    return -(upper - lower).clamp(min=_TANH_FLOOR).log()


def _tanh_cdf(z: Tensor) -> Tensor:
    return (1 + (math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)).tanh()) / 2


def _continuous(x_0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log N(x_0; mean, variance)."""
    squared = (x_0 - mean).square() * (-log_variance).exp()
    return (squared + log_variance + math.log(2 * math.pi)) / 2
