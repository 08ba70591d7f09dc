"""Result of `evaluate`, and the base of all results.

Each result prints as a text table, renders as HTML in a notebook, and converts to the JSON object
of its file (`to_dict`, `from_dict`) and to flat dictionaries for `pandas.DataFrame` (`rows`).
"""

import html
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, ClassVar, Literal, Self

from ddpm_hf.evaluation.figures import (
    BoundResult,
    ClassResult,
    DatasetFacts,
    MetricResult,
    ModelFacts,
)
from ddpm_hf.evaluation_options import EvaluationOptions
from ddpm_hf.json_records import JsonObject, Record, Row
from ddpm_hf.utils.digests import json_digest
from ddpm_hf.utils.text import counted

VERDICTS = {"worse": "worse than real", "better": "better than real", "tie": "a tie with real"}
MAX_CLASSES = 20  # rows of a printed table


class Result(Record):
    """A record that is shown to users."""

    def rows(self) -> list[Row]:
        """Flat dictionaries, one per row of a data frame."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        rows = self.rows()
        columns = list(dict.fromkeys(key for row in rows for key in row))
        head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
        lines = (
            "".join(f"<td>{_html_cell(row.get(column))}</td>" for column in columns) for row in rows
        )
        body = "".join(f"<tr>{line}</tr>" for line in lines)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _html_cell(value: str | int | float | None) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else html.escape(str(value))


def package_versions() -> dict[str, str]:
    """Versions of this package, diffusers and torch."""
    return {name: version(name) for name in ("ddpm-hf", "diffusers", "torch")}


def utc_now() -> str:
    """Current time in UTC, ISO 8601."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True, kw_only=True, repr=False)
class Report(Result):
    """A result with a file of its own.

    Attributes:
        options: how it was measured; in the file together with the fields of `_IN_OPTIONS`.
        command: command line that measures the same.
        versions: of this package, diffusers and torch.
        created: time in UTC, ISO 8601.
    """

    _IN_OPTIONS: ClassVar[tuple[str, ...]] = ("metrics",)

    format_version: Literal[1] = 1
    options: Any
    command: str | None
    versions: dict[str, str] = field(default_factory=package_versions)
    created: str = field(default_factory=utc_now)

    def to_dict(self) -> JsonObject:
        """The JSON object of the result file."""
        content = super().to_dict()
        own = {name: content.pop(name) for name in self._IN_OPTIONS}
        last = {name: content.pop(name) for name in ("options", "command", "versions", "created")}
        return content | last | {"options": own | last["options"]}

    @classmethod
    def from_dict(cls, content: JsonObject) -> Self:
        """The result of a JSON object.

        Raises:
            ValueError: if it is not one of `to_dict`.
        """
        try:
            options = dict(content["options"])
            own = {name: options.pop(name) for name in cls._IN_OPTIONS}
        except (LookupError, TypeError) as error:
            raise ValueError(f"no valid options: {error!r}") from None
        return super().from_dict({**content, **own, "options": options})


@dataclass(frozen=True, kw_only=True, repr=False)
class Evaluation(Report):
    """Result of `evaluate`; `results` has one entry per figure. See `Report` for the rest."""

    model: ModelFacts
    dataset: DatasetFacts
    results: tuple[BoundResult | MetricResult, ...]
    metrics: tuple[str, ...]
    options: EvaluationOptions
    command: str

    @property
    def figures(self) -> dict[str, BoundResult | MetricResult]:
        """The results by name, such as "fd"."""
        return {result.name: result for result in self.results}

    @property
    def bound(self) -> BoundResult | None:
        """The bound in bits/dim, if it was measured."""
        return next((r for r in self.results if isinstance(r, BoundResult)), None)

    @property
    def image_metrics(self) -> tuple[MetricResult, ...]:
        """The results that compare images."""
        return tuple(r for r in self.results if isinstance(r, MetricResult))

    def rows(self) -> list[Row]:
        """One row per figure, followed by a row for each of its classes."""
        return [row for result in self.results for row in result.rows()]

    def to_dict(self) -> JsonObject:
        """The JSON object of the result file, with its checksum."""
        content = super().to_dict()
        return content | {"sha256": json_digest(content)}

    def __str__(self) -> str:
        tables = [_bound_table(self.bound, self.dataset)] if self.bound else []
        if figures := self.image_metrics:
            tables += [_metric_table(figures, self.dataset)]
            tables += [_class_table(figure) for figure in figures if figure.classes]
        return "\n\n".join(tables)


