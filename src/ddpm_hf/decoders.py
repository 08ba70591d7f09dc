"""The decoder of the bound, p(x_0 | x_t) at the last step: -log of it per value, in nats.

Pixels of b bits stand for bins of [-1, 1]: level k for 2 k / (2^b - 1) - 1 and half of the distance
to the next level on both sides; the first bin and the last reach to infinity (2006.11239, eq. 13).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# (x_0, mean, log_variance) -> -log p(x_0), in nats, per value.
Decoder = Callable[[Tensor, Tensor, Tensor], Tensor]

DECODERS = ("exact", "tanh", "continuous")
BIT_DEPTHS = (8, 16)
# Levels of float32 images are right to 0.004 of 16 bits, and are hardly ever right by chance.
_GRID_TOLERANCE = 0.02
# Below this, Ho et al. count no bin.
_TANH_FLOOR = 1e-12


def decoder_of(name: str, bit_depth: int = 8) -> Decoder:
    """The decoder of this name.

    Args:
        name: "exact", the normal distribution's mass in a bin; "tanh", the approximation of it by
            which the papers' numbers were made, with its floor of 1e-12; "continuous", the density
            at x_0, for data that lie on no grid (its bits/dim may be negative, and depend on the
            unit of the data).
        bit_depth: of the images, 8 or 16; without meaning for "continuous".
    Raises:
        ValueError: for another name or bit depth.
    """
    if name not in DECODERS:
        raise ValueError(f"decoder must be one of {', '.join(map(repr, DECODERS))}; got {name!r}")
    if bit_depth not in BIT_DEPTHS:
        raise ValueError(f"bit_depth must be 8 or 16, got {bit_depth!r}")
    if name == "continuous":
        return _continuous
    nll = _exact if name == "exact" else _tanh
    return lambda x_0, mean, log_variance: nll(x_0, mean, log_variance, 1 / (2**bit_depth - 1))


def check_images(x_0: Tensor, decoder: str, bit_depth: int) -> None:
    """Refuse what the decoder cannot count. Reads the values: on an accelerator it waits for them.

    Raises:
        ValueError: for values that are not finite; for a decoder of bins, for values outside of
            [-1, 1] or off the grid of that depth.
    """
    lowest, highest = (value.item() for value in x_0.aminmax())
    if not math.isfinite(lowest + highest):
        raise ValueError("images hold values that are not finite")
    if decoder == "continuous":
        return
    if max(-lowest, highest) > 1 + 1e-4:  # a rounding error, of float16 even, is in range
        raise ValueError(
            f"images must be in [-1, 1], got {lowest:g}..{highest:g}; pixels 0..255 are"
            " x / 127.5 - 1; data of another kind need decoder='continuous'"
        )
    level = (x_0.float() + 1) * (2**bit_depth - 1) / 2
    off = (level - level.round()).abs()
    if (worst := off.max().item()) > _GRID_TOLERANCE:
        share = (off > _GRID_TOLERANCE).double().mean().item()
        raise ValueError(
            f"{share:.1%} of the values of images ({x_0.dtype}) are off the {bit_depth}-bit grid"
            f" that decoder={decoder!r} needs, by up to {worst:.2f} of a level: pass float32"
            " images, not resized after decoding; bit_depth=16 for 16-bit images;"
            " decoder='continuous' for data without a grid"
        )


def _edges(x_0: Tensor, half_bin: float) -> tuple[Tensor, Tensor]:
    """Which values are in the first bin, and which in the last."""
    return x_0 < half_bin - 1, x_0 > 1 - half_bin


def _exact(x_0: Tensor, mean: Tensor, log_variance: Tensor, half_bin: float) -> Tensor:
    """-log(Phi(upper) - Phi(lower)), from logarithms, so that no tail is too far."""
    is_first, is_last = _edges(x_0, half_bin)
    precision, offset = (-log_variance / 2).exp(), x_0 - mean
    upper = torch.where(is_last, math.inf, (offset + half_bin) * precision)
    lower = torch.where(is_first, -math.inf, (offset - half_bin) * precision)
    # In the upper tail both are 1: there it is the mirror image that has digits.
    is_above = offset > 0
    upper, lower = torch.where(is_above, -lower, upper), torch.where(is_above, -upper, lower)
    log_upper = _log_ndtr(upper)
    log_mass = log_upper + _log1mexp(_log_ndtr(lower) - log_upper)
    # Of a bin that is narrow against the normal the difference has few digits.
    z, half = offset * precision, half_bin * precision
    is_narrow = ~(is_first | is_last) & (half < 0.05) & ((z * half).abs() < 0.1)
    log_of_narrow = _log_mass_of_narrow(torch.where(is_narrow, z, 0.0), half.clamp(max=0.05))
    return -torch.where(is_narrow, log_of_narrow, log_mass)


def _log_mass_of_narrow(z: Tensor, half: Tensor) -> Tensor:
    """log(Phi(z + half) - Phi(z - half)): density times width, and its Taylor series in half^2.

    The terms are Hermite polynomials of z over (2 n + 1)!; the fifth is below 1e-13.
    """
    y, h = z.square(), half.square()
    series = (
        h / 6 * ((y - 1) + h / 20 * ((y - 6) * y + 3 + h / 42 * (((y - 15) * y + 45) * y - 15)))
    )
    return series.log1p() - y / 2 + half.log() + math.log(2 / math.pi) / 2


class _LogNdtr(torch.autograd.Function):
    """log Phi(z). Torch 2.13's own gradient, from exp(-z^2 / 2 - log Phi(z)), is off by 4 % at
    z = -1,000 in float32, and by 1 % at -1e7 in float64."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        log_p: Tensor = torch.special.log_ndtr(z)
        return log_p

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        of_z: Tensor = grad * (math.sqrt(2 / math.pi) / torch.special.erfcx(z * -math.sqrt(0.5)))
        return of_z


def _log_ndtr(z: Tensor) -> Tensor:
    log_p: Tensor = _LogNdtr.apply(z)  # type: ignore[no-untyped-call]
    return log_p


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, with every digit, and a finite gradient."""
    # Closer to 0 there is nothing but rounding; only a deviation of hundreds of images comes there.
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    is_near = x > -math.log(2)
    near = (-torch.where(is_near, x, -1.0).expm1()).log()
    far = (-torch.where(is_near, -1.0, x).exp()).log1p()
    return torch.where(is_near, near, far)


def _tanh(x_0: Tensor, mean: Tensor, log_variance: Tensor, half_bin: float) -> Tensor:
    """Ho et al.'s form, floor included: their code, and Improved DDPM's."""
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
