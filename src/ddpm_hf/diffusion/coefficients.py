"""Coefficients of the distributions of DDPM (2006.11239), from betas and timesteps.

Derived in float64 from log(1 - beta), without cancellation, and rounded once to the dtype of the
sample. Notation as in `scheduling.py`. Travels with the weights.
"""

from collections.abc import Callable
from functools import cached_property, wraps
from typing import Any, TypeVar

import numpy as np

from . import coefficient_tables, schedules, timestep_spacings

Array = schedules.Array
Steps = timestep_spacings.Steps
Timestep = coefficient_tables.Timestep
BoundTerm = coefficient_tables.BoundTerm
CoefficientTable = coefficient_tables.CoefficientTable
ForwardStep = coefficient_tables.ForwardStep
InversionStep = coefficient_tables.InversionStep
Marginal = coefficient_tables.Marginal
PixelVariance = coefficient_tables.PixelVariance
Posterior = coefficient_tables.Posterior
ReverseStep = coefficient_tables.ReverseStep
ReverseVariance = coefficient_tables.ReverseVariance

Table = TypeVar("Table", bound=CoefficientTable[Any])


def is_learned(variance_type: str | None) -> bool:
    """Whether the network predicts the reverse variance in a second half of output channels."""
    return variance_type is not None and variance_type.startswith("learned")


def marginal(log_alphas: Array) -> CoefficientTable[Marginal]:
    """q(x_t | x_0) (eq. 4) at all timesteps, from log(1 - beta), (T,)."""
    T, log_alpha_bar = len(log_alphas), log_alphas.cumsum()
    variance = -np.expm1(log_alpha_bar)
    log_variance = np.log(variance)
    log_snr = log_alpha_bar - log_variance
    signal, sigma, snr = np.exp(log_alpha_bar / 2), np.sqrt(variance), np.exp(log_snr)
    columns = (signal, sigma, variance, log_variance, snr, log_snr)
    return CoefficientTable(Marginal, columns, np.arange(T), T, f"[0, {T - 1}]")


def cached_by_eta(
    make: Callable[["Trajectory", float], Table],
) -> Callable[["Trajectory", float], Table]:
    """Cache a method that returns the table of an eta."""

    @wraps(make)
    def cached(trajectory: "Trajectory", eta: float) -> Table:
        tables = trajectory.tables_by_eta[make.__name__]
        table: Table | None = tables.get(eta)
        if table is None:
            if len(tables) == 8:  # bounds memory where eta changes at every step
                tables.popitem()  # the newest: the tables of 1 and 0 were made first
            table = tables[eta] = make(trajectory, eta)
        return table

    return cached


