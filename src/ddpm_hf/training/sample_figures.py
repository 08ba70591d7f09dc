"""Figures of samples during training: values for the log, records for the card, and copies."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Self

from ddpm_hf.evaluation.figures import NORMAL_95, MetricResult
from ddpm_hf.run_record import MetricRecord, SampleSetup
from ddpm_hf.text import counted

# Chance gives 1 % of copies: few samples reach 3 or 4 %.
_MIN_COPIES = 0.05


@dataclass(frozen=True)
class SampleFigure:
    """A figure of samples with its floor; see `evaluation.figures.MetricResult`.

    Attributes:
        value: of all samples.
        standard_error: of the value.
        half: mean over random halves of the samples.
        half_real: the same for as many real images, the floor.
    """

    value: float
    standard_error: float
    half: float
    half_real: float


@dataclass(frozen=True)
class SampleFigures:
    """Comparison of samples with the training images.

    Attributes:
        fd: Frechet distance.
        copies: share of samples that are closer to a training image than 99 % of the training
            images are to another one.
        setup: how they were measured.
    """

    fd: SampleFigure
    copies: SampleFigure
    setup: SampleSetup

    @classmethod
    def of(cls, results: Iterable[MetricResult], setup: SampleSetup) -> Self:
        """The figures in the results of `evaluation.metrics.measure`."""
        figures = {
            result.name: SampleFigure(
                result.value, result.standard_error, result.floor.drawn, result.floor.real
            )
            for result in results
        }
        return cls(figures["fd"], figures["copies"], setup)

    @classmethod
    def logged(cls, entry: Mapping[str, object], setup: SampleSetup) -> Self | None:
        """The figures in an entry of the log; None if one is missing."""
        keys = _log_keys("")
        values = {name: [entry.get(f"evaluation_{name}{key}") for key in keys] for name in _NAMES}
        figures = {
            name: SampleFigure(*numbers)
            for name, found in values.items()
            if len(numbers := [value for value in found if isinstance(value, float)]) == len(keys)
        }
        return cls(**figures, setup=setup) if len(figures) == len(_NAMES) else None

    def log_values(self) -> dict[str, float]:
        """The values in metrics.jsonl."""
        return {
            key: value
            for name in _NAMES
            for key, value in zip(
                _log_keys(f"evaluation_{name}"), asdict(getattr(self, name)).values(), strict=True
            )
        }

    def records(self) -> list[MetricRecord]:
        """The values in the model card."""
        return [
            self._record("fd", "Frechet distance", self.fd),
            self._record("copies", "share of copies", self.copies),
        ]

    def _record(self, kind: str, label: str, figure: SampleFigure) -> MetricRecord:
        setup = self.setup
        how = (
            f"{counted(setup.num_images, 'sample')} of {setup.num_inference_steps} steps (DDIM) "
            f"against the training images, standard error {figure.standard_error:.2g}; random "
            f"halves {figure.half:.4g}, real ones {figure.half_real:.4g}; measured by the trainer"
        )
        name = f"{label} ({setup.features}, during training)"
        return MetricRecord(
            kind, name, figure.value, figure.standard_error, how, {"samples": setup}
        )

    @property
    def are_copies(self) -> bool:
        """Whether samples copy training images, more than real images and chance do."""
        share, count = self.copies.value, self.setup.num_images
        # The training images are given: halves of few of them would have other near distances.
        error = math.sqrt(share * (1 - share) / count)
        return share - NORMAL_95 * error > max(self.copies.half_real, _MIN_COPIES)


_NAMES = ("fd", "copies")


def _log_keys(prefix: str) -> list[str]:
    """Keys of the log for the fields of a `SampleFigure`."""
    return [prefix, *(f"{prefix}_{name}" for name in ("standard_error", "half", "half_real"))]
