"""Result of `calibrate_checkpoint`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ddpm_hf.evaluation.comparison_results import Sweep
from ddpm_hf.evaluation.figures import BoundPart, DatasetFacts, ModelSourceFacts
from ddpm_hf.evaluation.records import Record, Row, excluded, optional, renamed
from ddpm_hf.evaluation.results import Result, package_versions, utc_now
from ddpm_hf.text import counted

_STEPS_COLUMNS = {
    "bits_per_dim": "evenly spaced",
    "at_best_timesteps": "best timesteps",
    "published": "as published",
}


@dataclass(frozen=True, kw_only=True)
class StepsRow(Record):
    """Predicted bits/dim of K steps.

    Attributes:
        bits_per_dim, standard_error: evenly spaced timesteps, calibrated variances.
        at_best_timesteps: at the timesteps of the least bound, if searched.
        published: with the variances of `variance_type`, if these are fixed.
    """

    num_inference_steps: int
    bits_per_dim: float
    standard_error: float | None
    at_best_timesteps: float | None = optional()
    published: float | None = optional()


@dataclass(frozen=True, kw_only=True)
class MeasuredBound(BoundPart):
    """Bound of the whole chain with the variances of `variance_type`."""

    variance_type: str


Timesteps = dict[str, dict[int, list[int]]]
"""Timesteps by sampler and number of steps."""


@dataclass(frozen=True, kw_only=True)
class CalibrationCurve(Record):
    """Error curve of a network and the bits/dim that follow from it.

    Attributes:
        num_images, indices: images that were measured.
        seed: of the noise.
        x_0_mse: (T,), mean squared error of the estimate of x_0.
        standard_error: (T,); None for one image.
        steps: predicted bits/dim, the fewest steps first.
        measured: bound of the whole chain.
        remarks: caveats.
        seconds: duration.
        calibrated_timesteps: if asked for.
    """

    name: Literal["calibration"] = "calibration"
    num_images: int
    indices: tuple[int, ...]
    seed: int
    x_0_mse: tuple[float, ...]
    standard_error: tuple[float | None, ...]
    steps: tuple[StepsRow, ...] = renamed("rows")
    measured: MeasuredBound
    remarks: tuple[str, ...]
    seconds: float
    calibrated_timesteps: Timesteps | None = optional()


@dataclass(frozen=True, kw_only=True, repr=False)
class CheckpointCalibration(Result):
    """Result of `calibrate_checkpoint`.

    Attributes:
        results: the curve, then the sweep if asked for.
        options, command: not recorded.
        versions, created: see `Evaluation`.
        file, scheduler_config, card: files that were written, the card if asked for.
    """

    format_version: Literal[1] = 1
    model: ModelSourceFacts
    dataset: DatasetFacts
    results: tuple[CalibrationCurve | Sweep, ...]
    options: dict[str, str] = field(default_factory=dict)
    command: str | None = None
    versions: dict[str, str] = field(default_factory=package_versions)
    created: str = field(default_factory=utc_now)
    file: Path | None = excluded()
    scheduler_config: Path | None = excluded()
    card: Path | None = excluded()

    @property
    def curve(self) -> CalibrationCurve:
        """The error curve."""
        return next(r for r in self.results if isinstance(r, CalibrationCurve))

    @property
    def sweep(self) -> Sweep | None:
        """The sweep over samplers, if asked for."""
        return next((r for r in self.results if isinstance(r, Sweep)), None)

    @property
    def image_source(self) -> str:
        """Description of the measured images, such as "256 images of photos, test"."""
        dataset, count = self.dataset, counted(self.curve.num_images, "image")
        return f"{count} of {dataset.name}, {dataset.split}{dataset.held_out_suffix}"

    def rows(self) -> list[Row]:
        """Predicted bits/dim, one row per number of steps."""
        return [row.to_dict() for row in self.curve.steps]

    def __str__(self) -> str:
        lines = [_curve_table(self.curve), f"measured on {self.image_source}"]
        lines += [f"note: {remark}" for remark in self.curve.remarks]
        if self.curve.calibrated_timesteps is not None:
            lines.append(
                "the timesteps suit DDIM and DPM-Solver++ 2M; other samplers were not tested"
            )
        if self.sweep is not None:
            lines += ["", str(self.sweep)]
        return "\n".join(lines)


def _curve_table(curve: CalibrationCurve) -> str:
    """Bits/dim against K, each with the loss against all steps."""
    rows = [row.to_dict() for row in curve.steps]
    columns = {key: title for key, title in _STEPS_COLUMNS.items() if key in rows[0]}
    lines = ["bits/dim of K steps, predicted, and the loss against all steps:", ""]
    lines += [f"{'K':>6}" + "".join(f"  {title:>18}" for title in columns.values())]
    of_all_steps = curve.steps[-1].bits_per_dim
    for row in rows:
        cells = [f"{row[key]:9.3f} {row[key] - of_all_steps:+8.3f}" for key in columns]
        lines.append(f"{row['num_inference_steps']:>6,}" + "".join(f"  {cell}" for cell in cells))
    error = curve.steps[-1].standard_error
    precision = "" if error is None else f"; standard error of the last line {error:.3f}"
    lines += [
        "",
        f"{counted(curve.num_images, 'image')}{precision}; took {curve.seconds:,.0f} s",
        "the best timesteps are best for the bound only: sample at evenly spaced ones",
    ]
    if "published" in columns:
        lines.append("as published: evenly spaced, variances calibrated in the last step only")
    else:
        lines.append("a learned variance adapts to each part of an image, and loses less")
    return "\n".join(lines)
