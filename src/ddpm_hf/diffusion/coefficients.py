"""What follows from betas and timesteps: the coefficients of DDPM's distributions (2006.11239).

Derived in float64 from log(1 - beta), where nothing cancels, and rounded once, to the dtype of the
sample. Notation as in `scheduling.py`, beside which this file travels with the weights.
"""

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import numpy as np
from torch import Tensor

from . import coefficient_tables, schedules

Array = schedules.Array
Steps = schedules.Steps
Timestep = coefficient_tables.Timestep
Table = coefficient_tables.Table

# Rows of tables: tensors on the sample's device and in its dtype, 0-dim for one timestep or
# (B, 1, ...) for one per image.


class Marginal(NamedTuple):
    """q(x_t | x_0): x_t = signal x_0 + sigma eps (eq. 4)."""

    signal: Tensor
    sigma: Tensor
    variance: Tensor
    log_variance: Tensor
    snr: Tensor
    log_snr: Tensor


class Forward(NamedTuple):
    """q(x_t | x_prev): x_t = signal x_prev + sigma eps (eq. 2)."""

    signal: Tensor
    sigma: Tensor


class Posterior(NamedTuple):
    """q(x_prev | x_t, x_0) (eq. 7)."""

    coef_x_0: Tensor
    coef_x_t: Tensor
    variance: Tensor
    log_variance: Tensor


class Reverse(NamedTuple):
    """One step of sampling; std is `std * std_base ** v` where the network gives v."""

    x_0_from_output: Tensor
    x_0_from_x_t: Tensor
    coef_x_0: Tensor
    coef_x_t: Tensor
    std: Tensor
    std_base: Tensor


class ReverseVariance(NamedTuple):
    """Variance of p(x_prev | x_t); its log is `log_variance + slope * v` with a network's v."""

    variance: Tensor
    log_variance: Tensor
    slope: Tensor


class Bound(NamedTuple):
    """KL(q || p) of one step is (expm1 r - r)/2 + weight e^r (x_0 - x_0_hat)^2, in nats.

    r = log_ratio + slope * v is log sigma_q^2 - log sigma_p^2, of which log_variance is the former;
    weight is coef_x_0^2 / (2 sigma_q^2): half of what the SNR loses in the step.
    """

    weight: Tensor
    log_ratio: Tensor
    slope: Tensor
    log_variance: Tensor
    is_last: Tensor


class Sharing(NamedTuple):
    """Variance of p where m_t is measured and the network's v says how it is shared out.

    log_ratio + slope * v is log(sigma^2 / beta~) by v at the training spacing; at t = 0 log sigma^2
    itself. `known` is beta~ of this trajectory, `added` what m_t adds, both over eta^2.
    """

    known: Tensor
    added: Tensor
    log_ratio: Tensor
    slope: Tensor
    is_zero: Tensor


class Inversion(NamedTuple):
    """x_next = coef_x_0 x_0 + coef_x_t x_t, the noiseless step to the next noisier timestep."""

    coef_x_0: Tensor
    coef_x_t: Tensor


def is_learned(variance_type: str | None) -> bool:
    """Whether the network predicts the reverse variance in a second half of output channels."""
    return variance_type is not None and variance_type.startswith("learned")