class Trajectory:
    """Coefficients along a sequence of timesteps, derived in float64.

    Args:
        log_alphas: log(1 - beta) of the training chain, (T,).
        timesteps: timesteps of the trajectory in ascending order, (K,) in [0, T).
        prediction_type: prediction target of the network.
        variance_type: type of the reverse variance.
        x_0_mse: mean squared error m_t at the timesteps, (K,), for calibrated variances; or None.

    Attributes:
        log_alpha_bar, log_alpha_bar_prev: log of alpha_bar at t and at prev, (K,).
        signal, sigma: sqrt(alpha_bar) and sqrt(1 - alpha_bar), (K,).
        log_alpha, beta: log(alpha_bar / alpha_bar_prev), and 1 minus this ratio, (K,).
        noise_ratio: (1 - alpha_bar_prev) / (1 - alpha_bar), (K,).
        last: the timestep of the last step.
    """

    def __init__(
        self,
        log_alphas: Array,
        timesteps: Steps,
        prediction_type: str,
        variance_type: str,
        x_0_mse: Array | None = None,
    ) -> None:
        self.timesteps, self.num_train_timesteps = timesteps, len(log_alphas)
        self.prediction_type, self.variance_type = prediction_type, variance_type
        self.is_learned = is_learned(variance_type)
        self.x_0_mse = x_0_mse
        self.has_pixel_variance = self.is_learned and x_0_mse is not None
        self._log_alphas = log_alphas
        self.log_alpha_bar = log_alphas.cumsum()[timesteps]
        self.log_alpha_bar_prev = np.concatenate([[0.0], self.log_alpha_bar[:-1]])
        self.signal = np.exp(self.log_alpha_bar / 2)
        self.sigma = np.sqrt(-np.expm1(self.log_alpha_bar))
        # log(alpha_bar_t / alpha_bar_prev) as a sum: a difference of large numbers loses digits.
        first_of_segment = np.concatenate([[0], timesteps[:-1] + 1])
        self.log_alpha = np.add.reduceat(log_alphas[: timesteps[-1] + 1], first_of_segment)
        self.beta = -np.expm1(self.log_alpha)
        self.noise_ratio = np.expm1(self.log_alpha_bar_prev) / np.expm1(self.log_alpha_bar)
        self.noise_ratio[0] = 0.0  # not -0.0: 1 / variance must be inf, not -inf
        steps: list[int] = timesteps.tolist()
        self.last = steps[0]
        self._previous = dict(zip(steps, [-1, *steps[:-1]], strict=True))
        self.tables_by_eta: dict[str, dict[float, Any]] = {
            "reverse": {}, "bound_term": {}, "pixel_variance": {}
        }  # fmt: skip

    def previous(self, t: Timestep) -> int:
        """The next timestep of sampling after `t`; -1, the clean image, after the last."""
        if (host_t := coefficient_tables.as_int(t)) not in self._previous:
            raise ValueError(f"`timestep` must be in {self._timesteps_name}, got {host_t}")
        return self._previous[host_t]

    @property
    def _timesteps_name(self) -> str:
        steps, T = self.timesteps, self.num_train_timesteps
        hint = f"; call set_timesteps({T}) on a copy of the scheduler for all timesteps"
        return (
            f"scheduler.timesteps ({len(steps)} values from {steps[-1]} to {steps[0]}"
            f"{hint if len(steps) < T else ''})"
        )

    def _table(
        self, kind: Callable[..., coefficient_tables.Coefficients], *columns: Array
    ) -> CoefficientTable[coefficient_tables.Coefficients]:
        T, name = self.num_train_timesteps, self._timesteps_name
        return CoefficientTable(kind, columns, self.timesteps, T, name)

    @cached_property
    def forward(self) -> CoefficientTable[ForwardStep]:
        """q(x_t | x_prev) (eq. 2)."""
        return self._table(ForwardStep, np.exp(self.log_alpha / 2), np.sqrt(self.beta))

    @cached_property
    def posterior(self) -> CoefficientTable[Posterior]:
        """q(x_prev | x_t, x_0) (eq. 7)."""
        return self._table(Posterior, *self._mean_coefficients(1.0), *self._posterior_variance())

    @cached_property
    def reverse_variance(self) -> CoefficientTable[ReverseVariance]:
        """Variance of p(x_prev | x_t)."""
        return self._table(ReverseVariance, *self._reverse_variance(1.0))

    @cached_property
    def inversion(self) -> CoefficientTable[InversionStep]:
        """DDIM inversion: the step of 2010.02502, eq. 12 with sigma = 0, in reverse order."""
        coef_x_t = self.sigma[1:] / self.sigma[:-1]
        coef_x_0 = self.signal[1:] - coef_x_t * self.signal[:-1]
        steps, T, name = self.timesteps[:-1], self.num_train_timesteps, "scheduler.timesteps[1:]"
        return CoefficientTable(InversionStep, (coef_x_0, coef_x_t), steps, T, name)

    @cached_by_eta
    def reverse(self, eta: float) -> CoefficientTable[ReverseStep]:
        """A sampling step: estimate of x_0, mean and standard deviation of p(x_prev | x_t)."""
        _, log_variance, slope = self._reverse_variance(eta)
        std = eta * np.exp(log_variance / 2)
        std[0] = 0.0  # the last step returns the mean
        return self._table(
            ReverseStep,
            *self._x_0_coefficients(),
            *self._mean_coefficients(eta),
            std,
            np.exp(slope / 2),
        )

    @cached_by_eta
    def bound_term(self, eta: float) -> CoefficientTable[BoundTerm]:
        """A term of the variational bound (2006.11239, eq. 5; 2010.02502, eq. 11)."""
        coef_x_0, _ = self._mean_coefficients(eta)
        _, log_variance = self._posterior_variance()
        _, log_variance_p, slope = self._reverse_variance(eta)
        weight = (coef_x_0 / eta) ** 2 * np.exp(-log_variance) / 2
        scale = np.ldexp(1.0, np.frexp(weight)[1] // 2)
        log_ratio, is_last = log_variance - log_variance_p, np.arange(len(log_variance)) == 0
        log_variance = log_variance + np.where(is_last, 0.0, 2 * np.log(eta))  # eta^2 beta~
        weight = weight / scale**2
        return self._table(BoundTerm, scale, weight, log_ratio, -slope, log_variance, is_last)

    @cached_by_eta
    def pixel_variance(self, eta: float) -> CoefficientTable[PixelVariance]:
        """The calibrated variance where the network predicts v."""
        all_t = np.arange(self.num_train_timesteps)
        chain = Trajectory(self._log_alphas, all_t, self.prediction_type, self.variance_type)
        _, log_ratio, slope = chain._reverse_variance(1.0)
        small, _ = chain._posterior_variance()
        log_ratio[1:] -= np.log(small[1:])
        return self._table(
            PixelVariance,
            self.noise_ratio * self.beta,
            self._calibrated_variance(eta),
            log_ratio[self.timesteps],
            slope[self.timesteps],
            self.timesteps == 0,
        )

    def _x_0_coefficients(self) -> tuple[Array, Array]:
        """Factors of output and x_t in the estimate of x_0: eq. 15; for v 2202.00512, app. D."""
        signal, sigma = self.signal, self.sigma
        if self.prediction_type == "epsilon":
            return -sigma / signal, 1 / signal
        if self.prediction_type == "v_prediction":
            return -sigma, signal
        return np.ones_like(sigma), np.zeros_like(sigma)

    def _mean_coefficients(self, eta: float) -> tuple[Array, Array]:
        """coef_x_0 and coef_x_t of eq. 7; for eta < 1 of 2010.02502, eq. 12 and 16.

        In eq. 12, eps is expressed by x_t and x_0:

            coef_x_t = sqrt(1 - alpha_bar_prev - sigma^2) / sqrt(1 - alpha_bar_t)
            coef_x_0 = sqrt(alpha_bar_prev) - coef_x_t sqrt(alpha_bar_t)

        With g = alpha_t (1 - alpha_bar_prev) / (1 - alpha_bar_t) and k = 1 - eta^2 + eta^2 g, sigma
        of eq. 16 gives 1 - alpha_bar_prev - sigma^2 = (1 - alpha_bar_prev) k. The difference in
        coef_x_0 is then sqrt(alpha_bar_prev) (1 - sqrt(g k)), which is computed as a product by
        1 - g k = (1 - g) (1 + eta^2 g).
        """
        g = np.exp(self.log_alpha) * self.noise_ratio
        one_minus_g = self.beta / -np.expm1(self.log_alpha_bar)
        k = (1 - eta**2) + eta**2 * g
        coef_x_0 = np.exp(self.log_alpha_bar_prev / 2) * one_minus_g
        coef_x_0 *= (1 + eta**2 * g) / (1 + np.sqrt(g * k))  # 1 for eta = 1
        return coef_x_0, np.sqrt(self.noise_ratio * k)

    def _posterior_variance(self) -> tuple[Array, Array]:
        """beta~_t of eq. 7, and its log.

        At the last step of the trajectory, where beta~ is 0, the log is that of the step before
        (2102.09672), or of beta_t if the trajectory has a single step.
        """
        variance = self.noise_ratio * self.beta
        neighbour = variance[1] if len(variance) > 1 else self.beta[0]
        return variance, np.log(np.concatenate([[neighbour], variance[1:]]))

    def _reverse_variance(self, eta: float) -> tuple[Array, Array, Array]:
        """Variance, log-variance and slope of v, divided by eta^2.

        For eta < 1, a variance that is not calibrated is beta~ for every variance type (2010.02502,
        eq. 16), except at the last step of the trajectory, whose variance serves the decoder.
        At that step, "fixed_large" also has the beta~ of the step before.
        """
        (small, log_small), log_large = self._posterior_variance(), np.log(self.beta)
        zero, one = np.zeros_like(small), np.ones_like(small)
        if self.x_0_mse is not None and not self.is_learned and eta > 0:
            variance = small + self._calibrated_variance(eta)
            is_positive = variance > 0  # false at the last step if the network makes no error
            log_var = np.where(is_positive, np.log(np.where(is_positive, variance, 1.0)), log_small)
            return variance, log_var, zero
        if self.variance_type.startswith("fixed_small"):
            return small, log_small, zero
        if eta < 1 and not self.has_pixel_variance:
            _, log_var, slope = self._reverse_variance(1.0)
            log_var = np.concatenate([log_var[:1], log_small[1:]])
            return np.exp(log_var), log_var, np.concatenate([slope[:1], zero[1:]])
        if self.variance_type.startswith("fixed_large"):
            log_var = np.concatenate([log_small[:1], log_large[1:]])
            return np.exp(log_var), log_var, zero
        nan = one * np.nan  # the network predicts the log-variance
        if self.variance_type == "learned" or self.has_pixel_variance:
            return nan, zero, one
        mid, half = (log_large + log_small) / 2, (log_large - log_small) / 2  # 2102.09672, eq. 15
        return nan, mid, half

    def _calibrated_variance(self, eta: float) -> Array:
        """Variance that the unknown x_0 adds to x_prev, coef_x_0^2 m_t, divided by eta^2.

        The variance of q(x_prev | x_t) is the variance of q(x_prev | x_t, x_0) plus the variance of
        its mean over x_0 (2201.06503, theorem 1). At the last step, x_prev is x_0 for any eta, and
        the variance is m_t.
        """
        coef_x_0, _ = self._mean_coefficients(eta)
        return np.concatenate([[1.0], coef_x_0[1:] / eta]) ** 2 * self.x_0_mse
