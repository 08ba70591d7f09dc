"""Shards of a stream: parquet files or WebDataset .tar files, with their rows and labels.

The number of rows of every shard, and the label of every row, must be known before training.
Parquet files state the number in their last bytes; of the columns only that of the labels is read.
For .tar files the number is read from an index.json next to them, in the format of WebDataset's
`wids`; without one, and for labels, every file is read once.
"""

import hashlib
import json
import os
import tarfile
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import accumulate, islice
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ddpm_hf.data.decoding import EXTENSIONS, Cell
from ddpm_hf.data.errors import DataError
from ddpm_hf.data.file_limits import parquet_size
from ddpm_hf.data.image_column import find_image_column
from ddpm_hf.data.labels import Labels, find_label_column, known_class_names, read_labels
from ddpm_hf.data.remote_files import BrokenTransfer, RemoteFile, is_url, read_end, read_through

_NUM_CONNECTIONS = 8
_ROWS_AT_ONCE = 64  # encoded files, each up to some MB
_INDEX_BYTES = 2**26
_CLASS_EXTENSION = "cls"  # of WebDataset


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
) -> ShardIndex:
    """The number of rows of every shard, and their labels.

    Args:
        locations: paths or URLs of .parquet or .tar files.
        image_column: name of the column in parquet files; None for the only image column.
        label_column: column of the labels in parquet files, True for the only `ClassLabel` column;
            key of the .json files in .tar files, True for their .cls files; None for no labels.
    Raises:
        DataError: if a file cannot be read, there are no images, or the labels are unusable.
    """
    read = _index_parquet if locations[0].endswith(".parquet") else _index_tar_files
    index, labels = read(locations, image_column, label_column)
    if not index.num_images:
        raise DataError("the shards have no images")
    if labels is None:
        return index
    (column,) = labels.column_names
    numbers, names = read_labels(labels, column)
    return ShardIndex(index.shards, index.column, numbers, names)


Indexed = tuple[ShardIndex, datasets.Dataset | None]
"""Index without labels, and the column of the labels."""


def _index_parquet(
    locations: Sequence[str], image_column: str | None, label_column: str | Literal[True] | None
) -> Indexed:
    read = partial(_read_parquet, image_column=image_column, label_column=label_column)
    with ThreadPoolExecutor(_NUM_CONNECTIONS) as pool:
        files = list(pool.map(read, locations))
    columns = {file.column for file in files}
    if len(columns) > 1:
        raise DataError(f"the shards have different image columns: {', '.join(sorted(columns))}")
    shards = _with_rows([file.shard for file in files])
    index = ShardIndex(shards, columns.pop(), None, files[0].class_names)
    parts = [file.labels for file in files if file.labels is not None]
    return index, _concatenate(parts) if parts else None


@dataclass(frozen=True)
class _ParquetFacts:
    """A shard, its image column, the class names that it declares, and its labels."""

    shard: Shard
    column: str
    class_names: tuple[str, ...] | None
    labels: datasets.Dataset | None


def _read_parquet(
    location: str, image_column: str | None, label_column: str | Literal[True] | None
) -> _ParquetFacts:
    try:
        with _open(location) as file, pq.ParquetFile(file) as parquet:
            size = file.seek(0, os.SEEK_END)
            empty, labels = _empty_dataset(parquet.schema_arrow), None
            if label_column is not None:
                column = find_label_column(empty, label_column)
                features = datasets.Features({column: empty.features[column]})
                table = parquet.read([column], use_threads=False).cast(features.arrow_schema)
                info = datasets.DatasetInfo(features=features)
                labels = datasets.Dataset(datasets.table.InMemoryTable(table), info=info)
            shard = Shard(location, parquet.metadata.num_rows, size)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{location} is not a readable parquet file: {error}") from error
    return _ParquetFacts(
        shard, find_image_column(empty, image_column), known_class_names(empty), labels
    )


def _open(location: str) -> Any:
    return RemoteFile(location) if is_url(location) else Path(location).open("rb")


def _empty_dataset(schema: pa.Schema) -> datasets.Dataset:
    """A dataset with the columns of a parquet file, and a single row without values."""
    features = datasets.Features.from_arrow_schema(schema)
    return datasets.Dataset.from_dict({column: [None] for column in features}, features=features)


def _concatenate(parts: Sequence[datasets.Dataset]) -> datasets.Dataset:
    try:
        return datasets.concatenate_datasets(parts)
    except ValueError as error:
        raise DataError(f"the label columns of the shards differ: {error}") from error


def _with_rows(shards: Sequence[Shard]) -> tuple[Shard, ...]:
    return tuple(shard for shard in shards if shard.num_rows)


