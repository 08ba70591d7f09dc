"""Parquet shards: number of rows, image column, labels, and the encoded images."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from ddpm_hf.data.decoding import Cell
from ddpm_hf.data.errors import DataError
from ddpm_hf.data.file_limits import parquet_size
from ddpm_hf.data.image_column import find_image_column
from ddpm_hf.data.labels import find_label_column, known_class_names
from ddpm_hf.data.remote_files import RemoteFile, is_url


@dataclass(frozen=True)
class ParquetFacts:
    """What a parquet file holds.

    Attributes:
        num_rows, num_bytes: its numbers of rows and bytes.
        image_column: name of the column.
        class_names: names of the classes in its `ClassLabel` column, if it has one.
        labels: the label column, if requested.
    """

    num_rows: int
    num_bytes: int
    image_column: str
    class_names: tuple[str, ...] | None
    labels: datasets.Dataset | None


def read_parquet_facts(
    location: str, image_column: str | None, label_column: str | Literal[True] | None
) -> ParquetFacts:
    """Read the last bytes of a parquet file and its labels, not its images.

    Args:
        location: path or URL.
        image_column, label_column: of `ddpm_hf.data.shards.index_shards`.
    Raises:
        DataError: if the file cannot be read, or lacks a column.
    """
    try:
        with _open(location) as file, pq.ParquetFile(file) as parquet:
            empty = _empty_dataset(parquet.schema_arrow)
            labels = None
            if label_column is not None:
                labels = _read_column(parquet, find_label_column(empty, label_column), empty)
            num_rows, num_bytes = parquet.metadata.num_rows, file.seek(0, os.SEEK_END)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{location} is not a readable parquet file: {error}") from error
    column, names = find_image_column(empty, image_column), known_class_names(empty)
    return ParquetFacts(num_rows, num_bytes, column, names, labels)


def _open(location: str) -> Any:
    return RemoteFile(location) if is_url(location) else Path(location).open("rb")


def _empty_dataset(schema: pa.Schema) -> datasets.Dataset:
    """A dataset with the columns of a parquet file, and a single row without values."""
    features = datasets.Features.from_arrow_schema(schema)
    return datasets.Dataset.from_dict({column: [None] for column in features}, features=features)


def _read_column(file: pq.ParquetFile, column: str, like: datasets.Dataset) -> datasets.Dataset:
    features = datasets.Features({column: like.features[column]})
    table = file.read([column], use_threads=False).cast(features.arrow_schema)
    info = datasets.DatasetInfo(features=features)
    return datasets.Dataset(datasets.table.InMemoryTable(table), info=info)


def parquet_cells(path: Path, column: str, max_rows: int) -> Iterator[list[Cell]]:
    """The encoded images of a parquet file, at most `max_rows` at a time.

    Only bytes in the file are read: a path in a row is ignored, because it could name any file.
    """
    num_rows = min(max_rows, parquet_size([str(path)]).rows_per_batch)
    for batch in pq.ParquetFile(path).iter_batches(num_rows, columns=[column]):
        yield [_cell(value) for value in batch.column(0).to_pylist()]


def _cell(value: Any) -> Cell:
    content = value.get("bytes") if isinstance(value, dict) else value
    return {"bytes": content if isinstance(content, bytes) else b"", "path": None}
