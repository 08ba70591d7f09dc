"""Coefficients looked up by timestep: on the host at no cost, on a device without waiting for it.

Travels with the weights.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any, Generic, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import schedules

Array = schedules.Array
Steps = schedules.Steps
Timestep = int | Tensor
Row = TypeVar("Row", bound=tuple[Tensor, ...])


class Table(Generic[Row]):
    """Coefficients by timestep, as tensors: a number takes twice the time to multiply by.

    Args:
        row: the named tuple of a row.
        columns: its fields in their order, each (K,) float64.
        timesteps: where the columns stand, (K,) in [0, T).
        num_train_timesteps: T.
        known_as: how an error names the timesteps.
    """

    @torch.inference_mode(False)  # a table made while sampling must serve training later
    def __init__(
        self,
        row: Callable[..., Row],
        columns: Mapping[str, Array],
        timesteps: Steps,
        num_train_timesteps: int,
        known_as: str,
    ) -> None:
        self._row, self._known_as = row, known_as
        self._known = frozenset(timesteps.tolist())
        # On a device a wrong timestep cannot be refused without waiting: it gives NaN.
        table = np.full((num_train_timesteps, len(columns)), np.nan)
        table[timesteps] = np.stack([*columns.values()], axis=1)
        self._float64 = torch.from_numpy(table)
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._rows: dict[tuple[int, torch.device, torch.dtype], Row] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A copy makes its own rows: pickled, each of the thousands would bring the whole table.
        return {**self.__dict__, "_rows": {}}

    def at(self, t: Timestep, like: Tensor) -> Row:
        """The row of `t`: 0-dim tensors for one timestep, else tensors that broadcast with `like`.

        Raises:
            ValueError: if a `t` on the host is not in the table, or `t` is no (B,) for this batch.
            TypeError: if `t` is no integer.
        """
        return self.at_host(host_timestep(t), like)

    def at_host(self, t: Timestep, like: Tensor) -> Row:
        """As `at`, of what `host_timestep` returned."""
        if isinstance(t, Tensor):
            return self._gather(t, like)
        key = (t, like.device, like.dtype)
        return self._rows.get(key) or self._make_rows(*key)

    @torch.inference_mode(False)
    def _make_rows(self, t: int, device: torch.device, dtype: torch.dtype) -> Row:
        """The row of `t`; all of them are made at once, in a fraction of the time of one by one."""
        if t not in self._known:
            self._refuse([t])
        steps = sorted(self._known)
        table = self._float64[steps].to(dtype).to(device)
        for step, row in zip(steps, table.unbind(), strict=True):
            self._rows[step, device, dtype] = self._row(*row.unbind())
        return self._rows[t, device, dtype]

    def _gather(self, t: Tensor, like: Tensor) -> Row:
        self._check(t, like)
        rows = torch.nn.functional.embedding(t.to(like.device), self.on(like.device, like.dtype))
        if t.ndim:
            rows = rows.reshape(len(t), rows.shape[-1], *(1,) * (like.ndim - 1))
        return self._row(*rows.unbind(t.ndim))

    def on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The table as (T, n), moved once per device and dtype."""
        key = (device, dtype)
        if key not in self._tables:
            with torch.inference_mode(False):
                self._tables[key] = self._float64.to(dtype).to(device)
        return self._tables[key]

    def _check(self, t: Tensor, like: Tensor) -> None:
        if t.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"timestep must be of dtype int64 or int32, got {t.dtype}")
        if t.ndim > 1 or (t.ndim == 1 and len(t) not in (1, len(like))):
            raise ValueError(
                f"timestep must be one integer or one per image, ({len(like)},):"
                f" got shape {tuple(t.shape)}"
            )
        if t.device.type == "cpu" and not is_compiling():
            values = t.tolist()
            if not self._known.issuperset(values):
                self._refuse(sorted({*values} - self._known))

    def _refuse(self, wrong: list[int]) -> NoReturn:
        raise ValueError(f"timestep must be in {self._known_as}; got {wrong}")


def host_timestep(t: Any) -> int | Tensor:
    """`t` as an int where the host knows it without asking a device, else the tensor that it is."""
    if is_compiling():
        return torch.as_tensor(t)  # one graph for all timesteps
    if type(t) is int:  # most often, and a call less
        return t
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
