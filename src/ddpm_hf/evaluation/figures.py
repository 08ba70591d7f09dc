"""Measured figures, and the facts about model and dataset that belong to them."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from ddpm_hf.data.hold_out import HoldOut
from ddpm_hf.json_records import Record, Row, inlined, optional, renamed

NORMAL_95 = 1.96  # half-width of a 95 % interval in standard errors
Verdict = Literal["worse", "better", "tie"]
Interval = tuple[float, float]


def finite(value: float) -> float | None:
    """None for NaN and infinity, which JSON does not have."""
    return value if math.isfinite(value) else None


@dataclass(frozen=True, kw_only=True)
class Floor(Record):
    """Values of real images and of as many drawn images; means over resamples."""

    real: float
    drawn: float


@dataclass(frozen=True, kw_only=True)
class FeatureNetwork(Record):
    """Feature network; see `evaluation.features.Features`. `dims` is the length of a feature."""

    name: str
    size: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str | None
    dims: int


@dataclass(frozen=True, kw_only=True)
class MeasurementSetup(Record):
    """Origin of the images and features that a metric was computed from.

    Attributes:
        seed: seed of the drawn images and of the resamples.
        num_inference_steps, scheduler: of the drawn images, if known.
        seconds_per_image: drawing time in one process, median over batches.
        reference_split, held_out_split: splits of the real images.
        features: feature network.
        inputs: digest of all features, the seed and the version of this package.
    """

    seed: int
    num_inference_steps: int | None
    scheduler: str | None
    seconds_per_image: float | None
    reference_split: str
    held_out_split: str | None
    features: FeatureNetwork
    inputs: str


@dataclass(frozen=True, kw_only=True)
class ClassResult(Record):
    """A metric for one class; only `note` and the counts if the class has too few images."""

    class_name: str = renamed("class")
    value: float | None
    interval: Interval | None = optional()
    standard_error: float | None = optional()
    floor: Floor | None = optional()
    verdict: Verdict | None = optional()
    note: str
    num_real: int
    num_drawn: int
    floor_between: str | None = optional()
    floor_num_images: tuple[int, int] | None = optional()


@dataclass(frozen=True, kw_only=True)
class MetricResult(Record):
    """A metric between drawn and real images, with its uncertainty and its floor.

    Attributes:
        name, label: of the figure, such as "fd" and "Frechet distance".
        value: of all images.
        interval: 95 % confidence interval.
        standard_error: half-sample jackknife.
        floor: what real images get at `floor_num_images`.
        verdict: drawn images against the floor; "tie" within the 95 % range of chance.
        note: a caveat, or "".
        metric: name of the metric that the figure belongs to, such as "precision-recall".
        halves: values of the random halves.
        num_real, num_drawn: numbers of images.
        num_resamples: number of random halves.
        floor_between: the real images that the floor compares.
        floor_num_images: numbers of reference images and of other images of the floor.
        classes: the same for each class, the worst first.
        setup: origin of the features; None for a bare call of `metrics.measure`.
    """

    name: str
    label: str
    value: float
    interval: Interval
    standard_error: float
    floor: Floor
    verdict: Verdict
    note: str
    metric: str
    halves: tuple[float, ...]
    num_real: int
    num_drawn: int
    num_resamples: int
    floor_between: str
    floor_num_images: tuple[int, int]
    classes: tuple[ClassResult, ...] | None = optional()
    setup: MeasurementSetup | None = inlined()

    @property
    def measured_with(self) -> MeasurementSetup:
        """`setup` of a figure of `evaluate`."""
        if self.setup is None:
            raise ValueError(f"{self.name} was measured from bare features")
        return self.setup

    def rows(self) -> list[Row]:
        """One row, and one for each class."""
        measured: list[tuple[str | None, MetricResult | ClassResult]] = [(None, self)]
        measured += [(of_class.class_name, of_class) for of_class in self.classes or ()]
        return [
            {"name": self.name, "label": self.label, "class": name, **_columns(row)}
            for name, row in measured
        ]


def _columns(measured: MetricResult | ClassResult) -> Row:
    low, high = measured.interval or (None, None)
    floor = measured.floor
    return {
        "value": measured.value,
        "low": low,
        "high": high,
        "standard_error": measured.standard_error,
        "floor_drawn": floor.drawn if floor else None,
        "floor_real": floor.real if floor else None,
        "verdict": measured.verdict,
        "note": measured.note,
        "num_real": measured.num_real,
        "num_drawn": measured.num_drawn,
    }


@dataclass(frozen=True, kw_only=True)
class BoundPart(Record):
    """Mean of a part of the bound, bits/dim; the standard error is None for one image."""

    value: float
    standard_error: float | None


@dataclass(frozen=True, kw_only=True)
class BoundParts(Record):
    """Parts of the bound: prior KL, the KL terms, the decoder, and their sum."""

    prior: BoundPart
    diffusion: BoundPart
    decoder: BoundPart
    total: BoundPart


@dataclass(frozen=True, kw_only=True)
class BoundResult(Record):
    """Variational bound of a dataset, bits/dim.

    Attributes:
        key: digest of everything that determines the result.
        value, standard_error: mean over images; the error is None for one image.
        parts: the same for each part of the bound.
        num_images: N.
        shape: (C, H, W) of the network's input, after padding.
        bit_depth: of the images.
        is_calibrated: whether the scheduler has calibrated variances.
        num_train_timesteps, num_inference_steps: T and K.
        num_timesteps: M, measured terms per image.
        eta: noise of the sampler; None for 1.
        decoder: "exact" or "tanh".
        seed: of the noise.
        seconds_per_image: time of the bound in one process, median over batches.
        timesteps: (K,), descending.
        terms: (K,), mean of each term; the decoder is the last one.
        x_0_mse, eps_mse: (K,), mean squared errors; None where not measured.
        num_measured, num_expected: (K,), measurements at each timestep: of all images, and
            expected per image.
        indices: (N,), of the images.
        total: (N,), bound of each image.
    """

    label: ClassVar[str] = "bits/dim"

    name: Literal["bits-per-dim"] = "bits-per-dim"
    key: str
    value: float
    standard_error: float | None
    parts: BoundParts
    num_images: int
    shape: tuple[int, int, int]
    bit_depth: int
    is_calibrated: bool
    num_train_timesteps: int
    num_inference_steps: int
    num_timesteps: int
    eta: float | None = optional()
    decoder: str
    seed: int
    seconds_per_image: float | None = optional()
    timesteps: tuple[int, ...]
    terms: tuple[float, ...]
    x_0_mse: tuple[float | None, ...]
    eps_mse: tuple[float | None, ...]
    num_measured: tuple[int, ...]
    num_expected: tuple[float, ...]
    indices: tuple[int, ...]
    total: tuple[float, ...]

    @property
    def interval(self) -> Interval:
        """95 % confidence interval."""
        half_width = NORMAL_95 * (self.standard_error or 0.0)
        return self.value - half_width, self.value + half_width

    def rows(self) -> list[Row]:
        """One row."""
        low, high = self.interval
        row: Row = {"name": self.name, "label": self.label, "value": self.value}
        row |= {"low": low, "high": high, "standard_error": self.standard_error}
        return [row | {"num_real": self.num_images}]


@dataclass(frozen=True, kw_only=True)
class ImageFormat(Record):
    """Mode, size and bit depth of the images before padding."""

    mode: str
    height: int
    width: int
    bit_depth: int


@dataclass(frozen=True, kw_only=True)
class DatasetFacts(Record):
    """The dataset of a measurement.

    Attributes:
        name: Hub id or the last part of a path.
        split: split of the held-out images, or the reference split if there are none.
        held_out: images of `split` that training held out, if these were used.
        config_name, revision: of a Hub dataset.
        hub_id: of a Hub dataset.
        image: format of the images.
    """

    name: str
    split: str
    held_out: HoldOut | None = optional()
    config_name: str | None
    revision: str | None
    hub_id: str | None = optional()
    image: ImageFormat | None = optional()

    @property
    def held_out_suffix(self) -> str:
        """Suffix for "20 images of train" if these are the held-out ones."""
        return " that training held out" if self.held_out else ""

    @property
    def trained_on_suffix(self) -> str:
        """Suffix for "380 of train" if the held-out ones are excluded."""
        if self.held_out is None:
            return ""
        return f" without the {self.held_out.num_held_out:,} that training held out"


@dataclass(frozen=True, kw_only=True)
class ModelSourceFacts(Record):
    """Name of a model and its revision on the Hub."""

    name: str
    revision: str | None


@dataclass(frozen=True, kw_only=True)
class ModelFacts(ModelSourceFacts):
    """Name, revision and digest of the weights; the digest is None for a set of images."""

    weights: str | None