def _index_tar_files(
    locations: Sequence[str], image_column: str | None, label_column: str | Literal[True] | None
) -> Indexed:
    listed = _listed_rows(locations[0]) if label_column is None else {}
    key = "" if label_column is True else label_column
    with ThreadPoolExecutor(_NUM_CONNECTIONS) as pool:
        found = list(pool.map(lambda each: _index_tar(each, listed, key), locations))
    index = ShardIndex(_with_rows([shard for shard, _ in found]))
    if label_column is None:
        return index, None
    values = [value for _, labels in found for value in labels]
    if not any(value is not None for value in values):
        where = f"a .json file with the key {key!r}" if key else "a .cls file"
        raise DataError(f"no image of the .tar files has {where}, which would hold its label")
    try:
        return index, datasets.Dataset.from_dict({key or _CLASS_EXTENSION: values})
    except (pa.ArrowException, TypeError) as error:
        raise DataError(f"the labels have several types: {error}") from error


def _listed_rows(location: str) -> dict[str, int]:
    """Rows by file name from the index.json next to a .tar file; {} without one."""
    try:
        text, _ = read_end(location.rpartition("/")[0] + "/index.json", _INDEX_BYTES)
        shards = json.loads(text)["shardlist"]
        return {PurePosixPath(shard["url"]).name: int(shard["nsamples"]) for shard in shards}
    except (DataError, ValueError, KeyError, TypeError):
        return {}


def _index_tar(
    location: str, listed: Mapping[str, int], key: str | None
) -> tuple[Shard, list[Any]]:
    """A shard and the labels of its images; see `_read_labels`."""
    name, (_, size) = PurePosixPath(location).name, read_end(location, 1)
    if name in listed:
        return Shard(location, listed[name], size), []
    read = partial(_read_labels, key=key)
    if is_url(location):
        labels = read_through(location, read)
    else:
        try:
            with open(location, "rb") as file:
                labels = read(file)
        except OSError as error:
            raise DataError(f"{location} cannot be read: {error}") from error
    return Shard(location, len(labels), size), labels


def _read_labels(file: Any, key: str | None) -> list[Any]:
    """The label of each image of a .tar file, from a file of the same sample.

    Args:
        file: the .tar file, which need not be seekable.
        key: of the .json files; "" for .cls files; None reads no labels.
    """
    # "r|" reads without seeking, as the answer of a server requires.
    mode: Any = "r:" if hasattr(file, "seek") else "r|"
    extension = "json" if key else _CLASS_EXTENSION
    images: list[str] = []
    labels: dict[str, Any] = {}
    try:
        with tarfile.open(fileobj=file, mode=mode) as tar:
            for member in tar:
                sample, kind = _sample_of(member)
                if _is_image(member):
                    images.append(sample)
                elif key is not None and kind == extension:
                    labels[sample] = _parse_label(_content(tar, member), key)
    except tarfile.TarError as error:
        raise BrokenTransfer(f"no .tar file, or an incomplete one: {error}") from error
    return [labels.get(sample) for sample in images]


def _sample_of(member: tarfile.TarInfo) -> tuple[str, str]:
    """The sample of a file, which is its path up to the first dot of its name, and the rest."""
    path = PurePosixPath(member.name)
    name, _, kind = path.name.partition(".")
    return str(path.parent / name), kind


def _parse_label(content: bytes, key: str) -> Any:
    """The label in a .json or .cls file; None if there is none."""
    text = content.decode(errors="replace").strip()
    if not key:
        return int(text) if text.isdecimal() else text
    try:
        return json.loads(text).get(key)
    except (ValueError, AttributeError):
        return None


def _is_image(member: tarfile.TarInfo) -> bool:
    path = PurePosixPath(member.name)
    return member.isfile() and path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read() if file else b""


def read_cells(path: Path, column: str) -> Iterator[list[Cell]]:
    """The encoded images of a shard, some at a time.

    Only bytes in the shard are read: a path in a row is ignored, because it could name any file.

    Args:
        path: the file.
        column: image column of a parquet file; "" for a .tar file.
    """
    if column:
        num_rows = min(_ROWS_AT_ONCE, parquet_size([str(path)]).rows_per_batch)
        for batch in pq.ParquetFile(path).iter_batches(num_rows, columns=[column]):
            yield [_cell(value) for value in batch.column(0).to_pylist()]
        return
    with tarfile.open(path, "r:") as tar:
        images = (member for member in tar if _is_image(member))
        while members := list(islice(images, _ROWS_AT_ONCE)):
            yield [{"bytes": _content(tar, member), "path": None} for member in members]


def _cell(value: Any) -> Cell:
    content = value.get("bytes") if isinstance(value, dict) else value
    return {"bytes": content if isinstance(content, bytes) else b"", "path": None}
