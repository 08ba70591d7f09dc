"""Beta schedules in float64, without cancellation.

Each schedule returns betas, (T,) float64, accurate to the last digits. Where its source computes
1 - alpha_bar_t / alpha_bar_prev, a difference of nearly equal numbers, an equivalent product is
used. Travels with the weights; imports only numpy.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
# Upper bound of beta where alpha_bar reaches 0 at the last step (2102.09672, section 3.2).
BETA_CAP = 0.999


def linear(num_steps: int, beta_start: float, beta_end: float) -> Array:
    """Linearly spaced betas (2006.11239, section 4)."""
    return np.linspace(beta_start, beta_end, num_steps)


def scaled_linear(num_steps: int, beta_start: float, beta_end: float) -> Array:
    """Betas with linearly spaced square roots (2112.10752): "quad" in the code of 2006.11239."""
    return np.linspace(beta_start**0.5, beta_end**0.5, num_steps) ** 2


def squaredcos_cap_v2(num_steps: int, beta_start: float, beta_end: float) -> Array:
    """Cosine schedule with the constants of its paper (2102.09672, eq. 17)."""
    return cosine(num_steps, beta_start, beta_end)


def sigmoid(num_steps: int, beta_start: float, beta_end: float) -> Array:
    """Betas along a logistic curve (GeoDiff, 2203.02923)."""
    return beta_start + (beta_end - beta_start) / (1 + np.exp(-np.linspace(-6, 6, num_steps)))


def stock_laplace(num_steps: int, beta_start: float, beta_end: float) -> Array:
    """The "laplace" schedule of diffusers, which uses sqrt(alpha_bar) for alpha_bar.

    `laplace_log_snr` is the correct one. Upstream: diffusers 0.42.1, scheduling_ddpm.py,
    `betas_for_alpha_bar`. The signal amplitude at the last step is 18%.
    """
    log_alpha_bar = _log_sigmoid(_laplace_log_snr(np.arange(num_steps + 1) / num_steps, 0, 0.5))
    return (-np.expm1(np.diff(log_alpha_bar) / 2)).clip(max=BETA_CAP)


def cosine(
    num_steps: int,
    beta_start: float,
    beta_end: float,
    *,
    offset: float = 0.008,
    cap: float = BETA_CAP,
) -> Array:
    """Betas of alpha_bar ~ cos((t/T + offset) / (1 + offset) pi/2)^2, at most `cap` (2102.09672).

    With u = (1 - t/T) / (1 + offset) pi/2, alpha_bar ~ sin(u)^2, and the difference of two squared
    sines equals sin(a - b) sin(a + b).
    """
    step = math.pi / 2 / (1 + offset) / num_steps
    u = step * np.arange(num_steps, -1, -1)
    betas: Array = np.sin(step) * np.sin(u[:-1] + u[1:]) / np.sin(u[:-1]) ** 2
    return betas.clip(max=cap)


def chen_sigmoid(
    num_steps: int,
    beta_start: float,
    beta_end: float,
    *,
    start: float = -3.0,
    end: float = 3.0,
    tau: float = 1.0,
) -> Array:
    """Betas of an alpha_bar along a logistic curve, `start` to `end` (2301.10972, section 2.1).

    The difference of two logistic functions is sinh((a - b) / 2) / (2 cosh(a / 2) cosh(b / 2)).
    """
    half = np.linspace(start / tau, end / tau, num_steps + 1) / 2
    prev, t, last = half[:-1], half[1:], half[-1]
    betas: Array = np.sinh(t - prev) * np.cosh(last) / (np.sinh(last - prev) * np.cosh(t))
    return betas.clip(max=BETA_CAP)


def laplace_log_snr(
    num_steps: int, beta_start: float, beta_end: float, *, mu: float = 0.0, b: float = 0.5
) -> Array:
    """Betas whose log-SNR follows Laplace(mu, b) (2407.03297); corrects "laplace" of diffusers."""
    t = np.arange(1, num_steps + 1) / num_steps
    log_alpha_bar = _log_sigmoid(_laplace_log_snr(t, mu, b))
    return (-np.expm1(np.diff(log_alpha_bar, prepend=0.0))).clip(max=BETA_CAP)


def iddpm_linear(num_steps: int, beta_start: float, beta_end: float) -> Array:
    """Linear betas scaled by 1000/T (code of 2102.09672).

    With the default range alpha_bar ends near 4e-5 for T of 1,000 or more, and nearer to 0 for
    fewer timesteps; T must be above 20.
    """
    return linear(num_steps, beta_start * 1000 / num_steps, beta_end * 1000 / num_steps)


def const(num_steps: int, beta_start: float, beta_end: float) -> Array:
    """Constant betas equal to `beta_end` (code of 2006.11239)."""
    return np.full(num_steps, float(beta_end))


def jsd(num_steps: int, beta_start: float, beta_end: float) -> Array:
    """Betas 1/T, 1/(T-1), ..., 1: alpha_bar falls linearly to 0 (code of 2006.11239)."""
    return 1 / np.arange(num_steps, 0, -1)


def warmup10(num_steps: int, beta_start: float, beta_end: float) -> Array:
    """Linear betas over the first 10% of the steps, then constant (code of 2006.11239)."""
    return _warmup(num_steps, beta_start, beta_end, num_steps // 10)


def warmup50(num_steps: int, beta_start: float, beta_end: float) -> Array:
    """Linear betas over the first 50% of the steps, then constant (code of 2006.11239)."""
    return _warmup(num_steps, beta_start, beta_end, num_steps // 2)


def _warmup(num_steps: int, beta_start: float, beta_end: float, num_warmup: int) -> Array:
    betas = const(num_steps, beta_start, beta_end)
    betas[:num_warmup] = linear(num_warmup, beta_start, beta_end)
    return betas


def _laplace_log_snr(t: Array, mu: float, b: float) -> Array:
    """Quantile function of the Laplace distribution; 1e-6, as upstream, keeps both ends finite."""
    return mu - b * np.sign(0.5 - t) * np.log(1 - 2 * np.abs(0.5 - t) + 1e-6)


def _log_sigmoid(x: Array) -> Array:
    return -np.logaddexp(0, -x)


STOCK_SCHEDULES: dict[str, Callable[..., Array]] = {
    "linear": linear,
    "scaled_linear": scaled_linear,
    "squaredcos_cap_v2": squaredcos_cap_v2,
    "sigmoid": sigmoid,
    "laplace": stock_laplace,
}
EXTENSION_SCHEDULES: dict[str, Callable[..., Array]] = {
    "chen_sigmoid": chen_sigmoid,
    "const": const,
    "cosine": cosine,
    "iddpm_linear": iddpm_linear,
    "jsd": jsd,
    "laplace_log_snr": laplace_log_snr,
    "quad": scaled_linear,
    "warmup10": warmup10,
    "warmup50": warmup50,
}
BETA_SCHEDULES = STOCK_SCHEDULES | EXTENSION_SCHEDULES
# Range parameters that a schedule depends on; schedules not listed here ignore both.
BETA_RANGE = {
    name: ("beta_end",) if name == "const" else ("beta_start", "beta_end")
    for name in (
        *("linear", "scaled_linear", "sigmoid"),
        *("const", "iddpm_linear", "quad", "warmup10", "warmup50"),
    )
}


def schedule_parameters(name: str) -> dict[str, float]:
    """Parameters of schedule `name` other than beta_start and beta_end, with their defaults."""
    parameters = inspect.signature(BETA_SCHEDULES[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def named_betas(
    name: str, num_steps: int, beta_start: float, beta_end: float, params: dict[str, float]
) -> Array:
    """Betas of schedule `name`, (T,); not finite for invalid parameters."""
    with np.errstate(all="ignore"):
        numbers = {key: np.float64(value) for key, value in params.items()}
        return BETA_SCHEDULES[name](num_steps, beta_start, beta_end, **numbers)


def rescale_zero_terminal_snr(betas: Array) -> Array:
    """Betas rescaled to a last alpha_bar of 0, with the first unchanged (2305.08891, algorithm 1).

    The source shifts and scales r = sqrt(alpha_bar). Then 1 - sqrt(alpha_t) becomes
    (r_prev - r_t) / (r_prev - r_T) = (1 - r_t / r_prev) / (1 - r_T / r_prev), computed from the log
    of these ratios: it needs no difference of nearly equal numbers, and no r that underflows.
    """
    log_alphas = np.log1p(-betas)
    log_alpha_to_end = log_alphas[::-1].cumsum()[::-1]
    drop = np.expm1(log_alphas[1:] / 2) / np.expm1(log_alpha_to_end[1:] / 2)
    return np.concatenate([betas[:1], drop * (2 - drop)])
