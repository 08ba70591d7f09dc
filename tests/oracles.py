"""Independent references for the scheduler; nothing here imports from `src`.

Betas follow the formulas of their papers in 40-digit arithmetic; the posterior is computed by
conditioning a joint normal distribution; the network is exact for normal data.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mpmath
import numpy as np
import torch
from mpmath import mpf
from torch import Tensor

mpmath.mp.dps = 40

# Standard deviation of samples of N(0, 0.25 I) with the exact network, linear betas, T = 1000, K
# evenly spaced timesteps, no noise in the last step: fixed_small, fixed_large, DDIM. Computed by
# another implementation, which propagates the variance.
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
    """Linearly spaced square roots; "quad" of Ho et al."""
    low, high = mpmath.sqrt(mpf(start)), mpmath.sqrt(mpf(end))
    return [(low + (high - low) * i / max(T - 1, 1)) ** 2 for i in range(T)]


def betas_of_alpha_bar(alpha_bar: Callable[[mpf], mpf], T: int, cap: float = 0.999) -> list[mpf]:
    """1 - alpha_bar((i + 1)/T) / alpha_bar(i/T), capped as in the code of Improved DDPM."""
    return [min(1 - alpha_bar(mpf(i + 1) / T) / alpha_bar(mpf(i) / T), mpf(cap)) for i in range(T)]


def cosine_betas(T: int, offset: float = 0.008, cap: float = 0.999) -> list[mpf]:
    """2102.09672, eq. 17."""
    s = mpf(offset)
    return betas_of_alpha_bar(lambda t: mpmath.cos((t + s) / (1 + s) * mpmath.pi / 2) ** 2, T, cap)


def chen_sigmoid_betas(T: int, start: float = -3, end: float = 3, tau: float = 1) -> list[mpf]:
    """2301.10972, the code of section 2.1: gamma(t)."""

    def sigmoid(x: mpf) -> mpf:
        return 1 / (1 + mpmath.exp(-x))

    last, first = sigmoid(mpf(end) / tau), sigmoid(mpf(start) / tau)
    return betas_of_alpha_bar(
        lambda t: (last - sigmoid((t * (end - start) + start) / mpf(tau))) / (last - first), T
    )


def geodiff_sigmoid_betas(T: int, start: float = 1e-4, end: float = 0.02) -> list[mpf]:
    """Code of 2203.02923: a logistic curve from -6 to 6."""
    line = [mpf(-6) + mpf(12) * i / max(T - 1, 1) for i in range(T)]
    return [mpf(start) + (mpf(end) - mpf(start)) / (1 + mpmath.exp(-x)) for x in line]


def alpha_bars(betas: list[mpf]) -> list[mpf]:
    """alpha_bar as cumulative products of 1 - beta (eq. 4)."""
    products, product = [], mpf(1)
    for beta in betas:
        product *= 1 - beta
        products.append(product)
    return products


def to_float64(values: list[mpf]) -> np.ndarray:
    return np.array([float(v) for v in values])


def relative_error(got: np.ndarray, want: list[mpf]) -> float:
    """Largest |got/want - 1|, computed in 40 digits."""
    return max(float(abs(mpf(float(g)) / w - 1)) for g, w in zip(got, want, strict=True))


@dataclass(frozen=True)
class Posterior:
    """q(x_prev | x_t, x_0) = N(coef_x_0 x_0 + coef_x_t x_t, variance)."""

    coef_x_0: mpf
    coef_x_t: mpf
    variance: mpf


def posterior_by_conditioning(alpha_bar_t: mpf, alpha_bar_prev: mpf) -> Posterior:
    """Condition the joint normal distribution of (x_prev, x_t) given x_0 on x_t.

    x_t = sqrt(a) x_prev + noise with a = alpha_bar_t / alpha_bar_prev, so cov(x_prev, x_t) is
    sqrt(a) var(x_prev). Mean and variance follow the textbook rule, not an equation of DDPM.
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
    """Output of a perfect network, by the definitions of the three prediction types."""
    signal, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    return {"sample": x_0, "epsilon": eps, "v_prediction": signal * eps - sigma * x_0}[
        prediction_type
    ]


