"""The figures of each class, which tell what those of all images hide."""

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_hf.evaluation.metrics import FEWEST, METRICS, measure
from ddpm_hf.sampling import DrawnImages
from ddpm_hf.text import counted

FEW = 100  # images of a class, below which only large differences are told from chance
_OF_CLASS = ("value", "interval", "standard_error", "floor", "verdict", "note", "num_real",
             "num_drawn", "floor_between", "floor_num_images")  # fmt: skip

Rows = dict[str, tuple[Tensor, ...]]
"""By the name of a class which images are of it: real ones, drawn ones, held-out ones if any."""


def rows_of_classes(
    real: DrawnImages, drawn: DrawnImages, held_out: DrawnImages | None, num_drawn: int
) -> Rows:
    """The images of each class, known by its name, or by its number where one set has no names.

    Args:
        real, drawn, held_out: with labels.
        num_drawn: of the drawn images so many are compared.
    Raises:
        ValueError: if the drawn images have no classes, or none in common with the real ones.
    """
    if drawn.labels is None:
        raise ValueError(
            "per_class is of images with classes: those of a class-conditional model, a .npz with"
            " arr_1, a parquet file with a column of classes, or a folder of a sub-folder for each"
        )
    sets = (real, drawn) if held_out is None else (real, drawn, held_out)
    names = [_names(images, real.class_names or ()) for images in sets]
    names[1] = names[1][:num_drawn]
    rows = {
        name: tuple(torch.from_numpy(np.flatnonzero(of == name)) for of in names)
        for name in real.class_names or ()
        if name in names[0] and name in names[1]
    }
    if not rows:
        found = ", ".join(sorted(set(names[1]) - {""})[:5])
        raise ValueError(f"no class is in both sets; the drawn images are of {found or 'none'}")
    return rows


def _names(images: DrawnImages, usual: tuple[str, ...]) -> np.ndarray:
    """The name of each image's class, "" for none."""
    names = dict(enumerate(images.class_names or usual))
    labels = () if images.labels is None else images.labels.tolist()
    return np.array([names.get(number, "") for number in labels])


def add_classes(
    figures: list[dict[str, Any]],
    rows: Rows,
    real: Tensor,
    drawn: Tensor,
    held_out: Tensor | None,
    *,
    seed: int,
    device: Any = "cpu",
) -> None:
    """Give the figures of a metric "classes": the same of each class, the worst first.

    Each has its "class", its numbers of images and its floor, as `measure` gives them; one of too
    few images has a "note" in place of a value.

    Args:
        figures: of `measure`.
        rows: of `rows_of_classes`.
        real, drawn, held_out, seed, device: as for `measure`.
    """
    metric = figures[0]["metric"]
    sets = (real, drawn) if held_out is None else (real, drawn, held_out)
    found: list[list[dict[str, Any]]] = [[] for _ in figures]
    for name, of_class in rows.items():
        x, y, *z = (features[part] for features, part in zip(sets, of_class, strict=True))
        z = [others for others in z if len(others) >= FEWEST[metric]]
        if min(len(x), len(y)) < FEWEST[metric]:
            note = f"too few images: {metric} needs {FEWEST[metric]} of each"
            measured: list[dict[str, Any]] = [
                {"num_real": len(x), "num_drawn": len(y), "value": None, "note": note}
            ] * len(figures)
        else:
            measured = measure(metric, x, y, *z, seed=seed, device=device)
        for of_figure, figure in zip(found, measured, strict=True):
            row = {key: figure[key] for key in _OF_CLASS if key in figure}
            of_figure.append({"class": name, **row})
    for figure, kind, of_figure in zip(figures, METRICS[metric][1], found, strict=True):
        sign = 1 if kind.lower_is_better else -1
        figure["classes"] = sorted(of_figure, key=lambda row: -sign * _gap(row))
    few = sum(min(map(len, of_class[:2])) < FEW for of_class in rows.values())
    if few:
        warnings.warn(
            f"{counted(few, 'class', 'classes')} of {len(rows)} have fewer than {FEW} images, real"
            f" or drawn: {metric} tells large differences only",
            stacklevel=2,
        )


def _gap(row: dict[str, Any]) -> float:
    return float(row["floor"]["drawn"] - row["floor"]["real"]) if "floor" in row else 0.0