class Trajectory:
    """Everything that depends on which timesteps are visited, derived in float64.

    Args:
        log_alphas: log(1 - beta) of the training schedule, (T,).
        timesteps: visited timesteps, ascending; (K,) in [0, T).
        prediction_type: what the network predicts.
        variance_type: the reverse variance.
        x_0_mse: m_t at the timesteps, (K,), for the variances of the least bound; or None.
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
        self.is_shared = self.is_learned and x_0_mse is not None
        self._log_alphas = log_alphas
        self.log_alpha_bar = log_alphas.cumsum()[timesteps]
        self.log_alpha_bar_prev = np.concatenate([[0.0], self.log_alpha_bar[:-1]])
        self.signal = np.exp(self.log_alpha_bar / 2)
        self.sigma = np.sqrt(-np.expm1(self.log_alpha_bar))
        # log(alpha_bar_t / alpha_bar_prev), summed: a difference of large numbers loses digits.
        first_of_segment = np.concatenate([[0], timesteps[:-1] + 1])
        self.log_alpha = np.add.reduceat(log_alphas[: timesteps[-1] + 1], first_of_segment)
        self.beta = -np.expm1(self.log_alpha)
        # (1 - alpha_bar_prev) / (1 - alpha_bar_t)
        self.noise_ratio = np.expm1(self.log_alpha_bar_prev) / np.expm1(self.log_alpha_bar)
        self.noise_ratio[0] = 0.0  # not -0.0, of which 1 / variance would be -inf
        steps: list[int] = timesteps.tolist()
        self.last = steps[0]
        self._previous = dict(zip(steps, [-1, *steps[:-1]], strict=True))
        self._reverse: dict[float, Table[Reverse]] = {}
        self._bound: dict[float, Table[Bound]] = {}
        self._sharing: dict[float, Table[Sharing]] = {}

    def previous(self, t: Timestep) -> int:
        """The timestep that follows `t` in sampling; -1, the clean image, after the last."""
        if (host_t := coefficient_tables.as_int(t)) not in self._previous:
            raise ValueError(f"timestep must be in {self._known_as}; got {host_t}")
        return self._previous[host_t]

    @property
    def _known_as(self) -> str:
        steps, T = self.timesteps, self.num_train_timesteps
        back = f"; set_timesteps({T}), best on a copy, gives the whole chain back"
        return (
            f"scheduler.timesteps ({len(steps)} values, {steps[-1]} to {steps[0]}"
            f"{back if len(steps) < T else ''})"
        )

    def _table(
        self, row: Callable[..., coefficient_tables.Row], **columns: Array
    ) -> Table[coefficient_tables.Row]:
        return Table(row, columns, self.timesteps, self.num_train_timesteps, self._known_as)

    @cached_property
    def forward(self) -> Table[Forward]:
        """One step of diffusion."""
        return self._table(Forward, signal=np.exp(self.log_alpha / 2), sigma=np.sqrt(self.beta))

    @cached_property
    def posterior(self) -> Table[Posterior]:
        """The posterior of one step."""
        coef_x_0, coef_x_t = self._mean_coefficients(1.0)
        variance, log_variance = self._posterior_variance()
        return self._table(
            Posterior,
            coef_x_0=coef_x_0,
            coef_x_t=coef_x_t,
            variance=variance,
            log_variance=log_variance,
        )

    @cached_property
    def reverse_variance(self) -> Table[ReverseVariance]:
        """The variance of one reverse step."""
        variance, log_variance, slope = self._reverse_variance(1.0)
        return self._table(
            ReverseVariance, variance=variance, log_variance=log_variance, slope=slope
        )

    @cached_property
    def inversion(self) -> Table[Inversion]:
        """DDIM's step upwards (2010.02502, eq. 12 at sigma = 0, from t to its next noisier)."""
        coef_x_t = self.sigma[1:] / self.sigma[:-1]
        coef_x_0 = self.signal[1:] - coef_x_t * self.signal[:-1]
        columns = {"coef_x_0": coef_x_0, "coef_x_t": coef_x_t}
        steps = self.timesteps[:-1]
        return Table(Inversion, columns, steps, self.num_train_timesteps, "scheduler.timesteps[1:]")

    def reverse(self, eta: float) -> Table[Reverse]:
        """All that `step` needs, for this `eta`."""
        table = self._reverse.get(eta)
        if table is None:
            if len(self._reverse) == 8:  # an eta that changes with every step must not fill memory
                self._reverse.popitem()  # the newest: 1 and 0, which the scheduler made first, stay
            table = self._reverse[eta] = self._make_reverse(eta)
        return table

    def _make_reverse(self, eta: float) -> Table[Reverse]:
        x_0_from_output, x_0_from_x_t = self._x_0_coefficients()
        coef_x_0, coef_x_t = self._mean_coefficients(eta)
        std, std_base = self._std(eta)
        return self._table(
            Reverse,
            x_0_from_output=x_0_from_output,
            x_0_from_x_t=x_0_from_x_t,
            coef_x_0=coef_x_0,
            coef_x_t=coef_x_t,
            std=std,
            std_base=std_base,
        )

    def bound(self, eta: float) -> Table[Bound]:
        """What the bound compares, for this `eta` (2006.11239, eq. 5; 2010.02502, eq. 11)."""
        if eta not in self._bound:
            self._bound = {eta: self._make_bound(eta)}  # of the last one: few ask for two
        return self._bound[eta]

    def _make_bound(self, eta: float) -> Table[Bound]:
        _, log_variance = self._posterior_variance()
        _, log_variance_p, slope = self._reverse_variance(eta)
        coef_x_0, _ = self._mean_coefficients(eta)
        return self._table(
            Bound,
            weight=(coef_x_0 / eta) ** 2 * np.exp(-log_variance) / 2,
            log_ratio=log_variance - log_variance_p,
            slope=-slope,
            log_variance=log_variance,
            is_last=np.arange(len(log_variance)) == 0,
        )

    def sharing(self, eta: float) -> Table[Sharing]:
        """How a measured m_t and the network's v give the variance, for this `eta`."""
        if eta not in self._sharing:
            self._sharing = {eta: self._make_sharing(eta)}
        return self._sharing[eta]

    def _make_sharing(self, eta: float) -> Table[Sharing]:
        every_t = np.arange(self.num_train_timesteps)
        trained = Trajectory(self._log_alphas, every_t, self.prediction_type, self.variance_type)
        _, log_var, slope = trained._reverse_variance(1.0)
        small, _ = trained._posterior_variance()
        log_var[1:] -= np.log(small[1:])
        return self._table(
            Sharing,
            known=self.noise_ratio * self.beta,
            added=self._mean_variance(eta),
            log_ratio=log_var[self.timesteps],
            slope=slope[self.timesteps],
            is_zero=self.timesteps == 0,
        )

    def _posterior_variance(self) -> tuple[Array, Array]:
        """beta~_t of eq. 7 and its log, the last step's 0 replaced by its neighbour (2102.09672).

        On a trajectory of one step there is no neighbour: its log is that of beta_t.
        """
        variance = self.noise_ratio * self.beta
        neighbour = variance[1] if len(variance) > 1 else self.beta[0]
        return variance, np.log(np.concatenate([[neighbour], variance[1:]]))

    def _mean_coefficients(self, eta: float) -> tuple[Array, Array]:
        """coef_x_0 and coef_x_t of eq. 7; for eta < 1 of 2010.02502, eq. 12 and 16.

        Eq. 12 with eps written by x_t and x_0. Let g = alpha_t (1 - alpha_bar_prev) /
        (1 - alpha_bar_t); then with eq. 16 1 - alpha_bar_prev - sigma^2 = (1 - alpha_bar_prev) k.
        """
        g = np.exp(self.log_alpha) * self.noise_ratio
        one_minus_g = self.beta / -np.expm1(self.log_alpha_bar)
        k = (1 - eta**2) + eta**2 * g
        coef_x_0 = np.exp(self.log_alpha_bar_prev / 2) * one_minus_g
        # sqrt(alpha_bar_prev) - coef_x_t sqrt(alpha_bar_t) without its difference; 1 at eta = 1.
        coef_x_0 *= (1 + eta**2 * g) / (1 + np.sqrt(g * k))
        return coef_x_0, np.sqrt(self.noise_ratio * k)

    def _x_0_coefficients(self) -> tuple[Array, Array]:
        """x_0 = first * output + second * x_t: eq. 15; for v 2202.00512, appendix D."""
        signal, sigma = self.signal, self.sigma
        if self.prediction_type == "epsilon":
            return -sigma / signal, 1 / signal
        if self.prediction_type == "v_prediction":
            return -sigma, signal
        return np.ones_like(sigma), np.zeros_like(sigma)

    def _reverse_variance(self, eta: float) -> tuple[Array, Array, Array]:
        """Variance, log and slope, in units of eta^2.

        At the last step "fixed_large" is the neighbour's beta~, too.
        """
        (small, log_small), log_large = self._posterior_variance(), np.log(self.beta)
        zero, one = np.zeros_like(small), np.ones_like(small)
        if self.x_0_mse is not None and not self.is_learned and eta > 0:
            variance = small + self._mean_variance(eta)
            is_known = variance > 0  # not where a network without error ends in its mean
            log_var = np.where(is_known, np.log(np.where(is_known, variance, 1.0)), log_small)
            return variance, log_var, zero
        if self.variance_type.startswith("fixed_small"):
            return small, log_small, zero
        if self.variance_type.startswith("fixed_large"):
            log_var = np.concatenate([log_small[:1], log_large[1:]])
            return np.exp(log_var), log_var, zero
        nan = one * np.nan  # its log is what the network gives
        if self.variance_type == "learned" or self.is_shared:
            return nan, zero, one
        mid, half = (log_large + log_small) / 2, (log_large - log_small) / 2  # 2102.09672, eq. 15
        return nan, mid, half

    def _mean_variance(self, eta: float) -> Array:
        """What not knowing x_0 adds to the variance of x_prev: coef_x_0^2 m_t, over eta^2.

        The variance of q(x_prev | x_t), a mean over x_0, is that of q(x_prev | x_t, x_0) plus that
        of its mean (2201.06503, theorem 1). At the last step it is m_t: x_prev is x_0 for any eta.
        """
        coef_x_0, _ = self._mean_coefficients(eta)
        return np.concatenate([[1.0], coef_x_0[1:] / eta]) ** 2 * self.x_0_mse

    def _std(self, eta: float) -> tuple[Array, Array]:
        _, log_var, slope = self._reverse_variance(eta)
        std = eta * np.exp(log_var / 2)
        std[0] = 0.0  # the trajectory ends in the mean
        return std, np.exp(slope / 2)


def marginal(log_alphas: Array) -> Table[Marginal]:
    """Coefficients of q(x_t | x_0) for every timestep.

    Args:
        log_alphas: log(1 - beta), (T,).
    """
    log_signal_var = log_alphas.cumsum()
    variance = -np.expm1(log_signal_var)
    log_variance = np.log(variance)
    log_snr = log_signal_var - log_variance
    columns = {
        "signal": np.exp(log_signal_var / 2),
        "sigma": np.sqrt(variance),
        "variance": variance,
        "log_variance": log_variance,
        "snr": np.exp(log_snr),
        "log_snr": log_snr,
    }
    T = len(log_alphas)
    return Table(Marginal, columns, np.arange(T), T, f"0..{T - 1}")
