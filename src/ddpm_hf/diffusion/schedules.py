"""Noise schedules (betas) and timestep spacings, in float64 and without cancellation.

Each schedule returns betas, (T,) float64, of its source to the last digits: where a source writes
1 - alpha_bar_t / alpha_bar_prev, a difference of nearly equal numbers, the same value is written as
a product. This file travels with the weights and needs only numpy.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
Steps = np.ndarray[Any, np.dtype[np.int64]]

# Where a schedule's alpha_bar reaches 0, its last beta would be 1 (2102.09672, section 3.2).
BETA_CAP = 0.999


# Schedules of stock diffusers ---------------------------------------------------------------------


def linear(num_steps: int, beta_start: float, beta_end: float) -> Array:
    """Betas on a straight line (2006.11239, section 4)."""
    return np.linspace(beta_start, beta_end, num_steps)


def scaled_linear(num_steps: int, beta_start: float, beta_end: float) -> Array:
    """Square roots of the betas on a straight line: "quad" of 2006.11239's code (2112.10752)."""
    return np.linspace(beta_start**0.5, beta_end**0.5, num_steps) ** 2


def squaredcos_cap_v2(num_steps: int, beta_start: float, beta_end: float) -> Array:
    """The cosine schedule with its source's constants (2102.09672, eq. 17)."""
    return cosine(num_steps, beta_start, beta_end)


def sigmoid(num_steps: int, beta_start: float, beta_end: float) -> Array:
    """Betas on a logistic curve (GeoDiff, 2203.02923)."""
    return beta_start + (beta_end - beta_start) / (1 + np.exp(-np.linspace(-6, 6, num_steps)))


def stock_laplace(num_steps: int, beta_start: float, beta_end: float) -> Array:
    """diffusers' "laplace", which takes sqrt(alpha_bar) for alpha_bar; `laplace_log_snr` is right.

    Upstream: diffusers 0.42.1, scheduling_ddpm.py, `betas_for_alpha_bar`. 18% of the signal's
    amplitude is left at the last step.
    """
    log_alpha_bar = _log_sigmoid(_laplace_log_snr(np.arange(num_steps + 1) / num_steps, 0, 0.5))
    return (-np.expm1(np.diff(log_alpha_bar) / 2)).clip(max=BETA_CAP)


# Schedules that stock diffusers does not know -----------------------------------------------------


def cosine(
    num_steps: int,
    beta_start: float,
    beta_end: float,
    *,
    offset: float = 0.008,
    cap: float = BETA_CAP,
) -> Array:
    """alpha_bar ~ cos((t/T + offset) / (1 + offset) pi/2)^2, betas at most `cap` (2102.09672).

    With u = (1 - t/T) / (1 + offset) pi/2 that is sin(u)^2, and a difference of two squared sines
    is sin(a - b) sin(a + b).
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
    """alpha_bar falls along a logistic curve from `start` to `end` (2212.11972, section 2.1).

    A difference of two logistics is sinh((a - b) / 2) / (2 cosh(a / 2) cosh(b / 2)).
    """
    half = np.linspace(start / tau, end / tau, num_steps + 1) / 2
    here, after, last = half[:-1], half[1:], half[-1]
    betas: Array = np.sinh(after - here) * np.cosh(last) / (np.sinh(last - here) * np.cosh(after))
    return betas.clip(max=BETA_CAP)


def laplace_log_snr(
    num_steps: int, beta_start: float, beta_end: float, *, mu: float = 0.0, b: float = 0.5
) -> Array:
    """Log-SNR distributed as Laplace(mu, b) (2407.03297): stock's "laplace" put right."""
    t = np.arange(1, num_steps + 1) / num_steps
    log_alpha_bar = _log_sigmoid(_laplace_log_snr(t, mu, b))
    return (-np.expm1(np.diff(log_alpha_bar, prepend=0.0))).clip(max=BETA_CAP)


def iddpm_linear(num_steps: int, beta_start: float, beta_end: float) -> Array:
    """Linear betas times 1000/T, so that alpha_bar ends near 4e-5 at any T (2102.09672's code)."""
    return linear(num_steps, beta_start * 1000 / num_steps, beta_end * 1000 / num_steps)


