"""The image column of a dataset."""

from typing import Any

import datasets

from ddpm_hf.data.errors import DataError
from ddpm_hf.diffusion.image_format import IMAGE_MODES
from ddpm_hf.text import did_you_mean


def find_image_column(dataset: Any, name: str | None) -> str:
    """Name of the image column.

    Args:
        dataset: a `datasets.Dataset`.
        name: requested column; None for the only image column.
    Raises:
        DataError: if the column does not exist or is not unique, or the dataset has no rows, has
            several splits, or has a transform.
        TypeError: if `dataset` has another type.
    """
    if isinstance(dataset, datasets.DatasetDict):
        raise DataError(f"the dataset has several splits; choose one of {', '.join(dataset)}")
    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(f"`dataset` must be a datasets.Dataset, got {type(dataset).__name__}")
    if len(dataset) == 0:
        raise DataError("the dataset has no rows")
    if dataset.format["type"] == "custom":
        raise DataError(
            "the dataset has a transform, which would be ignored; call reset_format() on it, and"
            " use the options for resizing, flips and scaling"
        )
    columns = dataset.features
    images = [column for column in columns if isinstance(columns[column], datasets.Image)]
    encoded = [column for column in columns if _may_hold_files(columns[column])]
    if name is not None and name not in [*images, *encoded]:
        hint = did_you_mean(name, [*images, *encoded])
        raise DataError(
            f"`image_column` must be an image column, got {name!r}{hint}; {_describe(columns)}"
        )
    candidates = [name] if name is not None else images or encoded
    if not candidates:
        raise DataError(f"the dataset has no image column; {_describe(columns)}")
    if len(candidates) > 1:
        raise DataError(
            f"the dataset has several image columns; set `image_column`; {_describe(columns)}"
        )
    return candidates[0]


def declared_mode(feature: Any) -> str | None:
    """Image mode in the declaration of a column, such as `datasets.Image(mode="RGB")`."""
    mode = getattr(feature, "mode", None)
    return mode if mode in IMAGE_MODES else None


def _may_hold_files(feature: Any) -> bool:
    """Whether the type fits encoded images that a parquet file does not declare as images."""
    if isinstance(feature, dict):
        are_values = all(isinstance(part, datasets.Value) for part in feature.values())
        return are_values and set(feature) == {"bytes", "path"}
    return isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")


def _describe(columns: datasets.Features) -> str:
    kinds = [f"{name} ({getattr(kind, 'dtype', kind)})" for name, kind in columns.items()]
    return f"the columns are {', '.join(kinds)}"
