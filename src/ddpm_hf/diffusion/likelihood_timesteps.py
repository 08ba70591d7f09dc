"""Timesteps that cost the bound the least, by dynamic programming. Travels with the weights."""

import numpy as np

from . import schedules

Array = schedules.Array
Steps = schedules.Steps

MAX_TIMESTEPS = 8192  # a table of T^2 numbers is made


def likelihood_timesteps(snr: Array, x_0_mse: Array, num_steps: int) -> Steps:
    """The K timesteps, from 0 to T - 1, of the least bound; of equal ones the smallest.

    With best[t] the least cost of a path from 0 to t in so many steps, that in one step more is the
    least of best[s] + cost(s, t) over s < t.

    Args:
        snr: of every t, (T,), falling.
        x_0_mse: m_t, (T,).
        num_steps: K in [2, T].

    Returns:
        (K,), ascending.

    Source: 2106.03802, section 4, with the term log(1 + (SNR_s - SNR_t) m_t) / 2 of the best
    variance.
    """
    T = len(snr)
    s, t = np.arange(T), np.arange(T)[:, None]
    gain = np.where(s < t, snr - snr[:, None], 0.0)
    cost = np.where(s < t, np.log1p(gain * x_0_mse[:, None]), np.inf)  # (t, s)
    best = np.where(s == 0, 0.0, np.inf)
    came_from = []
    for _ in range(num_steps - 1):
        of_path = best + cost
        came_from.append(of_path.argmin(axis=1))
        best = of_path[s, came_from[-1]]
    steps = [T - 1]
    for before in reversed(came_from):
        steps.append(int(before[steps[-1]]))
    return np.array(steps[::-1], dtype=np.int64)
