"""Result of `calibrate_checkpoint`: the error curve, and bits/dim that follow from it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from ddpm_hf.calibration import STABLE_RELATIVE_ERROR, Calibration
from ddpm_hf.diffusion.timestep_spacings import MAX_LIKELIHOOD_TIMESTEPS
from ddpm_hf.evaluation.comparison_results import Sweep
from ddpm_hf.evaluation.figures import BoundPart, DatasetFacts, ModelSourceFacts, finite
from ddpm_hf.evaluation.results import Report
from ddpm_hf.json_records import Record, Row, excluded, optional, renamed
from ddpm_hf.utils.text import counted

NUM_STEPS = (5, 10, 25, 50, 100, 250)
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


def predicted_steps(calibration: Calibration) -> tuple[StepsRow, ...]:
    """Predicted bits/dim of K steps, the fewest first, and of all T steps."""
    T = len(calibration.scheduler)
    return tuple(_predicted(calibration, K) for K in [K for K in NUM_STEPS if K < T] + [T])


def _predicted(calibration: Calibration, K: int) -> StepsRow:
    predict, scheduler = calibration.bits_per_dim, calibration.scheduler
    even, best, published = predict(K, timestep_spacing="linspace"), None, None
    if 2 <= len(scheduler) <= MAX_LIKELIHOOD_TIMESTEPS:
        best = predict(K, timestep_spacing="likelihood").value
    if not scheduler.learns_variance:
        published = predict(K, timestep_spacing="linspace", published=True).value
    return StepsRow(
        num_inference_steps=K,
        bits_per_dim=even.value,
        standard_error=finite(even.standard_error),
        at_best_timesteps=best,
        published=published,
    )


def calibration_curve(
    calibration: Calibration, indices: Sequence[int], seed: int, seconds: float
) -> CalibrationCurve:
    """The recorded form of a calibration, with predicted bits/dim and caveats.

    Args:
        calibration: of a network.
        indices: images that were measured.
        seed: of the noise.
        seconds: duration of the measurement.
    """
    measured = calibration.measured
    return CalibrationCurve(
        num_images=len(indices),
        indices=tuple(indices),
        seed=seed,
        x_0_mse=tuple(calibration.x_0_mse.tolist()),
        standard_error=tuple(map(finite, calibration.standard_error.tolist())),
        steps=predicted_steps(calibration),
        measured=MeasuredBound(
            value=measured.mean,
            standard_error=finite(measured.standard_error),
            variance_type=calibration.scheduler.config.variance_type,
        ),
        remarks=tuple(_remarks(calibration)),
        seconds=seconds,
    )


def _remarks(calibration: Calibration) -> list[str]:
    """Caveats: too few images, or signs of another schedule."""
    notes = []
    num_images = len(calibration.errors)
    relative = calibration.relative_error
    if num_images == 1:
        notes.append("one image gives no standard error: use 256 for a stable curve")
    elif relative.max() > STABLE_RELATIVE_ERROR:
        t = int(relative.argmax())
        notes.append(
            f"{num_images:,} images are few: the relative standard error at t={t} is"
            f" {relative.max():.0%}; {calibration.num_images_for():,} images would reduce it to"
            f" {STABLE_RELATIVE_ERROR:.0%} everywhere"
        )
    return notes + calibration.mismatch_warnings()


@dataclass(frozen=True, kw_only=True, repr=False)
class CheckpointCalibration(Report):
    """Result of `calibrate_checkpoint`.

    Attributes:
        results: the curve, then the sweep if asked for.
        options, command: not recorded; see `Report` for the rest.
        file, scheduler_config, card: files that were written, the card if asked for.
    """

    _IN_OPTIONS: ClassVar[tuple[str, ...]] = ()

    model: ModelSourceFacts
    dataset: DatasetFacts
    results: tuple[CalibrationCurve | Sweep, ...]
    options: dict[str, str] = field(default_factory=dict)
    command: str | None = None
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
