"""Columns of a metadata.csv, without the conversions of pandas.

The `imagefolder` builder of `datasets` reads the code 007 as the number 7 and the names NA, null
and None as missing values, which changes or removes class labels.
"""

import csv
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets

from ddpm_hf.data.errors import DataError

_TYPES: tuple[tuple[re.Pattern[str], str, Callable[[str], Any]], ...] = (
    (re.compile(r"0|-?[1-9]\d{0,17}"), "int64", int),
    (re.compile(r"-?\d+\.\d+([eE][-+]?\d+)?"), "float64", float),
)


def with_text_columns(
    rows: datasets.Dataset, file: Path, paths: Sequence[str | None]
) -> datasets.Dataset:
    """The rows of a CSV file with the text of each column.

    Args:
        rows: rows that the `imagefolder` builder read.
        file: the metadata.csv file.
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
        raise DataError(f"the lines of {str(file)!r} cannot be read: remove empty lines")
    for column, kind in list(rows.features.items()):
        if isinstance(kind, datasets.Value):
            texts = [record.get(column) or "" for record in records]
            rows = _replaced(rows, column, texts, "string")
    return rows


def with_types(rows: datasets.Dataset) -> datasets.Dataset:
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
