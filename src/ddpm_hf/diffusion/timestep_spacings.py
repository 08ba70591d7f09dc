"""Timesteps of a trajectory of K steps: spacings, respacing strings, and the lowest bound.

Travels with the weights; imports only numpy.
"""

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
Steps = np.ndarray[Any, np.dtype[np.int64]]

MAX_LIKELIHOOD_TIMESTEPS = 8192  # memory of `likelihood_timesteps` grows with T^2


def leading(num_steps: int, num_train_timesteps: int, offset: int = 0) -> Steps:
    """Timesteps 0, r, 2r, ... with r = T // K, plus `offset`, limited by T - 1 (2305.08891).

    All spacings return K distinct timesteps in ascending order, (K,) int64.
    """
    steps = np.arange(num_steps) * (num_train_timesteps // num_steps)
    return steps + min(offset, num_train_timesteps - 1 - int(steps[-1]))


def linspace(num_steps: int, num_train_timesteps: int, offset: int = 0) -> Steps:
    """Evenly spaced timesteps from 0 to T - 1, both included (2305.08891, table 2)."""
    return np.linspace(0, num_train_timesteps - 1, num_steps).round().astype(np.int64)


def trailing(num_steps: int, num_train_timesteps: int, offset: int = 0) -> Steps:
    """Evenly spaced timesteps down from T - 1, which is included (2305.08891, table 2).

    Differs from diffusers 0.42.1: at 62 of the 1000 possible K its float range has one more
    element, t = -1.
    """
    ratio = num_train_timesteps / num_steps
    descending = np.arange(num_train_timesteps, 0, -ratio)[:num_steps].round() - 1
    return descending[::-1].astype(np.int64)


def quadratic(num_steps: int, num_train_timesteps: int, offset: int = 0) -> Steps:
    """Squares of an even grid, denser near the clean image (2010.02502, appendix D.2).

    Differs from the code of the paper: the grid ends at T - 1 instead of 0.8 T, where x_t is still
    far from pure noise, and repeated values move up to the next unused timestep.
    """
    root = math.sqrt(num_train_timesteps - 1)
    steps = (np.linspace(0, root, num_steps) ** 2).round().astype(np.int64)
    index = np.arange(num_steps)
    return np.maximum.accumulate(steps - index) + index


SPACINGS = {"leading": leading, "linspace": linspace, "trailing": trailing, "quadratic": quadratic}
STOCK_SPACINGS = ("leading", "linspace", "trailing")


def section_timesteps(sections: str, num_train_timesteps: int) -> Steps:
    """Timesteps of a respacing string of Improved DDPM (code of 2102.09672), ascending.

    Args:
        sections: "10,10,20" divides [0, T) into three equal sections and takes 10, 10 and 20 evenly
            spaced timesteps from them; "ddim50" takes 50 timesteps with a constant integer stride.
        num_train_timesteps: T.

    Raises:
        ValueError: if a section is shorter than its count, or no integer stride gives the count.
    """
    if sections.startswith("ddim"):
        return _whole_stride(int(sections.removeprefix("ddim")), num_train_timesteps)
    parts = np.array_split(np.arange(num_train_timesteps), len(sections.split(",")))
    counts = [int(count) for count in sections.split(",")]
    for part, count in zip(parts, counts, strict=True):
        if not 1 <= count <= len(part):
            raise ValueError(
                f"`timestep_spacing` {sections!r} takes {count} timesteps from a section of"
                f" {len(part)}; each count must be in [1, {len(part)}]"
            )
    return np.concatenate([_section(p, count) for p, count in zip(parts, counts, strict=True)])


def _section(part: Steps, count: int) -> Steps:
    """Evenly spaced timesteps by accumulating the stride, so that ties round as in the source."""
    stride = (len(part) - 1) / max(count - 1, 1)
    offsets = np.concatenate([[0.0], np.full(count - 1, stride)]).cumsum()
    return part[offsets.round().astype(np.int64)]


def _whole_stride(num_steps: int, num_train_timesteps: int) -> Steps:
    for stride in range(1, num_train_timesteps + 1):
        if len(range(0, num_train_timesteps, stride)) == num_steps:
            return np.arange(0, num_train_timesteps, stride)
    raise ValueError(
        f"`timestep_spacing` 'ddim{num_steps}' is not possible: no integer stride takes"
        f" {num_steps} of {num_train_timesteps} timesteps; use 'leading' or 'linspace'"
    )


def likelihood_timesteps(snr: Array, x_0_mse: Array, num_steps: int) -> Steps:
    """The K timesteps from 0 to T - 1 with the lowest bound, by dynamic programming.

    best[t] is the lowest cost of a path from 0 to t with a given number of steps. One step more has
    the cost min over s < t of best[s] + cost(s, t).

    Args:
        snr: signal-to-noise ratios, (T,), decreasing.
        x_0_mse: mean squared errors m_t of the estimate of x_0, (T,).
        num_steps: K in [2, T].

    Returns:
        The timesteps in ascending order, (K,); ties are resolved to the smallest.

    Source: 2106.03802, with the term log(1 + (SNR_s - SNR_t) m_t) / 2 of the optimal
    variance.
    """
    T = len(snr)
    s, t = np.arange(T), np.arange(T)[:, None]
    gain = np.where(s < t, snr - snr[:, None], 0.0)
    cost = np.where(s < t, np.log1p(gain * x_0_mse[:, None]), np.inf)  # (t, s)
    best = np.where(s == 0, 0.0, np.inf)
    came_from = []
    for _ in range(num_steps - 1):
        path_cost = best + cost
        came_from.append(path_cost.argmin(axis=1))
        best = path_cost[s, came_from[-1]]
    steps = [T - 1]
    for before in reversed(came_from):
        steps.append(int(before[steps[-1]]))
    return np.array(steps[::-1], dtype=np.int64)


ANCESTRAL = ("GaussianDDPMScheduler", "DDPMScheduler", "DDPMParallelScheduler")
DDIM = ("DDIMScheduler", "DDIMParallelScheduler")
FIRST_ORDER = (
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "LMSDiscreteScheduler",
    "PNDMScheduler",
)  # fmt: skip


def usual_num_steps(scheduler: str, num_train_timesteps: int) -> int:
    """Default number of sampling steps of a scheduler.

    Args:
        scheduler: class name of the scheduler.
        num_train_timesteps: T.

    Returns:
        T for ancestral DDPM samplers. Otherwise 50, or 25 for solvers of higher order (DPM-Solver,
        UniPC, DEIS, Heun, ...), and at most T - 1 (T for DDIM): most solvers do not support T.
    """
    T = num_train_timesteps
    if scheduler in ANCESTRAL:
        return T
    if scheduler in DDIM:
        return min(50, T)
    return min(50 if scheduler in FIRST_ORDER else 25, max(1, T - 1))
