"""Shards of a stream: parquet files or WebDataset .tar files.

The number of rows of every shard, and the label of every row, must be known before training.
Parquet files state the number in their last bytes; of the columns only that of the labels is read.
For .tar files the number is read from an index.json next to them, in the format of WebDataset's
`wids`; without one, and for labels, every file is read once, and the result is kept in a cache.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from ddpm_hf.data.decoding import Cell
from ddpm_hf.data.errors import DataError
from ddpm_hf.data.labels import read_labels
from ddpm_hf.data.parquet_shards import index_parquet_files, parquet_cells
from ddpm_hf.data.shard_index import ShardIndex
from ddpm_hf.data.tar_shards import index_tar_files, tar_cells


def index_shards(
    locations: Sequence[str],
    image_column: str | None = None,
    label_column: str | Literal[True] | None = None,
    cache: Path | None = None,
) -> ShardIndex:
    """The number of rows of every shard, and their labels.

    Args:
        locations: paths or URLs of .parquet or .tar files.
        image_column: name of the column in parquet files; None for the only image column.
        label_column: column of the labels in parquet files, True for the only `ClassLabel` column;
            key of the .json files in .tar files, True for their .cls files; None for no labels.
        cache: folder that keeps what was read of .tar files; None to read them again.
    Raises:
        DataError: if a file cannot be read, there are no images, or the labels are unusable.
    """
    if locations[0].endswith(".parquet"):
        index, labels = index_parquet_files(locations, image_column, label_column)
    else:
        index, labels = index_tar_files(locations, label_column, cache)
    if not index.num_images:
        raise DataError("the shards have no images")
    if labels is None:
        return index
    numbers, names = read_labels(labels, labels.column_names[0])
    return replace(index, labels=numbers, class_names=names)


def read_cells(path: Path, column: str) -> Iterator[list[Cell]]:
    """The encoded images of a shard, some at a time.

    Args:
        path: the file.
        column: image column of a parquet file; "" for a .tar file.
    """
    return parquet_cells(path, column) if column else tar_cells(path)