def exact_output(prediction_type: str, x_t: Tensor, alpha_bar: float, data_var: float) -> Tensor:
    """Output of the optimal network for N(0, data_var I): conditional expectations given x_t."""
    signal, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    per_x_t = 1 / (alpha_bar * data_var + 1 - alpha_bar)
    x_0, eps = signal * data_var * per_x_t * x_t, sigma * per_x_t * x_t
    return target(prediction_type, x_0, eps, alpha_bar)


def iddpm_sections(T: int, sections: str) -> list[int]:
    """`space_timesteps` of Improved DDPM, accumulated as in its code, ascending."""
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


# Bound of N(0, 0.25 I) minus the entropy of the data, in bits/dim: exact network, linear betas,
# T = 1000, K evenly spaced timesteps, optimal decoder variance; fixed_small and fixed_large.
# Computed by another implementation.
GAP_OF_BOUND = {
    10: (655.87, 0.1475),
    25: (145.48, 0.0620),
    50: (41.81, 0.0313),
    100: (13.82, 0.0157),
    200: (5.01, 0.0079),
    1000: (0.66, 0.0016),
}


def kl_of_step(q: Posterior, reverse_variance: mpf, x_0_error: mpf) -> mpf:
    """KL in nats of two normal distributions whose means differ by coef_x_0 times an error of x_0.

    Args:
        q: the posterior, with the variance of the first distribution.
        reverse_variance: variance of the second distribution.
        x_0_error: squared error of the estimate of x_0.
    """
    ratio = q.variance / reverse_variance
    return (ratio - 1 - mpmath.log(ratio) + q.coef_x_0**2 * x_0_error / reverse_variance) / 2


def bin_nll(x_0: float, mean: float, log_variance: float, bit_depth: int) -> mpf:
    """-log of the normal probability of the bin of a pixel in [-1, 1], to 40 digits.

    Computed from the smaller tail: a difference of numbers near 1 would lose all digits.
    """
    half = 1 / mpf(2**bit_depth - 1)
    std = mpmath.exp(mpf(log_variance) / 2)
    upper = mpmath.inf if x_0 >= 1 else (mpf(x_0) + half - mpf(mean)) / std
    lower = -mpmath.inf if x_0 <= -1 else (mpf(x_0) - half - mpf(mean)) / std
    if lower > 0:
        lower, upper = -upper, -lower
    outside = mpmath.ncdf(lower) + mpmath.ncdf(-upper)
    with mpmath.workdps(60):
        if outside < 0.5:
            return -mpmath.log1p(-outside)
        return -mpmath.log(mpmath.ncdf(upper) - mpmath.ncdf(lower))


def papers_nll(x: np.ndarray, mean: np.ndarray, log_variance: np.ndarray) -> np.ndarray:
    """-log p of the decoder of Ho et al. for 8-bit x in [-1, 1]: code of 2006.11239 in NumPy.

    Phi is approximated by tanh, abs(x) > 0.999 is the first or last bin, and probabilities are at
    least 1e-12.
    """

    def phi(z: np.ndarray) -> np.ndarray:
        return 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))

    inverse_std = np.exp(-log_variance / 2)
    upper = phi((x - mean + 1 / 255) * inverse_std)
    lower = phi((x - mean - 1 / 255) * inverse_std)
    p = np.where(x < -0.999, upper, np.where(x > 0.999, 1 - lower, upper - lower))
    return -np.log(np.maximum(p, 1e-12))


def mean_of_mixture(x_t: Tensor, alpha_bar: float, means: list[float], data_std: float) -> Tensor:
    """E[x_0 | x_t] for values from an equally weighted mixture of normal distributions."""
    variance = alpha_bar * data_std**2 + 1 - alpha_bar
    gain = alpha_bar**0.5 * data_std**2 / variance
    each = torch.tensor(means, dtype=x_t.dtype)
    distance = x_t[..., None] - alpha_bar**0.5 * each
    responsibility = (-(distance**2) / (2 * variance)).softmax(-1)
    return (responsibility * (each + gain * distance)).sum(-1)
