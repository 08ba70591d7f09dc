"""Metrics of each class, which reveal what the metrics of all images hide."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_hf.evaluation.figures import ClassResult, MetricResult
from ddpm_hf.evaluation.metrics import METRICS, MIN_IMAGES, measure
from ddpm_hf.sampling import DrawnImages
from ddpm_hf.text import share_that_has

FEW_IMAGES = 100  # per class, below which only large differences are significant

RowsByClass = dict[str, tuple[Tensor, ...]]
"""By name of the class, the rows of its real, drawn and, if any, held-out images."""


def rows_by_class(
    real: DrawnImages, drawn: DrawnImages, held_out: DrawnImages | None, num_drawn: int
) -> RowsByClass:
    """Rows of the images of each class, matched by name, or by number if one set has no names.

    Args:
        real, drawn, held_out: sets with labels.
        num_drawn: number of drawn images that are compared.
    Raises:
        ValueError: if the drawn images have no classes, or none in common with the real ones.
    """
    if drawn.labels is None:
        raise ValueError(
            "`per_class` needs images with classes: from a class-conditional model, a .npz with"
            " arr_1, a parquet file with a class column, or a folder with a subfolder per class"
        )
    sets = (real, drawn) if held_out is None else (real, drawn, held_out)
    names = [_class_names(images, real.class_names or ()) for images in sets]
    names[1] = names[1][:num_drawn]
    rows = {
        name: tuple(torch.from_numpy(np.flatnonzero(of_set == name)) for of_set in names)
        for name in real.class_names or ()
        if name in names[0] and name in names[1]
    }
    if not rows:
        drawn_names = ", ".join(sorted(set(names[1]) - {""})[:5])
        raise ValueError(
            f"no class is in both sets; classes of the drawn images: {drawn_names or 'none'}"
        )
    return rows


def _class_names(images: DrawnImages, default_names: tuple[str, ...]) -> np.ndarray:
    """Class name of each image, "" without a class."""
    names = dict(enumerate(images.class_names or default_names))
    labels = () if images.labels is None else images.labels.tolist()
    return np.array([names.get(number, "") for number in labels])


def with_classes(
    results: Sequence[MetricResult],
    rows: RowsByClass,
    real: Tensor,
    drawn: Tensor,
    held_out: Tensor | None,
    *,
    seed: int,
    device: Any = "cpu",
) -> list[MetricResult]:
    """The results with `classes`, the worst first.

    A class with too few images has a note in place of a value.

    Args:
        results: of `measure`.
        rows: of `rows_by_class`.
        real, drawn, held_out, seed, device: see `measure`.
    """
    sets = (real, drawn) if held_out is None else (real, drawn, held_out)
    return [
        result
        for metric, of_metric in groupby(results, key=lambda result: result.metric)
        for result in _with_classes(metric, list(of_metric), rows, sets, seed, device)
    ]


def _with_classes(
    metric: str,
    results: Sequence[MetricResult],
    rows: RowsByClass,
    sets: tuple[Tensor, ...],
    seed: int,
    device: Any,
) -> list[MetricResult]:
    """The results of one metric with `classes`."""
    by_result: list[list[ClassResult]] = [[] for _ in results]
    for name, of_class in rows.items():
        x, y, *z = (features[subset] for features, subset in zip(sets, of_class, strict=True))
        z = [others for others in z if len(others) >= MIN_IMAGES[metric]]
        if min(len(x), len(y)) < MIN_IMAGES[metric]:
            measured = [_too_few_images(metric, name, len(x), len(y))] * len(results)
        else:
            figures = measure(metric, x, y, *z, seed=seed, device=device)
            measured = [ClassResult.of(figure, class_name=name) for figure in figures]
        for classes, row in zip(by_result, measured, strict=True):
            classes.append(row)
    num_small = sum(min(map(len, of_class[:2])) < FEW_IMAGES for of_class in rows.values())
    if num_small:
        warnings.warn(
            f"{share_that_has(num_small, len(rows), 'class', 'classes')} fewer than {FEW_IMAGES}"
            f" real or drawn images: {metric} detects large differences only",
            stacklevel=2,
        )
    return [
        replace(result, classes=_worst_first(classes, quantity.lower_is_better))
        for result, quantity, classes in zip(results, METRICS[metric][1], by_result, strict=True)
    ]


def _too_few_images(metric: str, name: str, num_real: int, num_drawn: int) -> ClassResult:
    note = f"too few images: {metric} needs {MIN_IMAGES[metric]} of each"
    return ClassResult(
        class_name=name, value=None, note=note, num_real=num_real, num_drawn=num_drawn
    )


def _worst_first(classes: list[ClassResult], lower_is_better: bool) -> tuple[ClassResult, ...]:
    def gap(row: ClassResult) -> float:
        return row.floor.drawn - row.floor.real if row.floor else 0.0

    sign = 1 if lower_is_better else -1
    return tuple(sorted(classes, key=lambda row: -sign * gap(row)))
