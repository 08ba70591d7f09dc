"""Metrics of the images of each class."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_hf.evaluation.figures import ClassResult, MetricResult
from ddpm_hf.evaluation.metrics import LOWER_IS_BETTER, METRICS, MIN_IMAGES, measure
from ddpm_hf.sampling import DrawnImages
from ddpm_hf.utils.text import share_that_has

FEW_IMAGES = 100  # per class, below which only large differences are significant

RowsByClass = dict[str, tuple[Tensor, ...]]
"""By name of the class, the rows of its real, drawn and, if any, held-out images."""


def rows_by_class(
    real: DrawnImages, drawn: DrawnImages, held_out: DrawnImages | None
) -> RowsByClass:
    """Rows of the images of each class, matched by name, or by number if one set has no names.

    Args:
        real, drawn, held_out: sets with labels.
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
    classes: dict[str, list[ClassResult]] = {result.name: [] for result in results}
    num_small = sum(min(map(len, of_class[:2])) < FEW_IMAGES for of_class in rows.values())
    for metric in dict.fromkeys(result.metric for result in results):
        for name, of_class in rows.items():
            features = [of_set[subset] for of_set, subset in zip(sets, of_class, strict=True)]
            for figure, measured in _of_class(metric, name, features, seed, device).items():
                classes[figure].append(measured)
        if num_small:
            warnings.warn(
                f"{share_that_has(num_small, len(rows), 'class', 'classes')} fewer than"
                f" {FEW_IMAGES} real or drawn images: {metric} detects large differences only",
                stacklevel=2,
            )
    return [
        replace(result, classes=_worst_first(classes[result.name], LOWER_IS_BETTER[result.name]))
        for result in results
    ]


def _of_class(
    metric: str, name: str, features: Sequence[Tensor], seed: int, device: Any
) -> dict[str, ClassResult]:
    """The figures of a metric for one class, by their names."""
    x, y, *z = features
    if min(len(x), len(y)) < MIN_IMAGES[metric]:
        note = f"too few images: {metric} needs {MIN_IMAGES[metric]} of each"
        too_few = ClassResult(
            class_name=name, value=None, note=note, num_real=len(x), num_drawn=len(y)
        )
        return {quantity.name: too_few for quantity in METRICS[metric][1]}
    z = [others for others in z if len(others) >= MIN_IMAGES[metric]]
    figures = measure(metric, x, y, *z, seed=seed, device=device)
    return {figure.name: ClassResult.of(figure, class_name=name) for figure in figures}


def _worst_first(classes: list[ClassResult], lower_is_better: bool) -> tuple[ClassResult, ...]:
    def gap(row: ClassResult) -> float:
        return row.floor.drawn - row.floor.real if row.floor else 0.0

    sign = 1 if lower_is_better else -1
    return tuple(sorted(classes, key=lambda row: -sign * gap(row)))
