"""Result of `evaluate`, and the base of all results.

Each result prints as a text table, renders as HTML in a notebook, and converts to the JSON object
of its file (`to_dict`, `from_dict`) and to flat dictionaries for `pandas.DataFrame` (`rows`).
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import ClassVar, Literal, Self

from ddpm_hf.digests import json_digest
from ddpm_hf.evaluation import tables
from ddpm_hf.evaluation.figures import BoundResult, DatasetFacts, MetricResult, ModelFacts
from ddpm_hf.evaluation.options import EvaluationOptions
from ddpm_hf.evaluation.records import JsonObject, Record, Row


def package_versions() -> dict[str, str]:
    """Versions of this package, diffusers and torch."""
    return {name: version(name) for name in ("ddpm-hf", "diffusers", "torch")}


def utc_now() -> str:
    """Current time in UTC, ISO 8601."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Result(Record):
    """A record that is shown to users."""

    def rows(self) -> list[Row]:
        """Flat dictionaries, one per row of a data frame."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return tables.html_table(self.rows())


@dataclass(frozen=True, kw_only=True, repr=False)
class Report(Result):
    """A result file whose "options" hold more than the options object.

    Attributes:
        metrics: names of the metrics.
        command: command line that measures the same.
        versions: of this package, diffusers and torch.
        created: time in UTC, ISO 8601.
    """

    _IN_OPTIONS: ClassVar[tuple[str, ...]] = ("metrics",)

    def to_dict(self) -> JsonObject:
        """The JSON object of the result file."""
        content = super().to_dict()
        own = {name: content.pop(name) for name in self._IN_OPTIONS}
        return content | {"options": own | content["options"]}

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

    format_version: Literal[1] = 1
    model: ModelFacts
    dataset: DatasetFacts
    results: tuple[BoundResult | MetricResult, ...]
    metrics: tuple[str, ...]
    options: EvaluationOptions
    command: str
    versions: dict[str, str] = field(default_factory=package_versions)
    created: str = field(default_factory=utc_now)

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
        return tables.figures_text(self.bound, self.image_metrics, self.dataset)
