"""Settings of a network for inference, and the result of `optimize`."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import torch

_MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class InferenceSettings:
    """Settings that a network runs with. They affect speed and the last bits of its outputs.

    Attributes:
        memory_format: format of the weights, "contiguous" or "channels_last".
        dtype: dtype of weights and arithmetic, such as "float32".
        compile: whether the network is compiled by `torch.compile`.
        tf32: whether float32 products on a CUDA device are computed in TF32.
        num_threads: number of CPU threads per operation.
    """

    memory_format: str
    dtype: str
    compile: bool
    tf32: bool
    num_threads: int

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Settings from the JSON values of `settings_dict`."""
        return cls(**{field.name: values[field.name] for field in fields(cls)})

    def settings_dict(self) -> dict[str, str | bool | int]:
        """The settings as JSON values."""
        return {field.name: getattr(self, field.name) for field in fields(InferenceSettings)}

    def arguments(self) -> dict[str, Any]:
        """Arguments of `optimize` that request these settings."""
        memory_format, dtype = _MEMORY_FORMATS[self.memory_format], getattr(torch, self.dtype)
        return {**self.settings_dict(), "memory_format": memory_format, "dtype": dtype}


@dataclass(frozen=True)
class OptimizedInference(InferenceSettings):
    """Settings that `optimize` applied, with their measured effect; prints as one line.

    Attributes:
        speed_up: time of a call before over time of a call now; None if it was not measured.
        deviation: largest difference between outputs before and now, over the largest output.
        notes: settings that were not applied, each with the reason.
        guide: result for the network of a guide, if there is one.
    """

    speed_up: float | None
    deviation: float
    notes: tuple[str, ...] = ()
    guide: "OptimizedInference | None" = None

    def to_dict(self) -> dict[str, Any]:
        """Settings and measurements of the network, without its guide, as JSON values."""
        measured = {"speed_up": self.speed_up, "deviation": self.deviation}
        return {**self.settings_dict(), **measured, "notes": list(self.notes)}

    def __str__(self) -> str:
        parts = [
            self.dtype + " with TF32" * self.tf32,
            self.memory_format,
            "compiled" if self.compile else "not compiled",
            f"{self.num_threads} thread" + "s" * (self.num_threads != 1),
            *([f"{self.speed_up:.2f} times as fast"] if self.speed_up else []),
            f"outputs within {self.deviation:.1g} of those before",
        ]
        return "; ".join([", ".join(parts), *self.notes])
