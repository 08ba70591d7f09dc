"""Rows of an image folder with metadata.csv, metadata.jsonl or metadata.parquet files.

The `imagefolder` builder of `datasets` reads them and rejects file names outside the folder. It
reads the code 007 in a CSV file as the number 7 and the names NA, null and None as missing values,
which changes or removes class labels; the text of CSV columns is therefore read again here.
"""

import csv
import glob
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePath
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from ddpm_hf.data.errors import DataError
from ddpm_hf.data.file_limits import MAX_LINE_BYTES, check_lines, check_metadata
from ddpm_hf.data.splits import Splits

_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_TYPES: tuple[tuple[re.Pattern[str], str, Callable[[str], Any]], ...] = (
    (re.compile(r"0|-?[1-9]\d{0,17}"), "int64", int),
    (re.compile(r"-?\d+\.\d+([eE][-+]?\d+)?"), "float64", float),
)


def metadata_files(root: Path, files: Iterable[str]) -> list[str]:
    """The metadata files of `imagefolder` that name images.

    Args:
        root: the image folder.
        files: its files, relative to `root`.
    """
    return [
        file for file in files if os.path.basename(file) in _NAMES and _names_images(root / file)
    ]


def _names_images(file: Path) -> bool:
    """Whether a metadata file names images, as opposed to the metadata of a photo album."""
    try:
        if file.suffix == ".parquet":
            names = pq.read_schema(file).names
        else:
            with file.open(encoding="utf-8-sig", newline="") as lines:
                first = lines.readline(MAX_LINE_BYTES)
                is_csv = file.suffix == ".csv"
                names = next(csv.reader([first])) if is_csv else list(json.loads(first))
    except (
        OSError,
        RecursionError,
        ValueError,
        TypeError,
        StopIteration,
        csv.Error,
        pa.ArrowException,
    ):
        return False
    return any(re.search("(^|_)file_names?$", str(name)) for name in names)


def rows_with_metadata(root: Path, metadata: Sequence[str], names: Sequence[str]) -> Splits:
    """Rows of the metadata by split.

    Args:
        root: the image folder.
        metadata: its metadata files, relative to `root`.
        names: names of the splits.
    Raises:
        DataError: if a file is too large or cannot be read.
    """
    rows = _read_metadata(root, metadata)
    columns = _image_columns(rows)
    if len(names) == 1 or not columns:
        return dict.fromkeys(names, rows)
    tops = [PurePath(path).relative_to(root).parts[0] for path in _paths(rows, columns[0])]
    return {
        name: rows.select([row for row, top in enumerate(tops) if top == name]) for name in names
    }


def listed_images(rows: datasets.Dataset) -> set[str]:
    """Paths of the images in all image columns."""
    return {path for column in _image_columns(rows) for path in _paths(rows, column)}


def _read_metadata(root: Path, metadata: Sequence[str]) -> datasets.Dataset:
    """The rows of all metadata files, in the order of the files.

    Read one by one, because the builder takes several files in random order.
    """
    tables = []
    for file in metadata:
        path = root / file
        if path.suffix == ".parquet":
            check_metadata(path)
        else:
            check_lines(path)
        data_files = {"train": [glob.escape(str(path))]}
        rows = datasets.load_dataset("imagefolder", data_files=data_files, split="train")
        columns = _image_columns(rows)
        if path.suffix == ".csv" and columns:
            rows = _with_text_columns(rows, path, _paths(rows, columns[0]))
        tables.append(rows)
    rows = datasets.concatenate_datasets(tables)
    return _with_types(rows) if all(file.endswith(".csv") for file in metadata) else rows


def _image_columns(rows: datasets.Dataset) -> list[str]:
    return [name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)]


def _paths(rows: datasets.Dataset, column: str) -> list[str]:
    """Paths in an image column; None for a cell without path."""
    chunks = rows.with_format("arrow")[:].column(column).chunks
    return [path for chunk in chunks for path in chunk.field("path").to_pylist()]


def _with_text_columns(
    rows: datasets.Dataset, file: Path, paths: Sequence[str | None]
) -> datasets.Dataset:
    """The rows of a CSV file with the text of each column.

    Args:
        rows: rows that the `imagefolder` builder read.
        file: the CSV file.
        paths: path of the image of each row.
    Raises:
        DataError: if the builder read other rows.
    """
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        key = next(name for name in reader.fieldnames or () if name.endswith("file_name"))
        records = list(reader)
    named = [os.path.normpath(os.path.join(file.parent, record[key] or "")) for record in records]
    if named != [os.path.normpath(path or "") for path in paths]:
        raise DataError(
            f"the lines of {str(file)!r} cannot be read: each needs a file name, and no more cells"
            " than the first line"
        )
    for column, kind in list(rows.features.items()):
        if isinstance(kind, datasets.Value):
            texts = [record.get(column) or "" for record in records]
            rows = _replaced(rows, column, texts, "string")
    return rows


def _with_types(rows: datasets.Dataset) -> datasets.Dataset:
    """The rows with columns of integers or decimal fractions as numbers; "" is None there."""
    for column, kind in list(rows.features.items()):
        texts = rows[column][:] if isinstance(kind, datasets.Value) else []
        for pattern, dtype, convert in _TYPES:
            if any(texts) and all(pattern.fullmatch(text) for text in texts if text):
                values = [convert(text) if text else None for text in texts]
                rows = _replaced(rows, column, values, dtype)
    return rows


def _replaced(
    rows: datasets.Dataset, column: str, values: Sequence[Any], dtype: str
) -> datasets.Dataset:
    kept = rows.remove_columns(column)
    return kept.add_column(column, list(values), feature=datasets.Value(dtype))