def const(num_steps: int, beta_start: float, beta_end: float) -> Array:
    """Every beta is `beta_end` (2006.11239's code)."""
    return np.full(num_steps, float(beta_end))


def jsd(num_steps: int, beta_start: float, beta_end: float) -> Array:
    """1/T, 1/(T-1), ..., 1: alpha_bar on a straight line to exactly 0 (2006.11239's code)."""
    return 1 / np.arange(num_steps, 0, -1)


def warmup10(num_steps: int, beta_start: float, beta_end: float) -> Array:
    """Linear over the first 10% of the steps, then constant (2006.11239's code)."""
    return _warmup(num_steps, beta_start, beta_end, num_steps // 10)


def warmup50(num_steps: int, beta_start: float, beta_end: float) -> Array:
    """Linear over the first 50% of the steps, then constant (2006.11239's code)."""
    return _warmup(num_steps, beta_start, beta_end, num_steps // 2)


def _warmup(num_steps: int, beta_start: float, beta_end: float, num_warmup: int) -> Array:
    betas = const(num_steps, beta_start, beta_end)
    betas[:num_warmup] = linear(num_warmup, beta_start, beta_end)
    return betas


def _laplace_log_snr(t: Array, mu: float, b: float) -> Array:
    """Quantile of the Laplace distribution; 1e-6 keeps it finite at both ends, as upstream."""
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
OWN_SCHEDULES: dict[str, Callable[..., Array]] = {
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
BETA_SCHEDULES = STOCK_SCHEDULES | OWN_SCHEDULES
# Which ends of the range of betas a schedule depends on; the others come from its formula alone.
BETA_RANGE = {
    name: ("beta_end",) if name == "const" else ("beta_start", "beta_end")
    for name in (
        *("linear", "scaled_linear", "sigmoid"),
        *("const", "iddpm_linear", "quad", "warmup10", "warmup50"),
    )
}


def schedule_parameters(name: str) -> dict[str, float]:
    """The parameters that schedule `name` takes besides beta_start and beta_end, with defaults."""
    parameters = inspect.signature(BETA_SCHEDULES[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def named_betas(
    name: str, num_steps: int, beta_start: float, beta_end: float, params: dict[str, float]
) -> Array:
    """Betas of schedule `name`, (T,); not finite where parameters make no sense."""
    with np.errstate(all="ignore"):
        numbers = {key: np.float64(value) for key, value in params.items()}
        return BETA_SCHEDULES[name](num_steps, beta_start, beta_end, **numbers)


def rescale_zero_terminal_snr(betas: Array) -> Array:
    """Betas whose last alpha_bar is 0 and whose first is unchanged (2305.08891, algorithm 1).

    The source shifts sqrt(alpha_bar) by its last value and scales. A shift leaves differences as
    they are, so 1 - sqrt(alpha) of the result follows without a difference of near-equal numbers.
    """
    log_alphas = np.log1p(-betas)
    root = np.exp(log_alphas.cumsum() / 2)
    drop = -np.expm1(log_alphas[1:] / 2) * root[:-1] / (root[:-1] - root[-1])
    drop[-1] = 1.0  # its value; rounding would leave a trace of signal
    return np.concatenate([betas[:1], drop * (2 - drop)])


# Timesteps: K distinct ones, ascending ------------------------------------------------------------


def leading(num_steps: int, num_train_timesteps: int, offset: int = 0) -> Steps:
    """0, r, 2r, ... with r = T // K, moved up by `offset` as far as T - 1 allows (2305.08891)."""
    steps = np.arange(num_steps) * (num_train_timesteps // num_steps)
    return steps + min(offset, num_train_timesteps - 1 - int(steps[-1]))


def linspace(num_steps: int, num_train_timesteps: int, offset: int = 0) -> Steps:
    """Evenly from 0 to T - 1, both included (2305.08891, table 2)."""
    return np.linspace(0, num_train_timesteps - 1, num_steps).round().astype(np.int64)


def trailing(num_steps: int, num_train_timesteps: int, offset: int = 0) -> Steps:
    """Evenly down from T - 1, which is included (2305.08891, table 2).

    Differs from diffusers 0.42.1, whose float range holds one element more, t = -1, at 62 of the
    1000 possible K.
    """
    ratio = num_train_timesteps / num_steps
    descending = np.arange(num_train_timesteps, 0, -ratio)[:num_steps].round() - 1
    return descending[::-1].astype(np.int64)


def quadratic(num_steps: int, num_train_timesteps: int, offset: int = 0) -> Steps:
    """Denser near the clean image: squares of an even grid (2010.02502, appendix D.3).

    Differs from the source: the grid reaches T - 1, not 0.8 T, where x_T is still far from noise,
    and repeated values move up to the next free ones.
    """
    root = math.sqrt(num_train_timesteps - 1)
    steps = (np.linspace(0, root, num_steps) ** 2).round().astype(np.int64)
    index = np.arange(num_steps)
    return np.maximum.accumulate(steps - index) + index


SPACINGS = {"leading": leading, "linspace": linspace, "trailing": trailing, "quadratic": quadratic}
STOCK_SPACINGS = ("leading", "linspace", "trailing")


def section_timesteps(sections: str, num_train_timesteps: int) -> Steps:
    """Timesteps of Improved DDPM's respacing strings (2102.09672's code).

    Args:
        sections: "10,10,20" cuts [0, T) into three equal parts and takes so many evenly spaced
            steps of each; "ddim50" takes 50 with one whole stride from 0.
        num_train_timesteps: T.

    Raises:
        ValueError: if a part is shorter than its count, or no whole stride gives the number.
    """
    if sections.startswith("ddim"):
        return _whole_stride(int(sections.removeprefix("ddim")), num_train_timesteps)
    parts = np.array_split(np.arange(num_train_timesteps), len(sections.split(",")))
    counts = [int(count) for count in sections.split(",")]
    for part, count in zip(parts, counts, strict=True):
        if not 1 <= count <= len(part):
            raise ValueError(
                f"timestep_spacing {sections!r} wants {count} steps of a section of {len(part)}:"
                f" {len(parts)} sections share num_train_timesteps={num_train_timesteps}"
            )
    return np.concatenate([_section(p, count) for p, count in zip(parts, counts, strict=True)])


def _section(part: Steps, count: int) -> Steps:
    """Evenly spaced steps by a sum of strides, as the source has it: so ties round as there."""
    stride = (len(part) - 1) / max(count - 1, 1)
    offsets = np.concatenate([[0.0], np.full(count - 1, stride)]).cumsum()
    return part[offsets.round().astype(np.int64)]


def _whole_stride(num_steps: int, num_train_timesteps: int) -> Steps:
    for stride in range(1, num_train_timesteps + 1):
        if len(range(0, num_train_timesteps, stride)) == num_steps:
            return np.arange(0, num_train_timesteps, stride)
    raise ValueError(
        f"timestep_spacing 'ddim{num_steps}': no whole stride gives {num_steps} of"
        f" num_train_timesteps={num_train_timesteps} steps; use 'leading' or 'linspace'"
    )


# How many steps a scheduler of diffusers is usually run with --------------------------------------

ANCESTRAL = ("GaussianDDPMScheduler", "DDPMScheduler", "DDPMParallelScheduler")
DDIM = ("DDIMScheduler", "DDIMParallelScheduler")
FIRST_ORDER = (
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "LMSDiscreteScheduler",
    "PNDMScheduler",
)  # fmt: skip


def usual_num_steps(scheduler: str, num_train_timesteps: int) -> int:
    """The number of steps to sample in where nobody gave one.

    Args:
        scheduler: the name of its class.
        num_train_timesteps: T.

    Returns:
        T where each step adds the noise of DDPM. Else 50, or 25 for solvers of higher order (such
        as DPM-Solver, UniPC, DEIS, Heun), as far as T allows: most of them cannot make T steps.
    """
    T = num_train_timesteps
    if scheduler in ANCESTRAL:
        return T
    if scheduler in DDIM:
        return min(50, T)
    return min(50 if scheduler in FIRST_ORDER else 25, max(1, T - 1))
