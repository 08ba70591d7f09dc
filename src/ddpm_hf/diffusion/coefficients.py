"""What follows from betas and timesteps: the coefficients of DDPM's distributions (2006.11239).

Derived in float64 from log(1 - beta), where nothing cancels, and rounded once, to the dtype of the
sample. Notation as in `scheduling.py`, beside which this file travels with the weights.
"""

import operator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, np.dtype[np.float64]]
Steps = np.ndarray[Any, np.dtype[np.int64]]
Timestep = int | Tensor
# A column of a table (K,), in float64; in a row of it a tensor on the sample's device and in its
# dtype, 0-dim for one timestep or (B, 1, ...) for one per image.
Coef = Any


class Marginal(NamedTuple):
    """q(x_t | x_0): x_t = signal x_0 + sigma eps (eq. 4)."""

    signal: Coef
    sigma: Coef
    variance: Coef
    log_variance: Coef
    snr: Coef
    log_snr: Coef


class Forward(NamedTuple):
    """q(x_t | x_prev): x_t = signal x_prev + sigma eps (eq. 2)."""

    signal: Coef
    sigma: Coef


class Posterior(NamedTuple):
    """q(x_prev | x_t, x_0) (eq. 7)."""

    coef_x_0: Coef
    coef_x_t: Coef
    variance: Coef
    log_variance: Coef


class Reverse(NamedTuple):
    """One step of sampling; std is `std * std_base ** v` where the network gives v."""

    x_0_from_output: Coef
    x_0_from_x_t: Coef
    coef_x_0: Coef
    coef_x_t: Coef
    std: Coef
    std_base: Coef


class ReverseVariance(NamedTuple):
    """Variance of p(x_prev | x_t); its log is `log_variance + slope * v` with a network's v."""

    variance: Coef
    log_variance: Coef
    slope: Coef


class Bound(NamedTuple):
    """KL(q || p) of one step is (expm1 r - r)/2 + weight e^r (x_0 - x_0_hat)^2, in nats.

    r = log_ratio + slope * v is log sigma_q^2 - log sigma_p^2, of which log_variance is the former;
    weight is coef_x_0^2 / (2 sigma_q^2): half of what the SNR loses in the step.
    """

    weight: Coef
    log_ratio: Coef
    slope: Coef
    log_variance: Coef
    is_last: Coef


class Inversion(NamedTuple):
    """x_next = coef_x_0 x_0 + coef_x_t x_t, the noiseless step to the next noisier timestep."""

    coef_x_0: Coef
    coef_x_t: Coef


