"""Figures of samples during training: values for the log, records for the card, and copies."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

from ddpm_hf.evaluation.figures import NORMAL_95, MetricResult
from ddpm_hf.run_record import MetricRecord, SampleSetup
from ddpm_hf.utils.text import counted

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
        fd, copies = (_logged(entry, name) for name in _NAMES)
        return None if fd is None or copies is None else cls(fd, copies, setup)

    def log_values(self) -> dict[str, float]:
        """The values in metrics.jsonl."""
        return {
            key: getattr(getattr(self, name), field)
            for name in _NAMES
            for field, key in _log_keys(name).items()
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
            type=kind,
            name=name,
            value=figure.value,
            standard_error=figure.standard_error,
            how=how,
            args={"samples": setup},
        )

    @property
    def are_copies(self) -> bool:
        """Whether samples copy training images, more than real images and chance do."""
        share, count = self.copies.value, self.setup.num_images
        # The training images are given: halves of few of them would have other near distances.
        error = math.sqrt(share * (1 - share) / count)
        return share - NORMAL_95 * error > max(self.copies.half_real, _MIN_COPIES)


_NAMES = ("fd", "copies")


def _log_keys(name: str) -> dict[str, str]:
    """Keys of a figure in the log, by field of `SampleFigure`."""
    others = ("standard_error", "half", "half_real")
    return {"value": f"evaluation_{name}", **{f: f"evaluation_{name}_{f}" for f in others}}


def _logged(entry: Mapping[str, object], name: str) -> SampleFigure | None:
    """A figure in an entry of the log; None if a value is missing."""
    values = [v for key in _log_keys(name).values() if isinstance(v := entry.get(key), float)]
    return SampleFigure(*values) if len(values) == 4 else None
