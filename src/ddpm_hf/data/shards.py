"""Shards of a stream: parquet files or WebDataset .tar files, with their rows and labels.

The number of rows of every shard, and the label of every row, must be known before training.
Parquet files state the number in their last bytes; of the columns only that of the labels is read.
For .tar files the number is read from an index.json next to them, in the format of WebDataset's
`wids`; without one, and for labels, every file is read once, and the result is kept in a cache.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa

from ddpm_hf.data.decoding import Cell
from ddpm_hf.data.errors import DataError
from ddpm_hf.data.labels import Labels, read_labels
from ddpm_hf.data.parquet_shards import parquet_cells, read_parquet_facts
from ddpm_hf.data.remote_files import read_end
from ddpm_hf.data.tar_shards import CLASS_EXTENSION, listed_rows, read_tar_labels, tar_cells
from ddpm_hf.diffusion.atomic_files import write_text

_NUM_CONNECTIONS = 8
_ROWS_AT_ONCE = 64  # encoded files, each up to some MB


@dataclass(frozen=True)
class Shard:
    """A file with images.

    Attributes:
        location: path or URL.
        num_rows: number of images.
        num_bytes: size of the file.
    """

    location: str
    num_rows: int
    num_bytes: int

    @property
    def name(self) -> str:
        """The name of the file."""
        return PurePosixPath(self.location).name


@dataclass(frozen=True)
class ShardIndex:
    """The shards of a stream; images are numbered through all of them.

    Attributes:
        shards: in the order of their names.
        column: image column of parquet files; "" for .tar files.
        labels: class of each image, (N,); None if not requested.
        class_names: names of the classes, if known.
    """

    shards: tuple[Shard, ...]
    column: str = ""
    labels: Labels | None = field(default=None, compare=False, repr=False)
    class_names: tuple[str, ...] | None = field(default=None, compare=False, repr=False)

    @cached_property
    def starts(self) -> list[int]:
        """Index of the first image of each shard, and the number of all images."""
        return [0, *accumulate(shard.num_rows for shard in self.shards)]

    @property
    def num_images(self) -> int:
        """Number of images in all shards."""
        return self.starts[-1]

    def locate(self, index: int) -> tuple[int, int]:
        """Shard and row of an image."""
        shard = bisect_right(self.starts, index) - 1
        return shard, index - self.starts[shard]

    def select(self, numbers: Sequence[int]) -> "ShardIndex":
        """Some of the shards."""
        labels = self.labels
        if labels is not None:
            parts = [labels[self.starts[n] : self.starts[n + 1]] for n in numbers]
            labels = np.concatenate(parts)
        shards = tuple(self.shards[number] for number in numbers)
        return ShardIndex(shards, self.column, labels, self.class_names)

    @property
    def digest(self) -> str:
        """Identifies names, sizes, rows and labels of the shards, wherever they are."""
        facts = [(shard.name, shard.num_rows, shard.num_bytes) for shard in self.shards]
        sums = hashlib.sha256(repr((self.column, facts)).encode())
        sums.update(b"" if self.labels is None else self.labels.tobytes())
        return sums.hexdigest()[:16]


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
        index, labels = _index_parquet_files(locations, image_column, label_column)
    else:
        index, labels = _index_tar_files(locations, label_column, cache)
    if not index.num_images:
        raise DataError("the shards have no images")
    if labels is None:
        return index
    numbers, names = read_labels(labels, labels.column_names[0])
    return ShardIndex(index.shards, index.column, numbers, names)


_Indexed = tuple[ShardIndex, datasets.Dataset | None]  # without labels, and the column of labels


def _index_parquet_files(
    locations: Sequence[str], image_column: str | None, label_column: str | Literal[True] | None
) -> _Indexed:
    read = partial(read_parquet_facts, image_column=image_column, label_column=label_column)
    with ThreadPoolExecutor(_NUM_CONNECTIONS) as pool:
        files = dict(zip(locations, pool.map(read, locations), strict=True))
    columns = {file.image_column for file in files.values()}
    if len(columns) > 1:
        raise DataError(f"the shards have different image columns: {', '.join(sorted(columns))}")
    shards = [Shard(path, file.num_rows, file.num_bytes) for path, file in files.items()]
    index = _with_images(shards, columns.pop(), files[locations[0]].class_names)
    parts = [file.labels for file in files.values() if file.labels is not None]
    try:
        return index, datasets.concatenate_datasets(parts) if parts else None
    except ValueError as error:
        raise DataError(f"the label columns of the shards differ: {error}") from error


def _with_images(
    shards: Sequence[Shard], column: str = "", class_names: tuple[str, ...] | None = None
) -> ShardIndex:
    used = tuple(shard for shard in shards if shard.num_rows)
    return ShardIndex(used, column, class_names=class_names)


def _index_tar_files(
    locations: Sequence[str], label_column: str | Literal[True] | None, cache: Path | None
) -> _Indexed:
    listed = listed_rows(locations[0]) if label_column is None else {}
    key = "" if label_column is True else label_column

    def read(location: str) -> tuple[Shard, list[Any]]:
        name, (_, size) = PurePosixPath(location).name, read_end(location, 1)
        if name in listed:
            return Shard(location, listed[name], size), []
        digest = hashlib.sha256(repr((location, size, key)).encode()).hexdigest()[:32]
        file = cache and cache / f"{digest}.json"
        labels = _cached(file, lambda: read_tar_labels(location, key))
        return Shard(location, len(labels), size), labels

    with ThreadPoolExecutor(_NUM_CONNECTIONS) as pool:
        found = list(pool.map(read, locations))
    index = _with_images([shard for shard, _ in found])
    values = [value for _, labels in found for value in labels]
    return index, None if key is None else _label_dataset(values, key)


def _cached(file: Path | None, read: Callable[[], list[Any]]) -> list[Any]:
    """The values in a JSON file, which is written if it is missing or damaged."""
    if file is None:
        return read()
    with suppress(OSError, ValueError):
        return list(json.loads(file.read_text(encoding="utf-8")))
    values = read()
    with suppress(OSError):  # a full disk costs another reading
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(values))
    return values


def _label_dataset(values: list[Any], key: str) -> datasets.Dataset:
    if not any(value is not None for value in values):
        where = f"a .json file with the key {key!r}" if key else "a .cls file"
        raise DataError(f"no image of the .tar files has {where}, which would hold its label")
    try:
        return datasets.Dataset.from_dict({key or CLASS_EXTENSION: values})
    except (pa.ArrowException, TypeError) as error:
        raise DataError(f"the labels have several types: {error}") from error


def read_cells(path: Path, column: str) -> Iterator[list[Cell]]:
    """The encoded images of a shard, some at a time.

    Args:
        path: the file.
        column: image column of a parquet file; "" for a .tar file.
    """
    return parquet_cells(path, column, _ROWS_AT_ONCE) if column else tar_cells(path, _ROWS_AT_ONCE)
