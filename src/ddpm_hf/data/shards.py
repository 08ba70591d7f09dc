"""Shards of a stream: parquet files or WebDataset .tar files, by path or URL, with their rows.

The number of rows of every shard must be known before training. Parquet files state it in their
last bytes. For .tar files it is read from an index.json next to them, in the format of WebDataset's
`wids`; without one every file is read once before training.
"""

import glob
import hashlib
import io
import json
import re
import tarfile
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, islice, product
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import pyarrow.parquet as pq
from huggingface_hub import HfFileSystem, hf_hub_url

from ddpm_hf.data.decoding import EXTENSIONS, Cell
from ddpm_hf.data.errors import DataError
from ddpm_hf.data.image_column import find_image_column
from ddpm_hf.data.image_folder import by_split
from ddpm_hf.data.remote_files import BrokenTransfer, is_url, read_end, read_through
from ddpm_hf.text import close_paths, did_you_mean

_FOOTER_BYTES = 2**16  # most footers are smaller
_NUM_CONNECTIONS = 8
_ROWS_AT_ONCE = 64  # encoded files, each up to some MB
_INDEX_BYTES = 2**26


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
    """

    shards: tuple[Shard, ...]
    column: str = ""

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

    @property
    def digest(self) -> str:
        """Identifies names, sizes and rows of the shards, wherever they are."""
        facts = [(shard.name, shard.num_rows, shard.num_bytes) for shard in self.shards]
        return hashlib.sha256(repr((self.column, facts)).encode()).hexdigest()[:16]


def find_shards(
    source: str, config_name: str | None = None, split: str = "train", revision: str | None = None
) -> list[str]:
    """Paths or URLs of the shards of a dataset, sorted by name.

    Args:
        source: a folder or a glob of .parquet or .tar files, a URL with `{000..123}` for a range of
            numbers, or a dataset of the Hub that consists of such files.
        config_name, revision: of a dataset of the Hub.
        split: split of a dataset of the Hub or of the file names in a folder.
    Raises:
        DataError: if there are none, or of several kinds.
    """
    path = Path(source).expanduser()
    if is_url(source):
        shards = _expand_braces(source)
    elif path.is_dir():
        files = sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())
        files = [file for file in files if file.endswith((".parquet", ".tar"))]
        shards = [glob.glob(pattern)[0] for pattern in _of_split(by_split(path, files), split)]
    elif path.is_file() or any(char in source for char in "*?["):
        shards = sorted(glob.glob(str(path), recursive=True))
    else:
        shards = _on_the_hub(source, config_name, split, revision)
    kinds = {PurePosixPath(shard).suffix for shard in shards}
    if kinds not in ({".parquet"}, {".tar"}):
        raise DataError(
            f"a stream needs .parquet or .tar files, {source!r} has "
            f"{', '.join(sorted(kind or 'no suffix' for kind in kinds)) or 'none'}"
        )
    return shards


def _expand_braces(url: str) -> list[str]:
    """URLs for every number in {first..last}."""
    parts = re.split(r"\{(\d+)\.\.(\d+)\}", url)
    ranges = [
        [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
        for first, last in zip(parts[1::3], parts[2::3], strict=True)
    ]
    texts = parts[::3]
    return [
        texts[0] + "".join(number + text for number, text in zip(numbers, texts[1:], strict=True))
        for numbers in product(*ranges)
    ]


def _of_split(splits: dict[str, list[str]], split: str) -> list[str]:
    if split not in splits:
        hint = did_you_mean(split, splits)
        raise DataError(f"`split` must be one of {', '.join(splits)}, got {split!r}{hint}")
    return splits[split]


def _on_the_hub(name: str, config: str | None, split: str, revision: str | None) -> list[str]:
    try:
        builder = datasets.load_dataset_builder(name, config, revision=revision)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise DataError(
            f"{name!r} is not a local path{close_paths(name)}; as a Hub dataset: {error}"
        ) from error
    files = {str(key): list(value) for key, value in (builder.config.data_files or {}).items()}
    resolved: list[Any] = [HfFileSystem().resolve_path(path) for path in _of_split(files, split)]
    return [
        hf_hub_url(file.repo_id, file.path_in_repo, repo_type="dataset", revision=file.revision)
        for file in resolved
    ]


def index_shards(locations: Sequence[str], image_column: str | None = None) -> ShardIndex:
    """The number of rows of every shard.

    Args:
        locations: paths or URLs of .parquet or .tar files.
        image_column: name of the column in parquet files; None for the only image column.
    Raises:
        DataError: if a file cannot be read, or there are no images.
    """
    is_tar = locations[0].endswith(".tar")
    listed = _listed_rows(locations[0]) if is_tar else {}
    with ThreadPoolExecutor(_NUM_CONNECTIONS) as pool:
        if is_tar:
            shards = list(pool.map(lambda each: _index_tar(each, listed), locations))
            columns = {""}
        else:
            footers = list(pool.map(_read_footer, locations))
            shards = [
                Shard(location, footer.num_rows, size)
                for location, (footer, size) in zip(locations, footers, strict=True)
            ]
            columns = {_image_column(footer, image_column) for footer, _ in footers}
    if len(columns) > 1:
        raise DataError(f"the shards have different image columns: {', '.join(sorted(columns))}")
    index = ShardIndex(tuple(shard for shard in shards if shard.num_rows), columns.pop())
    if not index.num_images:
        raise DataError("the shards have no images")
    return index


def _read_footer(location: str) -> tuple[Any, int]:
    """Metadata and size of a parquet file, from its last bytes."""
    end, size = read_end(location, _FOOTER_BYTES)
    needed = int.from_bytes(end[-8:-4], "little") + 8
    if end[-4:] != b"PAR1" or needed > size:
        raise DataError(f"{location} is not a parquet file")
    if needed > len(end):
        end, size = read_end(location, needed)
    try:
        return pq.read_metadata(io.BytesIO(end)), size
    except (OSError, ValueError) as error:
        raise DataError(f"{location} is not a parquet file: {error}") from error


def _image_column(footer: Any, name: str | None) -> str:
    schema = datasets.Features.from_arrow_schema(footer.schema.to_arrow_schema())
    empty = {column: [None] for column in schema}
    return find_image_column(datasets.Dataset.from_dict(empty, features=schema), name)


def _listed_rows(location: str) -> dict[str, int]:
    """Rows by file name from the index.json next to a .tar file; {} without one."""
    try:
        text, _ = read_end(location.rpartition("/")[0] + "/index.json", _INDEX_BYTES)
        shards = json.loads(text)["shardlist"]
        return {PurePosixPath(shard["url"]).name: int(shard["nsamples"]) for shard in shards}
    except (DataError, ValueError, KeyError, TypeError):
        return {}


def _index_tar(location: str, listed: Mapping[str, int]) -> Shard:
    name, (_, size) = PurePosixPath(location).name, read_end(location, 1)
    if name in listed:
        return Shard(location, listed[name], size)
    if is_url(location):
        return Shard(location, read_through(location, _count_images), size)
    try:
        with open(location, "rb") as file:
            return Shard(location, _count_images(file), size)
    except OSError as error:
        raise DataError(f"{location} cannot be read: {error}") from error


def _count_images(file: Any) -> int:
    # "r|" reads without seeking, as the answer of a server requires.
    mode: Any = "r:" if hasattr(file, "seek") else "r|"
    try:
        with tarfile.open(fileobj=file, mode=mode) as tar:
            return sum(1 for member in tar if _is_image(member))
    except tarfile.TarError as error:
        raise BrokenTransfer(f"no .tar file, or an incomplete one: {error}") from error


def _is_image(member: tarfile.TarInfo) -> bool:
    path = PurePosixPath(member.name)
    return member.isfile() and path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")


def read_cells(path: Path, column: str) -> Iterator[list[Cell]]:
    """The encoded images of a shard, some at a time.

    Only bytes in the shard are read: a path in a row is ignored, because it could name any file.

    Args:
        path: the file.
        column: image column of a parquet file; "" for a .tar file.
    """
    if column:
        for batch in pq.ParquetFile(path).iter_batches(_ROWS_AT_ONCE, columns=[column]):
            yield [_cell(value) for value in batch.column(0).to_pylist()]
        return
    with tarfile.open(path, "r:") as tar:
        images = (member for member in tar if _is_image(member))
        while members := list(islice(images, _ROWS_AT_ONCE)):
            yield [_member_cell(tar, member) for member in members]


def _cell(value: Any) -> Cell:
    content = value.get("bytes") if isinstance(value, dict) else value
    return {"bytes": content if isinstance(content, bytes) else b"", "path": None}


def _member_cell(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Cell:
    file = tar.extractfile(member)
    return {"bytes": file.read() if file else b"", "path": None}
