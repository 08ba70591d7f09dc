"""Encoded images of a dataset: its image column, and the cells before they are decoded."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ddpm_hf.data.errors import DataError
from ddpm_hf.data.file_limits import MAX_IMAGE_BYTES
from ddpm_hf.diffusion.image_format import IMAGE_MODES
from ddpm_hf.utils.text import did_you_mean


@dataclass(frozen=True)
class EncodedImages:
    """Cells of an image column, before they are decoded.

    Attributes:
        cells: dataset with one column.
        column: its name.
        root: real path of the folder from which paths in cells may be read, or None.
    """

    cells: datasets.Dataset
    column: str
    root: str | None

    @classmethod
    def of(
        cls, dataset: datasets.Dataset, column: str, root: str | os.PathLike[str] | None
    ) -> "EncodedImages":
        """The cells of a column of a dataset.

        Args:
            dataset: the dataset.
            column: from `find_image_column`.
            root: folder from which paths in cells may be read, or None.
        """
        cells = dataset.with_format(None).select_columns([column])
        cells = cells.cast_column(column, datasets.Image(decode=False))
        return cls(cells, column, os.path.realpath(Path(root).expanduser()) if root else None)

    def check_sizes(self) -> None:
        """Raise DataError for an encoded image that would take too much memory."""
        for first, cells in self._chunks():
            sizes = pc.fill_null(pc.binary_length(cells.field("bytes")), 0).to_numpy()
            if sizes.max() > MAX_IMAGE_BYTES:
                raise DataError(
                    f"row {first + sizes.argmax()} has {sizes.max() / 2**20:,.0f} MiB; image files"
                    f" of up to {MAX_IMAGE_BYTES // 2**20:,} MiB are supported"
                )

    def named_files(self) -> list[tuple[str, int, int]]:
        """Path, size and modification time of the files that cells name instead of holding bytes.

        Raises:
            DataError: if a cell names a URL, or a file that is not under the root.
        """
        files, refused = [], []
        for row, path in self._paths_without_bytes():
            real = os.path.realpath(os.path.join(self.root or "", path))
            is_inside = self.root is not None and real.startswith(self.root + os.sep)
            if is_inside and "://" not in path:
                files.append((path, *_size_and_time(real)))
            else:
                refused.append(f"row {row} ({path!r})")
        if refused:
            reason = (
                f"to a file that is not under {self.root!r}"
                if self.root
                else "to a file, which is read only under `image_root`"
            )
            raise DataError(
                f"{len(refused)} of {len(self.cells)} rows contain no image but a path {reason},"
                f" such as {refused[0]}: embed the bytes, or pass the folder as `image_root` to"
                " prepare_images()"
            )
        return files

    def _paths_without_bytes(self) -> Iterator[tuple[int, str]]:
        """Row number and path of the cells that contain only a path."""
        for first, cells in self._chunks():
            is_missing = cells.field("bytes").is_null().to_numpy(zero_copy_only=False)
            for offset in np.flatnonzero(is_missing).tolist():
                path = cells.field("path")[offset].as_py()
                if path:
                    yield first + offset, path

    def _chunks(self) -> Iterator[tuple[int, pa.StructArray]]:
        """The cells as Arrow arrays, each with the number of its first row."""
        first = 0
        for table in self.cells.with_format("arrow").iter(batch_size=1000):
            for cells in table.column(self.column).chunks:
                yield first, cells
                first += len(cells)


def _size_and_time(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return -1, 0  # reported when the image is decoded
    return status.st_size, status.st_mtime_ns


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


def _may_hold_files(feature: Any) -> bool:
    """Whether the type fits encoded images that a parquet file does not declare as images."""
    if isinstance(feature, dict):
        are_values = all(isinstance(part, datasets.Value) for part in feature.values())
        return are_values and set(feature) == {"bytes", "path"}
    return isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")


def _describe(columns: datasets.Features) -> str:
    kinds = [f"{name} ({getattr(kind, 'dtype', kind)})" for name, kind in columns.items()]
    return f"the columns are {', '.join(kinds)}"


def declared_mode(feature: Any) -> str | None:
    """Image mode in the declaration of a column, such as `datasets.Image(mode="RGB")`."""
    mode = getattr(feature, "mode", None)
    return mode if mode in IMAGE_MODES else None
