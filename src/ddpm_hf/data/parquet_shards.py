"""Parquet shards: their index, and the encoded images."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from ddpm_hf.data.decoding import FILES_AT_ONCE, Cell
from ddpm_hf.data.encoded_images import find_image_column
from ddpm_hf.data.errors import DataError
from ddpm_hf.data.file_limits import parquet_size
from ddpm_hf.data.labels import find_label_column, known_class_names
from ddpm_hf.data.remote_files import NUM_CONNECTIONS, RemoteFile, is_url, modification_time
from ddpm_hf.data.shard_index import Shard, ShardIndex


@dataclass(frozen=True)
class _File:
    """A parquet file: its facts, and its label column if requested."""

    shard: Shard
    image_column: str
    class_names: tuple[str, ...] | None
    labels: datasets.Dataset | None


def index_parquet_files(
    locations: Sequence[str], image_column: str | None, label_column: str | Literal[True] | None
) -> tuple[ShardIndex, datasets.Dataset | None]:
    """The index without labels, and the label column of all files.

    Reads the last bytes of each file and its labels, not its images.

    Args:
        locations, image_column, label_column: of `ddpm_hf.data.shards.index_shards`.
    Raises:
        DataError: if a file cannot be read, or the files do not have the same columns.
    """
    read = partial(_read_file, image_column=image_column, label_column=label_column)
    with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
        files = list(pool.map(read, locations))
    columns = {file.image_column for file in files}
    if len(columns) > 1:
        raise DataError(f"the shards have different image columns: {', '.join(sorted(columns))}")
    shards = tuple(file.shard for file in files if file.shard.num_rows)
    index = ShardIndex(shards, columns.pop(), class_names=files[0].class_names)
    parts = [file.labels for file in files if file.labels is not None]
    try:
        return index, datasets.concatenate_datasets(parts) if parts else None
    except ValueError as error:
        raise DataError(f"the label columns of the shards differ: {error}") from error


def _read_file(
    location: str, image_column: str | None, label_column: str | Literal[True] | None
) -> _File:
    try:
        with _open(location) as file, pq.ParquetFile(file) as parquet:
            empty = _empty_dataset(parquet.schema_arrow)
            labels = None
            if label_column is not None:
                labels = _read_column(parquet, find_label_column(empty, label_column), empty)
            num_rows, size = parquet.metadata.num_rows, file.seek(0, os.SEEK_END)
            shard = Shard(location, num_rows, size, modification_time(location))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{location} is not a readable parquet file: {error}") from error
    return _File(shard, find_image_column(empty, image_column), known_class_names(empty), labels)


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


def parquet_cells(path: Path, column: str) -> Iterator[list[Cell]]:
    """The encoded images of a parquet file, some at a time.

    Only bytes in the file are read: a path in a row is ignored, because it could name any file.
    """
    num_rows = min(FILES_AT_ONCE, parquet_size([str(path)]).rows_per_batch)
    for batch in pq.ParquetFile(path).iter_batches(num_rows, columns=[column]):
        yield [_cell(value) for value in batch.column(0).to_pylist()]


def _cell(value: Any) -> Cell:
    content = value.get("bytes") if isinstance(value, dict) else value
    return {"bytes": content if isinstance(content, bytes) else b"", "path": None}
