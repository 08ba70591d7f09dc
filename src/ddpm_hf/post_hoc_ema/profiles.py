"""Post-hoc EMA: averages of the weights whose length is chosen after training (2312.02696).

The average with a power-function profile weighs the weights theta(tau) of every earlier update

    theta_gamma(t) = integral of p(tau) theta(tau),   p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1)

on 0 <= tau <= t. Its length grows with the run: the standard deviation of p is the share sigma_rel
of t. Training keeps two such averages and stores snapshots of both. Afterwards a weighted sum of
all snapshots has almost the profile of any other length:

    weights, error = solve_weights(times, gammas, t, gamma_of(0.03))
    theta = sum(weight * snapshot for weight, snapshot in zip(weights, snapshots))

Time is counted in updates. All functions are float64. Sections are those of the paper.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float64]
SIGMA_RELS = (0.05, 0.10)
"""Lengths of the averages that training stores (section 3.2)."""
MAX_SIGMA_REL = 12**-0.5
"""Length of the plain mean of all weights (gamma = 0), 0.289."""


def sigma_rel_of(gamma: npt.ArrayLike) -> Floats:
    """Standard deviation of the profile relative to t, for an exponent above -1 (section 3.1)."""
    g = np.asarray(gamma, dtype=np.float64)
    return np.sqrt(g + 1) / ((g + 2) * np.sqrt(g + 3))


def gamma_of(sigma_rel: float) -> float:
    """The exponent of a relative length; inverse of `sigma_rel_of` (section 3.1).

    The largest root of the cubic (gamma + 2)^2 (gamma + 3) = (gamma + 1) / sigma_rel^2.

    Raises:
        ValueError: unless 0 < `sigma_rel` <= 1/sqrt(12), where gamma >= 0.
    """
    if not 0 < sigma_rel <= MAX_SIGMA_REL:
        raise ValueError(
            f"`sigma_rel` must be in (0, {MAX_SIGMA_REL:.6f}], got {sigma_rel}; the largest value "
            "is the plain mean of all weights"
        )
    u = sigma_rel**-2.0
    roots = np.roots([1, 7, 16 - u, 12 - u])
    return float(max(roots.real[np.isclose(roots.imag, 0)].max(), 0))


def profile(tau: npt.ArrayLike, t: npt.ArrayLike, gamma: npt.ArrayLike) -> Floats:
    """Density p of the average at time `t`: the weight of theta(tau) (section 3.1)."""
    tau, t, g = (np.asarray(x, dtype=np.float64) for x in (tau, t, gamma))
    ratio = np.clip(tau / t, 0, 1)
    return np.where((tau >= 0) & (tau <= t), (g + 1) / t * ratio**g, 0.0)


def beta(t: int, gamma: float) -> float:
    """Decay of the running average at update `t` = 1, 2, ... (eq. 127).

    It is 0 at t = 1, so that the initial value of the average has no influence. The weight that
    theta(s) then has at time t, s^(gamma + 1) - (s - 1)^(gamma + 1) over t^(gamma + 1), is exactly
    the integral of p over the update, from s - 1 to s.
    """
    return float((1 - 1 / t) ** (gamma + 1))


class PowerFunctionEMA:
    """Running average of parameters with a power-function profile.

    Args:
        parameters: give the shapes; their values have no influence.
        sigma_rel: relative length.

    Attributes:
        averages: one tensor per parameter.
    """

    def __init__(self, parameters: Iterable[Tensor], sigma_rel: float) -> None:
        self.sigma_rel, self.gamma = sigma_rel, gamma_of(sigma_rel)
        self.averages = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self, parameters: Iterable[Tensor], t: int) -> None:
        """Average the parameters after update `t` = 1, 2, ...; call it after every update."""
        # theta_gamma(t) = beta theta_gamma(t - 1) + (1 - beta) theta(t)
        torch._foreach_lerp_(self.averages, list(parameters), 1 - beta(t, self.gamma))


def inner_product(
    t_a: npt.ArrayLike, gamma_a: npt.ArrayLike, t_b: npt.ArrayLike, gamma_b: npt.ArrayLike
) -> Floats:
    """Integral of p_a p_b, for profiles of times `t_*` and exponents `gamma_*` (eq. 151).

    The integral of tau^(gamma_a + gamma_b) up to the earlier time, written with the ratio of the
    times, which is at most 1, so that no power overflows. Arguments are broadcast.
    """
    t_a, g_a, t_b, g_b = (np.asarray(x, dtype=np.float64) for x in (t_a, gamma_a, t_b, gamma_b))
    earlier, later = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    g_later = np.where(t_a < t_b, g_b, g_a)
    return (g_a + 1) * (g_b + 1) / (g_a + g_b + 1) * (earlier / later) ** g_later / later


def solve_weights(
    times: npt.ArrayLike, gammas: npt.ArrayLike, t: float, gamma: float
) -> tuple[Floats, float]:
    """Weights of snapshots whose sum has almost the profile (`t`, `gamma`) (algorithm 3).

    They minimize the integral of (sum of x_i p_i - p)^2, where p_i is the profile of snapshot i.

    Differs from the authors' code: the weights minimize it among those that sum to 1, as p
    integrates to 1. The code divides the free solution by its sum.

    Args:
        times: of the snapshots, (N,), none after `t`.
        gammas: their exponents, (N,).
        t, gamma: of the profile to reconstruct.
    Returns:
        the weights x, (N,), and the norm of the remaining difference relative to that of p.
    """
    times, gammas = np.asarray(times, dtype=np.float64) / t, np.asarray(gammas, dtype=np.float64)
    A = inner_product(times[:, None], gammas[:, None], times, gammas)
    b = inner_product(times, gammas, 1, gamma)
    ones = np.ones((len(b), 1))
    # The last row is the constraint, the last unknown its multiplier. Least squares, because the
    # profiles of close snapshots are almost equal.
    system = np.block([[A, ones], [ones.T, np.zeros((1, 1))]])
    x = np.linalg.lstsq(system, np.append(b, 1), rcond=None)[0][:-1]
    norm = inner_product(1, gamma, 1, gamma)
    return x, float(np.sqrt(max(x @ A @ x - 2 * x @ b + norm, 0) / norm))
