"""WebDataset shards (.tar): their index, and the encoded images.

Every image file is one image. Files of a sample share the path up to the first dot of the name.
"""

import hashlib
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import datasets
import pyarrow as pa

from ddpm_hf.data.decoding import EXTENSIONS, FILES_AT_ONCE, Cell
from ddpm_hf.data.errors import DataError
from ddpm_hf.data.remote_files import (
    NUM_CONNECTIONS,
    BrokenTransfer,
    is_url,
    modification_time,
    read_end,
    read_through,
)
from ddpm_hf.data.shard_index import Shard, ShardIndex
from ddpm_hf.diffusion.atomic_files import write_text

_CLASS_EXTENSION = "cls"  # of the files with the class of a sample
_INDEX_BYTES = 2**26
_LABEL_BYTES = 2**20  # a larger file holds no label


def index_tar_files(
    locations: Sequence[str], label_column: str | Literal[True] | None, cache: Path | None
) -> tuple[ShardIndex, datasets.Dataset | None]:
    """The index without labels, and the labels of all images as a dataset of one column.

    Args:
        locations, label_column, cache: of `ddpm_hf.data.shards.index_shards`.
    Raises:
        DataError: if a file cannot be read, or no image has a label.
    """
    listed = _listed_rows(locations[0]) if label_column is None else {}
    key = "" if label_column is True else label_column

    def read(location: str) -> tuple[Shard, list[Any]]:
        name, (_, size) = PurePosixPath(location).name, read_end(location, 1)
        modified = modification_time(location)
        if name in listed:
            return Shard(location, listed[name], size, modified), []
        digest = hashlib.sha256(repr((location, size, modified, key)).encode()).hexdigest()[:32]
        file = cache and cache / f"{digest}.json"
        labels = _cached(file, lambda: _labels_of_file(location, key))
        return Shard(location, len(labels), size, modified), labels

    with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
        found = list(pool.map(read, locations))
    index = ShardIndex(tuple(shard for shard, _ in found if shard.num_rows))
    values = [value for _, labels in found for value in labels]
    return index, None if key is None else _label_dataset(values, key)


def _listed_rows(location: str) -> dict[str, int]:
    """Rows by file name from the index.json next to a .tar file; {} without one."""
    try:
        text, _ = read_end(location.rpartition("/")[0] + "/index.json", _INDEX_BYTES)
        shards = json.loads(text)["shardlist"]
        return {PurePosixPath(shard["url"]).name: int(shard["nsamples"]) for shard in shards}
    except (DataError, ValueError, KeyError, TypeError, RecursionError):
        return {}


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
        return datasets.Dataset.from_dict({key or _CLASS_EXTENSION: values})
    except (pa.ArrowException, TypeError) as error:
        raise DataError(f"the labels have several types: {error}") from error


def _labels_of_file(location: str, key: str | None) -> list[Any]:
    """The label of each image of a .tar file, None for an image without one.

    Args:
        location: path or URL.
        key: of the .json files; "" for .cls files; None reads no labels.
    Raises:
        DataError: if the file cannot be read.
    """
    if is_url(location):
        return read_through(location, partial(_read_labels, key=key))
    try:
        with open(location, "rb") as file:
            return _read_labels(file, key)
    except OSError as error:
        raise DataError(f"{location} cannot be read: {error}") from error


def _read_labels(file: Any, key: str | None) -> list[Any]:
    # "r|" reads without seeking, as the answer of a server requires.
    mode: Any = "r:" if hasattr(file, "seek") else "r|"
    extension = "json" if key else _CLASS_EXTENSION
    images: list[str] = []
    labels: dict[str, object] = {}
    try:
        with tarfile.open(fileobj=file, mode=mode) as tar:
            for member in tar:
                sample, kind = _sample_of(member)
                if _is_image(member):
                    images.append(sample)
                elif key is not None and kind == extension and _may_be_label(member):
                    labels[sample] = _parse_label(_content(tar, member), key)
    except tarfile.TarError as error:
        raise BrokenTransfer(f"no .tar file, or an incomplete one: {error}") from error
    return [labels.get(sample) for sample in images]


def _sample_of(member: tarfile.TarInfo) -> tuple[str, str]:
    """The sample of a file, and the rest of its name."""
    path = PurePosixPath(member.name)
    name, _, kind = path.name.partition(".")
    return str(path.parent / name), kind


def _parse_label(content: bytes, key: str) -> Any:
    """The label in a .json or .cls file; None if there is none."""
    text = content.decode(errors="replace").strip()
    if not key:
        return int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else text
    try:
        return json.loads(text).get(key)
    except (ValueError, AttributeError, RecursionError):
        return None


def _is_image(member: tarfile.TarInfo) -> bool:
    path = PurePosixPath(member.name)
    return member.isfile() and path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")


def _may_be_label(member: tarfile.TarInfo) -> bool:
    return member.isfile() and member.size <= _LABEL_BYTES


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read() if file else b""


def tar_cells(path: Path) -> Iterator[list[Cell]]:
    """The encoded images of a .tar file, some at a time."""
    with tarfile.open(path, "r:") as tar:
        images = (member for member in tar if _is_image(member))
        while members := list(islice(images, FILES_AT_ONCE)):
            yield [{"bytes": _content(tar, member), "path": None} for member in members]
