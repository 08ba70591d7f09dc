"""What the scheduler must agree with, by other routes; nothing here imports from `src`.

Betas stand here as their sources write them, in 40-digit arithmetic; the posterior is had by
conditioning a joint normal; the network is the exact one for normal data.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mpmath
import numpy as np
import torch
from mpmath import mpf
from torch import Tensor

mpmath.mp.dps = 40

# Standard deviation of samples of N(0, 0.25 I) with the exact network, linear T=1000, evenly spaced
# K steps, the last one without noise: small variance, large variance, DDIM. Found in another
# implementation by propagating the variance.
STD_OF_SAMPLES = {
    10: (0.3228, 0.5988, 0.3616),
    25: (0.4042, 0.5365, 0.4442),
    50: (0.4432, 0.5176, 0.4719),
    100: (0.4680, 0.5086, 0.4858),
    200: (0.4826, 0.5042, 0.4929),
    1000: (0.4961, 0.5008, 0.4985),
}


def linear_betas(T: int, start: float = 1e-4, end: float = 0.02) -> list[mpf]:
    """2006.11239, section 4."""
    return [mpf(start) + (mpf(end) - mpf(start)) * i / max(T - 1, 1) for i in range(T)]


def scaled_linear_betas(T: int, start: float = 1e-4, end: float = 0.02) -> list[mpf]:
    """Square roots on a line; "quad" of Ho et al."""
    low, high = mpmath.sqrt(mpf(start)), mpmath.sqrt(mpf(end))
    return [(low + (high - low) * i / max(T - 1, 1)) ** 2 for i in range(T)]


def betas_of_alpha_bar(alpha_bar: Callable[[mpf], mpf], T: int, cap: float = 0.999) -> list[mpf]:
    """1 - alpha_bar((i + 1)/T) / alpha_bar(i/T), capped, as Improved DDPM's code has it."""
    return [min(1 - alpha_bar(mpf(i + 1) / T) / alpha_bar(mpf(i) / T), mpf(cap)) for i in range(T)]


def cosine_betas(T: int, offset: float = 0.008, cap: float = 0.999) -> list[mpf]:
    """2102.09672, eq. 17."""
    s = mpf(offset)
    return betas_of_alpha_bar(lambda t: mpmath.cos((t + s) / (1 + s) * mpmath.pi / 2) ** 2, T, cap)


def chen_sigmoid_betas(T: int, start: float = -3, end: float = 3, tau: float = 1) -> list[mpf]:
    """2212.11972, the code of section 2.1: gamma(t)."""

    def sigmoid(x: mpf) -> mpf:
        return 1 / (1 + mpmath.exp(-x))

    last, first = sigmoid(mpf(end) / tau), sigmoid(mpf(start) / tau)
    return betas_of_alpha_bar(
        lambda t: (last - sigmoid((t * (end - start) + start) / mpf(tau))) / (last - first), T
    )


def geodiff_sigmoid_betas(T: int, start: float = 1e-4, end: float = 0.02) -> list[mpf]:
    """2203.02923's code: a logistic curve from -6 to 6."""
    line = [mpf(-6) + mpf(12) * i / max(T - 1, 1) for i in range(T)]
    return [mpf(start) + (mpf(end) - mpf(start)) / (1 + mpmath.exp(-x)) for x in line]


def alpha_bars(betas: list[mpf]) -> list[mpf]:
    """Products of 1 - beta, as eq. 4 defines alpha_bar."""
    products, product = [], mpf(1)
    for beta in betas:
        product *= 1 - beta
        products.append(product)
    return products


def to_float64(values: list[mpf]) -> np.ndarray:
    return np.array([float(v) for v in values])


def relative_error(got: np.ndarray, want: list[mpf]) -> float:
    """Largest |got/want - 1|, the difference taken in 40 digits."""
    return max(float(abs(mpf(float(g)) / w - 1)) for g, w in zip(got, want, strict=True))


@dataclass(frozen=True)
class Posterior:
    """q(x_prev | x_t, x_0) = N(coef_x_0 x_0 + coef_x_t x_t, variance)."""

    coef_x_0: mpf
    coef_x_t: mpf
    variance: mpf


def posterior_by_conditioning(alpha_bar_t: mpf, alpha_bar_prev: mpf) -> Posterior:
    """Condition the joint normal of (x_prev, x_t) given x_0 on x_t.

    x_t = sqrt(a) x_prev + noise, a = alpha_bar_t / alpha_bar_prev, so that cov(x_prev, x_t) is
    sqrt(a) var(x_prev); mean and variance by the textbook rule, no equation of DDPM.
    """
    root_a = mpmath.sqrt(alpha_bar_t / alpha_bar_prev)
    var_prev, var_t = 1 - alpha_bar_prev, 1 - alpha_bar_t
    covariance = root_a * var_prev
    gain = covariance / var_t
    return Posterior(
        coef_x_0=mpmath.sqrt(alpha_bar_prev) - gain * mpmath.sqrt(alpha_bar_t),
        coef_x_t=gain,
        variance=var_prev - gain * covariance,
    )


def target(prediction_type: str, x_0: Tensor, eps: Tensor, alpha_bar: float) -> Tensor:
    """What a perfect network would say, by the definitions of the three parameterisations."""
    signal, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    return {"sample": x_0, "epsilon": eps, "v_prediction": signal * eps - sigma * x_0}[
        prediction_type
    ]


def exact_output(prediction_type: str, x_t: Tensor, alpha_bar: float, data_var: float) -> Tensor:
    """The optimal network for data N(0, data_var I): conditional expectations given x_t."""
    signal, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    per_x_t = 1 / (alpha_bar * data_var + 1 - alpha_bar)
    x_0, eps = signal * data_var * per_x_t * x_t, sigma * per_x_t * x_t
    return target(prediction_type, x_0, eps, alpha_bar)


def iddpm_sections(T: int, sections: str) -> list[int]:
    """Improved DDPM's `space_timesteps`, as its code accumulates it, ascending."""
    counts = [int(count) for count in sections.split(",")]
    size, extra = divmod(T, len(counts))
    start, steps = 0, []
    for i, count in enumerate(counts):
        length = size + (1 if i < extra else 0)
        stride = 1 if count <= 1 else (length - 1) / (count - 1)
        position = 0.0
        for _ in range(count):
            steps.append(start + round(position))
            position += stride
        start += length
    return steps


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
