"""Timesteps that minimize the variational bound. Travels with the weights."""

import numpy as np

from . import schedules, timestep_spacings

Array = schedules.Array
Steps = timestep_spacings.Steps

MAX_TIMESTEPS = 8192  # memory grows with T^2


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

    Source: 2106.03802, section 4, with the term log(1 + (SNR_s - SNR_t) m_t) / 2 of the optimal
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
