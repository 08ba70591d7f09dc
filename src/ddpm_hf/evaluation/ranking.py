"""Ranks of the figures of a comparison: the best, ties with it, and the rest."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ddpm_hf.evaluation.comparison_results import ComparisonRow, RankedFigure
from ddpm_hf.evaluation.figures import NORMAL_95, BoundResult, MetricResult
from ddpm_hf.evaluation.metrics import METRICS, T_19
from ddpm_hf.evaluation.options import BITS
from ddpm_hf.evaluation.results import Evaluation

LOWER_IS_BETTER = {BITS: True} | {
    quantity.name: quantity.lower_is_better
    for _, quantities in METRICS.values()
    for quantity in quantities
}


def ranked(
    rows: Sequence[ComparisonRow], evaluations: Sequence[Evaluation]
) -> Iterator[ComparisonRow]:
    """The rows with their figures, each ranked among all rows."""
    best = {
        name: min(
            (e.figures[name] for e in evaluations if name in e.figures),
            key=lambda figure: (1 if LOWER_IS_BETTER[figure.name] else -1) * figure.value,
        )
        for name in dict.fromkeys(name for e in evaluations for name in e.figures)
    }
    for row, evaluation in zip(rows, evaluations, strict=True):
        figures = {
            name: ranked_figure(figure, best[name]) for name, figure in evaluation.figures.items()
        }
        yield replace(row, figures=figures)


def ranked_figure(
    figure: BoundResult | MetricResult, best: BoundResult | MetricResult
) -> RankedFigure:
    """A figure of one setting, ranked against that of the best setting."""
    gap, of_chance = figure.value - best.value, gap_of_chance(figure, best)
    is_tie = of_chance is None or abs(gap) <= of_chance
    dims = figure.measured_with.features.dims if isinstance(figure, MetricResult) else None
    return RankedFigure.of(
        figure,
        num_features=dims,
        rank="best" if figure is best else "tie" if is_tie else "",
        gap=gap,
        gap_of_chance=of_chance,
    )


def gap_of_chance(a: BoundResult | MetricResult, b: BoundResult | MetricResult) -> float | None:
    """Half-width of the 95 % interval of the difference of two figures; None for one image.

    Paired if possible: the settings share the real images, their halves, and the noise of each
    drawn image.
    """
    first, second = _samples(a), _samples(b)
    if len(first) < 2:
        return None
    factor = NORMAL_95 / math.sqrt(len(first)) if isinstance(a, BoundResult) else T_19
    if len(first) == len(second):
        return factor * statistics.stdev(x - y for x, y in zip(first, second, strict=True))
    return factor * math.hypot(statistics.stdev(first), statistics.stdev(second))


def _samples(figure: BoundResult | MetricResult) -> tuple[float, ...]:
    """Bounds of the images, or values of the halves."""
    return figure.total if isinstance(figure, BoundResult) else figure.halves
