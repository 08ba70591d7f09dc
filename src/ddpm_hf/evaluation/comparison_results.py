"""Results of `compare` and `sweep`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from ddpm_hf.evaluation.figures import DatasetFacts, Floor, Interval, ModelFacts, Verdict
from ddpm_hf.evaluation.results import Report, Result
from ddpm_hf.evaluation_options import ComparisonOptions, EvaluationOptions
from ddpm_hf.json_records import Record, Row, optional
from ddpm_hf.scheduler_spec import readable_names
from ddpm_hf.utils.text import counted

Rank = Literal["best", "tie", ""]
_FIGURES_PER_TABLE = 3
_SETTING_COLUMNS = (
    "setting", "name", "scheduler", "num_inference_steps", "num_network_calls",
    "seconds_per_image",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RankedFigure(Record):
    """A figure of one setting, ranked among all settings.

    Attributes:
        name to num_images: see `MetricResult` and `BoundResult`.
        num_features: dimensions of the features.
        rank: "best"; "tie" if the gap to the best is within chance; else "".
        gap: value minus the best value.
        gap_of_chance: half-width of the 95 % interval of the gap; None if unknown.
    """

    name: str
    label: str
    value: float
    interval: Interval
    standard_error: float | None
    floor: Floor | None = optional()
    floor_num_images: tuple[int, int] | None = optional()
    verdict: Verdict | None = optional()
    note: str | None = optional()
    num_drawn: int | None = optional()
    num_real: int | None = optional()
    num_features: int | None = optional()
    num_images: int | None = optional()
    rank: Rank = ""
    gap: float = 0.0
    gap_of_chance: float | None = None

    @property
    def half_width(self) -> float:
        """Half the width of the confidence interval."""
        low, high = self.interval
        return (high - low) / 2


@dataclass(frozen=True, kw_only=True)
class Setting(Record):
    """A combination of a model, a scheduler and a number of steps, or a set of images.

    Attributes:
        setting: label of the combination.
        name: label of the model or images, if there are several.
        scheduler: None for the model's own.
        num_inference_steps: K; None for images, and for the usual number of the scheduler.
    """

    setting: str
    name: str | None
    scheduler: str | None
    num_inference_steps: int | None

    @classmethod
    def named(cls, name: str | None, scheduler: str | None = None, K: int | None = None) -> Self:
        """Create a setting whose label lists its parts."""
        parts = (name, scheduler, K and f"K = {K:,}")
        label = ", ".join(part for part in parts if part) or "own scheduler"
        return cls(setting=label, name=name, scheduler=scheduler, num_inference_steps=K)


@dataclass(frozen=True, kw_only=True)
class ComparisonRow(Setting):
    """A measured setting.

    Attributes:
        model: the model or images.
        num_network_calls: per image, of drawing it or, without drawn images, of its bound; None
            for images.
        seconds_per_image: of these calls in one process, median over batches.
        folder: of its evaluation.
        figures: by name.
    """

    model: ModelFacts
    num_network_calls: int | None
    seconds_per_image: float | None
    folder: str
    figures: dict[str, RankedFigure]


@dataclass(frozen=True, kw_only=True)
class LeftOut(Setting):
    """A setting that cannot be measured, and why."""

    reason: str


@dataclass(frozen=True, kw_only=True, repr=False)
class SettingsResult(Result):
    """Measured settings of a comparison or a sweep, and those left out."""

    dataset: DatasetFacts
    options: Any
    settings: tuple[ComparisonRow, ...]
    left_out: tuple[LeftOut, ...]

    def rows(self) -> list[Row]:
        """One row per setting and figure."""
        return [
            {key: getattr(row, key) for key in _SETTING_COLUMNS}
            | {"figure": figure.name, "value": figure.value}
            | {"low": figure.interval[0], "high": figure.interval[1]}
            | {"rank": figure.rank, "gap": figure.gap, "gap_of_chance": figure.gap_of_chance}
            for row in self.settings
            for figure in row.figures.values()
        ]

    def __str__(self) -> str:
        return _settings_text(self)


@dataclass(frozen=True, kw_only=True, repr=False)
class Comparison(SettingsResult, Report):
    """Result of `compare`. See `Report` for the rest."""

    _IN_OPTIONS: ClassVar[tuple[str, ...]] = ("metrics", "schedulers", "num_inference_steps")

    metrics: tuple[str, ...]
    schedulers: tuple[str, ...]
    num_inference_steps: tuple[int, ...]
    options: ComparisonOptions
    command: str


@dataclass(frozen=True, kw_only=True)
class SweptSampler(Record):
    """A scheduler and a number of steps, as `recommended` of the scheduler configuration."""

    scheduler: str
    num_inference_steps: int


@dataclass(frozen=True, kw_only=True, repr=False)
class Sweep(SettingsResult):
    """Result of `sweep`.

    Attributes:
        recommended: the cheapest setting that is the best or a tie with it.
        for_stock: the cheapest of these that the `DDPMPipeline` of diffusers can run, if any.
        all_steps: DDPM with all T steps, if measured.
        remarks: sentences about the choice.
    """

    name: Literal["sweep"] = "sweep"
    options: EvaluationOptions
    recommended: SweptSampler
    for_stock: SweptSampler | None
    all_steps: SweptSampler | None
    remarks: tuple[str, ...]

    def __str__(self) -> str:
        chosen = self.recommended
        row = next(row for row in self.settings if SweptSampler.of(row) == chosen)
        label = setting_labels(self.settings)[row.setting]
        recommended = f"recommended: {label} (scheduler {chosen.scheduler})"
        return "\n".join([super().__str__(), "", recommended, *self.remarks])


def sampler_labels(rows: Sequence[Setting]) -> dict[str, str]:
    """By setting, its model and its scheduler in readable words, which may be ""."""
    readable = readable_names({row.scheduler for row in rows if row.scheduler})
    return {
        row.setting: ", ".join(x for x in (row.name, readable.get(row.scheduler or "")) if x)
        for row in rows
    }


def setting_labels(rows: Sequence[Setting]) -> dict[str, str]:
    """By setting, its model, scheduler and number of steps in readable words."""
    samplers = sampler_labels(rows)
    labels = {}
    for row in rows:
        steps = f"K = {row.num_inference_steps:,}" if row.num_inference_steps else ""
        labels[row.setting] = ", ".join(filter(None, (samplers[row.setting], steps))) or row.setting
    return labels


def _settings_text(comparison: SettingsResult) -> str:
    """Settings against figures, each with its interval and its rank, and the floor."""
    rows = comparison.settings
    names = list(dict.fromkeys(name for row in rows for name in row.figures))
    starts = range(0, len(names), _FIGURES_PER_TABLE)
    tables = [_settings_table(rows, names[start : start + _FIGURES_PER_TABLE]) for start in starts]
    return "\n\n".join([*tables, "\n".join(_notes(comparison))])


def _notes(comparison: SettingsResult) -> list[str]:
    dataset = comparison.dataset
    notes = ["value +- half of the 95 % interval; a tie is too close to the best to tell"]
    figures = [figure for row in comparison.settings for figure in row.figures.values()]
    images = [figure for figure in figures if figure.num_drawn is not None]
    if images:
        notes += _notes_of_images(images, comparison)
    elif figures:
        count = counted(figures[0].num_images or 0, "image")
        notes.append(f"{count} of {dataset.name}, {dataset.split}{dataset.held_out_suffix}")
    if _is_timed(comparison.settings):
        work = "drawing" if images else "the bound"
        notes.append(f"s/image: time of {work} in one process, median over batches")
    labels = setting_labels((*comparison.settings, *comparison.left_out))
    for reason in dict.fromkeys(row.reason for row in comparison.left_out):
        settings = [labels[row.setting] for row in comparison.left_out if row.reason == reason]
        notes.append(f"left out: {'; '.join(settings)}: {reason}")
    return notes


def _notes_of_images(figures: Sequence[RankedFigure], comparison: SettingsResult) -> list[str]:
    options, dataset = comparison.options, comparison.dataset
    numbers = [figure.num_drawn or 0 for figure in figures]
    fewest, most = min(numbers), max(numbers)
    of_images = f"{fewest:,} to " * (fewest < most) + counted(most, "drawn image")
    notes = [
        f"{of_images} against {figures[0].num_real:,} real ones of {dataset.name}"
        f"{dataset.trained_on_suffix}; by {options.features}; seed {options.seed}"
    ]
    if fewest < most:
        notes.append(
            "the Frechet distance falls with the number of images: pass"
            f" `num_images` {fewest} to compare at one number"
        )
    return notes


def _settings_table(rows: tuple[ComparisonRow, ...], names: list[str]) -> str:
    having = {name: [row.figures[name] for row in rows if name in row.figures] for name in names}
    best = [next(f for f in having[name] if f.rank == "best") for name in names]
    labels, is_timed = setting_labels(rows), _is_timed(rows)
    width = max(len("real images"), *map(len, labels.values()))
    head = f"{'':{width}}  {'calls':>6}" + f"  {'s/image':>8}" * is_timed
    lines = [head + "".join(f"  {having[name][0].label:>18}{'':5}" for name in names)]
    for row in rows:
        calls, seconds = row.num_network_calls, row.seconds_per_image
        line = f"{labels[row.setting]:{width}}  {'' if calls is None else f'{calls:,}':>6}"
        line += f"  {'' if seconds is None else f'{seconds:.3g}':>8}" * is_timed
        lines.append(line + "".join(f"  {_cell(row.figures.get(name)):>23}" for name in names))
    if sizes := next((f.floor_num_images for f in best if f.floor_num_images), None):
        lines.append(f"at {sizes[1]:,} images against {sizes[0]:,}:")
        for title, kind in (("  the best", "drawn"), ("  real images", "real")):
            values = [f"{getattr(f.floor, kind):.4g}{'':5}" if f.floor else "" for f in best]
            lines.append(f"{title:{len(head)}}" + "".join(f"  {value:>23}" for value in values))
    return "\n".join(line.rstrip() for line in lines)


def _is_timed(rows: Sequence[ComparisonRow]) -> bool:
    return any(row.seconds_per_image is not None for row in rows)


def _cell(figure: RankedFigure | None) -> str:
    if figure is None:
        return ""
    return f"{figure.value:.4g} +- {figure.half_width:.2g} {figure.rank:4}"