def _bound_table(bound: BoundResult, dataset: DatasetFacts) -> str:
    """The parts of the bound, and how they were measured."""
    lines = [f"{'':10} {'bits/dim':>9}   standard error"]
    for name, part in vars(bound.parts).items():
        error = part.standard_error
        shown = "unknown (one image)" if error is None else f"{error:.4f}"
        lines.append(f"{name:10} {part.value:9.4f}   {shown}")
    height, width = bound.shape[1:]
    size, mode = f"{height}x{width}", ""
    if image := dataset.image:
        mode = f", {image.mode}"
        if (image.height, image.width) != (height, width):
            size = f"{image.height}x{image.width}, padded to {size}"
    lines += [
        "",
        f"data      {dataset.name}, {dataset.split}: {counted(bound.num_images, 'image')}"
        f"{dataset.held_out_suffix}, {size}{mode}, {bound.bit_depth} bit",
        f"bound     {bound_setup(bound)}",
    ]
    return "\n".join(lines)


def bound_setup(bound: BoundResult) -> str:
    """Steps, decoder and seed of a bound in one line."""
    K, M = bound.num_inference_steps, bound.num_timesteps
    measured = f", {M:,} of them measured per image" if M < K else ""
    eta = "" if bound.eta is None else f", eta {bound.eta:g}"
    variances = ", calibrated variances" if bound.is_calibrated else ""
    return f"K = {K:,} steps{eta}{measured}{variances}; decoder {bound.decoder}; seed {bound.seed}"


def _metric_table(figures: tuple[MetricResult, ...], dataset: DatasetFacts) -> str:
    """The metrics of drawn images, next to their floors."""
    lines = [f"{'':18}{'value':>10}  {'95 % interval':23}{'drawn':>11}{'real':>11}"]
    lines += [f"{figure.label:18}{_measured_cells(figure)}" for figure in figures]
    lines += [f"note: {figure.label}: {figure.note}" for figure in figures if figure.note]
    first = figures[0]
    setup, (num_reference, num_others) = first.measured_with, first.floor_num_images
    split = setup.held_out_split
    others = f"of {split}{dataset.held_out_suffix}" if split else "of the other half"
    return "\n".join([
        *lines,
        "",
        f"value     {counted(first.num_drawn, 'drawn image')} against {first.num_real:,} of"
        f" {setup.reference_split}{dataset.trained_on_suffix}; by {setup.features.name}",
        f"drawn     the same for {num_others:,} drawn against {num_reference:,} real ones, mean of"
        f" {first.num_resamples} draws",
        f"real      {num_others:,} real ones {others} instead: what a perfect model would get;"
        " a tie is too close to tell at this number",
    ])  # fmt: skip


def _class_table(figure: MetricResult) -> str:
    """A metric for each class, the worst first."""
    classes = figure.classes or ()
    title = f"{figure.label} per class"
    lines = [f"{title:28}{'95 % interval':23}{'drawn':>11}{'real':>11}"]
    for row in classes[:MAX_CLASSES]:
        counts = f" ({row.num_drawn:,} drawn, {row.num_real:,} real)" if row.interval else ""
        lines.append(f"{row.class_name[:18]:18}{_measured_cells(row)}{counts}")
    if len(classes) > MAX_CLASSES:
        lines.append(f"and {len(classes) - MAX_CLASSES:,} more classes, in the JSON file")
    return "\n".join(lines)


def _measured_cells(measured: MetricResult | ClassResult) -> str:
    if measured.interval is None or measured.floor is None or measured.verdict is None:
        return f"{'-':>10}  {measured.note}"
    low, high = measured.interval
    return (
        f"{measured.value:10.4g}  {f'{low:.4g} .. {high:.4g}':23}{measured.floor.drawn:11.4g}"
        f"{measured.floor.real:11.4g}  {VERDICTS[measured.verdict]}"
    )