class Table:
    """Coefficients by timestep, as tensors: a number takes twice the time to multiply by.

    Args:
        columns: a named tuple of arrays, (K,) float64.
        timesteps: where the columns stand, (K,) in [0, T).
        num_train_timesteps: T.
        known_as: how an error names the timesteps.
    """

    @torch.inference_mode(False)  # a table made while sampling must serve training later
    def __init__(self, columns: Any, timesteps: Steps, num_train_timesteps: int, known_as: str):
        self.columns, self.timesteps = columns, timesteps
        self._known, self._known_as = frozenset(timesteps.tolist()), known_as
        # On a device a wrong timestep cannot be refused without waiting: it gives NaN.
        table = np.full((num_train_timesteps, len(columns)), np.nan)
        table[timesteps] = np.stack(columns, axis=1)
        self._float64 = torch.from_numpy(table)
        self._on: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._rows: dict[tuple[torch.device, torch.dtype], dict[int, Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A copy makes its own rows: pickled, each of the thousands would bring the whole table.
        return {**self.__dict__, "_rows": {}}

    def at(self, t: Timestep, like: Tensor) -> Any:
        """The row of `t`: 0-dim tensors for one timestep, else tensors that broadcast with `like`.

        Raises:
            ValueError: if a `t` on the host is not in the table, or `t` is no (B,) for this batch.
            TypeError: if `t` is no integer.
        """
        t = host_timestep(t)
        if isinstance(t, Tensor):
            return self._gather(t, like)
        key = (like.device, like.dtype)
        row = (self._rows.get(key) or self._make_rows(*key)).get(t)
        return row if row is not None else self._refuse([t])

    @torch.inference_mode(False)
    def _make_rows(self, device: torch.device, dtype: torch.dtype) -> dict[int, Any]:
        table = self._float64[self.timesteps].to(dtype).to(device)
        rows = (type(self.columns)(*row.unbind()) for row in table.unbind())
        self._rows[device, dtype] = dict(zip(self.timesteps.tolist(), rows, strict=True))
        return self._rows[device, dtype]

    def _gather(self, t: Tensor, like: Tensor) -> Any:
        self._check(t, like)
        rows = torch.nn.functional.embedding(t.to(like.device), self.on(like.device, like.dtype))
        if t.ndim:
            rows = rows.reshape(len(t), rows.shape[-1], *(1,) * (like.ndim - 1))
        return type(self.columns)(*rows.unbind(t.ndim))

    def on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The table as (T, n), moved once per device and dtype."""
        key = (device, dtype)
        if key not in self._on:
            with torch.inference_mode(False):
                self._on[key] = self._float64.to(dtype).to(device)
        return self._on[key]

    def _check(self, t: Tensor, like: Tensor) -> None:
        if t.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"timestep must be of dtype int64 or int32, got {t.dtype}")
        if t.ndim > 1 or (t.ndim == 1 and len(t) not in (1, len(like))):
            raise ValueError(
                f"timestep must be one integer or one per image, ({len(like)},):"
                f" got shape {tuple(t.shape)}"
            )
        if t.device.type == "cpu" and not torch.compiler.is_compiling():
            values = t.tolist()
            if not self._known.issuperset(values):
                self._refuse(sorted({*values} - self._known))

    def _refuse(self, wrong: list[int]) -> None:
        raise ValueError(f"timestep must be in {self._known_as}, got {wrong}")


class ReverseTable(Table):
    """Coefficients of `Reverse`; a std that the host knows to be 0 is None: nothing is drawn."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.draws = bool(self.columns.std.any())

    def _gather(self, t: Tensor, like: Tensor) -> Any:
        row = super()._gather(t, like)
        return row if self.draws else row._replace(std=None)

    def _make_rows(self, device: torch.device, dtype: torch.dtype) -> dict[int, Any]:
        rows = super()._make_rows(device, dtype)
        for t, std in zip(self.timesteps.tolist(), self.columns.std.tolist(), strict=True):
            if std == 0:
                rows[t] = rows[t]._replace(std=None)
        return rows


def host_timestep(t: Any) -> int | Tensor:
    """`t` as an int where the host knows it without asking a device, else the tensor that it is."""
    if torch.compiler.is_compiling():
        return torch.as_tensor(t)  # one graph for all timesteps
    return t if isinstance(t, Tensor) and (t.ndim > 0 or not t.is_cpu) else as_int(t)


def as_int(t: Any) -> int:
    """One timestep as an int, wherever it is; `tolist` of a CPU tensor dispatches no op."""
    value: Any = t.tolist() if isinstance(t, Tensor) else t
    if type(value) is int:
        return value
    try:
        if not isinstance(value, bool | np.bool_):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"timestep must be an integer or a tensor of integers, got {t!r}")


class Trajectory:
    """Everything that depends on which timesteps are visited, derived in float64.

    Args:
        log_alphas: log(1 - beta) of the training schedule, (T,).
        timesteps: visited timesteps, ascending; (K,) in [0, T).
        prediction_type: what the network predicts.
        variance_type: the reverse variance.
    """

    def __init__(
        self, log_alphas: Array, timesteps: Steps, prediction_type: str, variance_type: str
    ) -> None:
        self.timesteps, self.num_train_timesteps = timesteps, len(log_alphas)
        self.prediction_type, self.variance_type = prediction_type, variance_type
        self.is_learned = variance_type.startswith("learned")
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
        self._previous = dict(zip(steps, [-1, *steps[:-1]], strict=True))
        self._reverse: dict[float, Table] = {}
        self._bound: dict[float, Table] = {}

    def previous(self, t: Timestep) -> int:
        """The timestep that follows `t` in sampling; -1, the clean image, after the last."""
        if (host_t := as_int(t)) not in self._previous:
            raise ValueError(f"timestep must be in {self._known_as()}, got {host_t}")
        return self._previous[host_t]

    def _known_as(self) -> str:
        steps, T = self.timesteps, self.num_train_timesteps
        back = f"; set_timesteps({T}), best on a copy, gives the whole chain back"
        return (
            f"scheduler.timesteps ({len(steps)} values, {steps[-1]} to {steps[0]}"
            f"{back if len(steps) < T else ''})"
        )

    def _table(self, columns: Any, kind: type[Table] = Table) -> Table:
        return kind(columns, self.timesteps, self.num_train_timesteps, self._known_as())

    @cached_property
    def forward(self) -> Table:
        """One step of diffusion."""
        return self._table(Forward(np.exp(self.log_alpha / 2), np.sqrt(self.beta)))

    @cached_property
    def posterior(self) -> Table:
        """The posterior of one step."""
        variance, log_variance = self._posterior_variance()
        return self._table(Posterior(*self._mean_coefficients(1.0), variance, log_variance))

    @cached_property
    def reverse_variance(self) -> Table:
        """The variance of one reverse step."""
        return self._table(self._reverse_variance())

    @cached_property
    def inversion(self) -> Table:
        """DDIM's step upwards (2010.02502, eq. 12 at sigma = 0, from t to its next noisier)."""
        coef_x_t = self.sigma[1:] / self.sigma[:-1]
        columns = Inversion(self.signal[1:] - coef_x_t * self.signal[:-1], coef_x_t)
        steps = self.timesteps[:-1]
        return Table(columns, steps, self.num_train_timesteps, "scheduler.timesteps[1:]")

    def reverse(self, eta: float) -> Table:
        """All that `step` needs, for this `eta`."""
        table = self._reverse.get(eta)
        if table is None:
            if len(self._reverse) == 8:  # an eta that changes with every step must not fill memory
                self._reverse.popitem()
            columns = (*self._x_0_coefficients(), *self._mean_coefficients(eta), *self._std(eta))
            table = self._reverse[eta] = self._table(Reverse(*columns), ReverseTable)
        return table

    def bound(self, eta: float) -> Table:
        """What the bound compares, for this `eta` (2006.11239, eq. 5; 2010.02502, eq. 11)."""
        if eta not in self._bound:
            self._bound = {eta: self._make_bound(eta)}  # of the last one: few ask for two
        return self._bound[eta]

    def _make_bound(self, eta: float) -> Table:
        _, log_variance = self._posterior_variance()
        of_p = self._reverse_variance()
        coef_x_0, _ = self._mean_coefficients(eta)
        columns = Bound(
            weight=(coef_x_0 / eta) ** 2 * np.exp(-log_variance) / 2,
            log_ratio=log_variance - of_p.log_variance,
            slope=-of_p.slope,
            log_variance=log_variance,
            is_last=np.arange(len(log_variance)) == 0,
        )
        return self._table(columns)

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

    def _reverse_variance(self) -> ReverseVariance:
        """Variance, log and slope; at the last step "fixed_large" is the neighbour's beta~, too."""
        (small, log_small), log_large = self._posterior_variance(), np.log(self.beta)
        zero, one = np.zeros_like(small), np.ones_like(small)
        if self.variance_type.startswith("fixed_small"):
            return ReverseVariance(small, log_small, zero)
        if self.variance_type.startswith("fixed_large"):
            log_var = np.concatenate([log_small[:1], log_large[1:]])
            return ReverseVariance(np.exp(log_var), log_var, zero)
        nan = one * np.nan  # its log is what the network gives
        if self.variance_type == "learned":
            return ReverseVariance(nan, zero, one)
        mid, half = (log_large + log_small) / 2, (log_large - log_small) / 2  # 2102.09672, eq. 15
        return ReverseVariance(nan, mid, half)

    def _std(self, eta: float) -> tuple[Array, Array]:
        _, log_var, slope = self._reverse_variance()
        std = eta * np.exp(log_var / 2)
        std[0] = 0.0  # the trajectory ends in the mean
        return std, np.exp(slope / 2)


def marginal(log_alphas: Array) -> Table:
    """Coefficients of q(x_t | x_0) for every timestep.

    Args:
        log_alphas: log(1 - beta), (T,).
    """
    log_signal_var = log_alphas.cumsum()
    variance = -np.expm1(log_signal_var)
    log_variance = np.log(variance)
    log_snr = log_signal_var - log_variance
    columns = Marginal(
        signal=np.exp(log_signal_var / 2),
        sigma=np.sqrt(variance),
        variance=variance,
        log_variance=log_variance,
        snr=np.exp(log_snr),
        log_snr=log_snr,
    )
    T = len(log_alphas)
    return Table(columns, np.arange(T), T, f"0..{T - 1}")
