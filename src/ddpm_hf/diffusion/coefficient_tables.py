"""Coefficients of the distributions of DDPM (2006.11239) at a timestep, and their lookup.

`CoefficientTable.at` returns one of the named tuples below. Their fields are tensors on the device
and in the dtype of the sample: 0-dim for a single timestep, (B, 1, ...) for one timestep per image.
The lookup needs no host-device synchronization. Travels with the weights.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import schedules, timestep_spacings

Array = schedules.Array
Steps = timestep_spacings.Steps
Timestep = int | Tensor
Coefficients = TypeVar("Coefficients", bound=tuple[Tensor, ...])


class Marginal(NamedTuple):
    """q(x_t | x_0): x_t = signal x_0 + sigma eps (eq. 4)."""

    signal: Tensor
    sigma: Tensor
    variance: Tensor
    log_variance: Tensor
    snr: Tensor
    log_snr: Tensor


class ForwardStep(NamedTuple):
    """q(x_t | x_prev): x_t = signal x_prev + sigma eps (eq. 2)."""

    signal: Tensor
    sigma: Tensor


class Posterior(NamedTuple):
    """q(x_prev | x_t, x_0) (eq. 7)."""

    coef_x_0: Tensor
    coef_x_t: Tensor
    variance: Tensor
    log_variance: Tensor


class ReverseStep(NamedTuple):
    """One sampling step; with a learned variance, its std is `std * std_base ** v`.

    x_0_hat = x_0_from_output output + x_0_from_x_t x_t (eq. 15), and
    x_prev = coef_x_0 x_0_hat + coef_x_t x_t + std eps (eq. 7).
    """

    x_0_from_output: Tensor
    x_0_from_x_t: Tensor
    coef_x_0: Tensor
    coef_x_t: Tensor
    std: Tensor
    std_base: Tensor


class ReverseVariance(NamedTuple):
    """Variance of p(x_prev | x_t); a learned one has the log `log_variance + slope * v`."""

    variance: Tensor
    log_variance: Tensor
    slope: Tensor


class BoundTerm(NamedTuple):
    """KL(q || p) of one step, (expm1 r - r)/2 + weight e^r (scale (x_0 - x_0_hat))^2, in nats.

    r = log_ratio + slope * v is log sigma_q^2 - log sigma_p^2; log_variance is log sigma_q^2.
    weight scale^2 is coef_x_0^2 / (2 sigma_q^2): for eta = 1, half the decrease of the SNR in the
    step. scale is a power of 2, which rounds nothing: without clipping, x_0_hat is up to 1e38.
    """

    scale: Tensor
    weight: Tensor
    log_ratio: Tensor
    slope: Tensor
    log_variance: Tensor
    is_last: Tensor


class PixelVariance(NamedTuple):
    """Calibrated variance of p, distributed over the values of an image by the network's v.

    log_ratio + slope * v is log(sigma^2 / beta~) predicted by v for the training chain, and
    log sigma^2 at t = 0. posterior is beta~ of this trajectory, calibrated the mean variance that
    m_t adds; both are divided by eta^2.
    """

    posterior: Tensor
    calibrated: Tensor
    log_ratio: Tensor
    slope: Tensor
    is_zero: Tensor


class InversionStep(NamedTuple):
    """x_next = coef_x_0 x_0 + coef_x_t x_t: the noiseless step to the next noisier timestep."""

    coef_x_0: Tensor
    coef_x_t: Tensor


class CoefficientTable(Generic[Coefficients]):
    """Coefficients per timestep, cached per device and dtype.

    They are tensors: multiplying by a Python number takes twice as long.

    Args:
        kind: named tuple that holds the coefficients of one timestep.
        columns: the fields of `kind` in their order, each (K,) float64.
        timesteps: timesteps of the columns, (K,) in [0, T).
        num_train_timesteps: T.
        timesteps_name: name of these timesteps in error messages.
    """

    @torch.inference_mode(False)  # a table made while sampling must also serve training
    def __init__(
        self,
        kind: Callable[..., Coefficients],
        columns: Sequence[Array],
        timesteps: Steps,
        num_train_timesteps: int,
        timesteps_name: str,
    ) -> None:
        self._kind, self._timesteps_name = kind, timesteps_name
        self._timesteps = frozenset(timesteps.tolist())
        # Refusing an invalid timestep on a device would need a synchronization: it gives NaN.
        table = np.full((num_train_timesteps, len(columns)), np.nan)
        table[timesteps] = np.stack(columns, axis=1)
        self._float64 = torch.from_numpy(table)
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._rows: dict[tuple[int, torch.device, torch.dtype], Coefficients] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Rows are views: each of them would be pickled with the whole table.
        return {**self.__dict__, "_rows": {}}

    def at(self, t: Timestep, like: Tensor) -> Coefficients:
        """Coefficients at `t`, in the dtype and on the device of `like`.

        Returns:
            0-dim tensors for a single timestep; else tensors that broadcast with `like`.

        Raises:
            ValueError: if a timestep on the host is not in the table, or the shape of `t` is not
                (B,).
            TypeError: if `t` is not an integer.
        """
        return self.at_host(host_timestep(t), like)

    def at_host(self, t: Timestep, like: Tensor) -> Coefficients:
        """Same as `at`, for a timestep returned by `host_timestep`."""
        if isinstance(t, Tensor):
            return self._gather(t, like)
        key = (t, like.device, like.dtype)
        return self._rows.get(key) or self._make_rows(*key)

    @torch.inference_mode(False)
    def _make_rows(self, t: int, device: torch.device, dtype: torch.dtype) -> Coefficients:
        """Coefficients at `t`; caches all timesteps at once, much faster than one at a time."""
        if t not in self._timesteps:
            self._refuse([t])
        steps = sorted(self._timesteps)
        table = self._float64[steps].to(dtype).to(device)
        for step, row in zip(steps, table.unbind(), strict=True):
            self._rows[step, device, dtype] = self._kind(*row.unbind())
        return self._rows[t, device, dtype]

    def _gather(self, t: Tensor, like: Tensor) -> Coefficients:
        self._check(t, like)
        rows = torch.nn.functional.embedding(t.to(like.device), self.on(like.device, like.dtype))
        if t.ndim:
            rows = rows.reshape(len(t), rows.shape[-1], *(1,) * (like.ndim - 1))
        return self._kind(*rows.unbind(t.ndim))

    def on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The table, (T, number of coefficients), transferred once per device and dtype."""
        key = (device, dtype)
        if key not in self._tables:
            with torch.inference_mode(False):
                self._tables[key] = self._float64.to(dtype).to(device)
        return self._tables[key]

    def _check(self, t: Tensor, like: Tensor) -> None:
        if t.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"`timestep` must be of dtype int64 or int32, got {t.dtype}")
        if t.ndim > 1 or (t.ndim == 1 and len(t) not in (1, len(like))):
            raise ValueError(
                f"`timestep` must be one integer or have shape ({len(like)},), one per image,"
                f" got shape {tuple(t.shape)}"
            )
        if t.device.type == "cpu" and not is_compiling():
            values = t.tolist()
            if not self._timesteps.issuperset(values):
                self._refuse(sorted({*values} - self._timesteps))

    def _refuse(self, timesteps: list[int]) -> NoReturn:
        raise ValueError(f"`timestep` must be in {self._timesteps_name}, got {timesteps}")


def host_timestep(t: Any) -> int | Tensor:
    """`t` as an int if its value is on the host, else unchanged: reading it would synchronize."""
    if is_compiling():
        return torch.as_tensor(t)  # one graph for all timesteps
    if type(t) is int:  # the most frequent case, without a further call
        return t
    return t if isinstance(t, Tensor) and (t.ndim > 0 or not t.is_cpu) else as_int(t)


def as_int(t: Any) -> int:
    """A single timestep as an int, from any device.

    `tolist` of a CPU tensor dispatches no operation.

    Raises:
        TypeError: if `t` is not an integer.
    """
    value: Any = t.tolist() if isinstance(t, Tensor) else t
    if type(value) is int:
        return value
    try:
        if not isinstance(value, bool | np.bool_):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"`timestep` must be an integer or a tensor of integers, got {t!r}")
